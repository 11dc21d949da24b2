"""Micro-batches of captions of similar length: every sample once, little padding, the same losses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.condition import Condition
from pipeline.training.micro_batches import by_length, lengths_of_captions
from tests.helpers.networks import few, random_inputs, random_network

LENGTHS = (70, 3, 40, 9, 64, 5, 31, 2)
PARTS = [slice(start, start + 2) for start in range(0, 8, 2)]


def divided(multiple=1, parts=PARTS, ragged=0):
    return list(by_length(parts, [LENGTHS, LENGTHS], multiple, torch.device("cpu"), ragged))


def test_every_sample_is_in_one_micro_batch_and_the_shortest_come_first():
    rows = [part.rows.tolist() for part in divided()]
    assert rows == [[7, 1], [5, 3], [6, 2], [4, 0]]
    assert [part.tokens[0] for part in divided()] == [(3, True), (9, True), (40, True), (70, True)]


def test_lengths_are_few_with_a_multiple():
    assert {part.tokens[1] for part in divided(64)} == {(64, True), (128, True)}
    # Together 62 % of the tokens of one padded batch, and a third without the multiple.
    assert sum(2 * part.tokens[0][0] for part in divided(64)) == 640
    assert sum(2 * part.tokens[0][0] for part in divided()) == 244


@few
@given(st.data(), st.sampled_from([2, 5, 64]), st.integers(1, 3))
def test_every_micro_batch_has_one_of_the_lengths_that_are_warmed_up(data, multiple, llms):
    longest = data.draw(st.lists(st.integers(1, 150), min_size=llms, max_size=llms))
    tokens = [data.draw(st.lists(st.integers(1, most), min_size=8, max_size=8)) for most in longest]
    lengths = lengths_of_captions(longest, multiple)
    for part in by_length(PARTS, tokens, multiple, torch.device("cpu")):
        assert tuple(length for length, _ in part.tokens) in lengths
    assert len(lengths) == len(set(lengths)) <= math.prod(-(-most // multiple) for most in longest)


def test_a_batch_that_is_done_at_once_keeps_its_order():
    (whole,) = divided(parts=[slice(0, 8)])
    assert (whole.rows, whole.tokens) == (slice(0, 8), None)


@pytest.mark.parametrize("multiple", [1, 64])
def test_trimmed_and_sorted_samples_have_the_predictions_of_the_whole_batch(multiple):
    network = random_network()
    latents, timesteps, texts = random_inputs(lengths=LENGTHS, padding=58)
    condition = Condition(timesteps, texts)
    whole = network(latents, condition)
    for part in divided(multiple):
        alone = network(latents[part.rows], part.condition(condition))
        assert torch.allclose(alone, whole[part.rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parts", [PARTS, [slice(0, 8)]], ids=["four", "one"])
@pytest.mark.parametrize("multiple", [1, 64])
def test_micro_batches_without_padding_have_the_predictions_of_the_whole_batch(multiple, parts):
    network = random_network()
    latents, timesteps, texts = random_inputs(lengths=LENGTHS, padding=58)
    condition = Condition(timesteps, texts)
    whole = network(latents, condition)
    for part in divided(multiple, parts, ragged=2):
        given = part.condition(condition)
        tokens = sum(LENGTHS[row] + texts[0].prefix for row in torch.arange(8)[part.rows].tolist())
        assert given.texts[0].states.shape[:2] == (1, tokens)
        # Means of captions are sums in fp32.
        assert torch.allclose(network(latents[part.rows], given), whole[part.rows], rtol=1e-5, atol=1e-6)
