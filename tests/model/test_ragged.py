"""Ragged text: the predictions and gradients of padded text, without the work on padding."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from model.condition import Condition
from model.functional import attention, key_mask
from model.ragged import Joint, Rows, cut_front, mean_of_samples, ragged_attention
from model.region import Region
from pipeline.engine.compile import compile_regions, make_graphs
from tests.helpers.networks import SWITCHES, WIDTHS, few, normal, random_inputs, random_network, random_text

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def rows_of(lengths, more=0):
    return Rows.of_lengths(torch.tensor(lengths), sum(lengths), max(lengths) + more)


def without_padding(text):
    return text.without_padding(int(text.mask.sum()))


def random_texts(llms, batch, seed):
    """Texts whose captions have other lengths for each LLM."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for llm in range(llms):
        lengths = torch.randint(1, 9, (batch,), generator=generator).tolist()
        texts.append(random_text(WIDTHS[llm], lengths, prefix=llm + 2, padding=llm, seed=seed + llm))
    return texts


@few
@given(LENGTHS, st.integers(0, 3), st.integers(0, 2))
def test_tokens_are_padded_cut_and_joined_as_padded_ones(lengths, more, first):
    lengths = [length + first for length in lengths]
    rows, tokens = rows_of(lengths, more), normal(1, sum(lengths), 3)
    padded, mask = rows.pad(tokens), rows.shown[:, 0, 0]
    assert mask.sum(dim=1).tolist() == lengths == rows.lengths.tolist()
    assert torch.equal(rows.unpad(padded), tokens)
    assert torch.equal(padded[mask], tokens[0])
    assert padded[~mask].abs().sum() == 0

    cut, left = cut_front(tokens, rows, first)
    expected, kept = cut_front(padded, mask, first)
    assert torch.equal(left.pad(cut), expected)
    assert torch.equal(left.shown[:, 0, 0], kept)

    torch.testing.assert_close(mean_of_samples(tokens, rows, first), mean_of_samples(padded, mask, first))

    others = rows_of(lengths[::-1])
    more_tokens = normal(1, sum(lengths), 3, seed=1)
    joint = Joint.of([rows, others])
    both = joint.tokens([tokens, more_tokens])
    ends, other_ends = torch.tensor(lengths).cumsum(0), torch.tensor(lengths[::-1]).cumsum(0)
    expected = []
    for sample, (length, other) in enumerate(zip(lengths, lengths[::-1], strict=True)):
        expected.append(tokens[0, ends[sample] - length : ends[sample]])
        expected.append(more_tokens[0, other_ends[sample] - other : other_ends[sample]])
    assert torch.equal(both[0], torch.cat(expected))


@pytest.mark.parametrize("causal", [False, True])
@few
@given(LENGTHS, st.integers(0, 2))
def test_attention_over_rows_is_that_over_each_sample(causal, lengths, first):
    lengths = [length + first for length in lengths]
    keys = rows_of(lengths, more=1)
    q, k, v = (normal(1, sum(lengths), 2, 4, seed=seed) for seed in range(3))
    kept, queries = keys.after(first)
    out = ragged_attention(q[:, kept], k, v, queries, keys, causal)

    start, expected = 0, []
    for length in lengths:
        own = slice(start, start + length)
        expected.append(attention(q[:, own][:, first:], k[:, own], v[:, own], None, causal))
        start += length
    torch.testing.assert_close(out, torch.cat(expected, dim=1))


def test_attention_of_patches_to_rows_is_that_to_padded_keys():
    keys = rows_of([3, 1, 5], more=2)
    q, k, v = normal(3, 4, 2, 4), normal(1, 9, 2, 4, seed=1), normal(1, 9, 2, 4, seed=2)
    expected = attention(q, keys.pad(k), keys.pad(v), key_mask(keys.shown[:, 0, 0]))
    torch.testing.assert_close(ragged_attention(q, k, v, None, keys), expected)


def attention_by_starts(q, k, v, of_queries, of_keys, longest_query, longest_key):
    """What a GPU's kernel does, row by row: q [M, H, d], k and v [N, H, d], and where each sample begins."""
    assert of_queries.dtype == of_keys.dtype == torch.int32
    assert of_queries.diff().max() <= longest_query
    assert of_keys.diff().max() <= longest_key
    rows = []
    for sample in range(len(of_queries) - 1):
        own = slice(of_queries[sample], of_queries[sample + 1])
        read = slice(of_keys[sample], of_keys[sample + 1])
        out = attention(q[None, own], k[None, read], v[None, read])
        rows.append(out.unflatten(-1, q.shape[1:])[0])
    return torch.cat(rows)


@pytest.mark.parametrize("llms", [1, 2, 3])
def test_a_gpus_kernel_gets_the_tokens_of_each_sample(monkeypatch, llms):
    network = random_network(llms=llms)
    latents, times, _ = random_inputs(llms, lengths=(1, 1, 1))
    texts = random_texts(llms, 3, seed=llms)
    expected = network(latents, Condition(times, texts))
    monkeypatch.setattr("model.ragged.has_kernel", lambda q: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attention_by_starts)
    prediction = network(latents, Condition(times, list(map(without_padding, texts))))
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SWITCHES)
def test_predictions_and_gradients_are_those_of_padded_text(name):
    fusion, llms = SWITCHES[name]
    network, batch = random_network(fusion, llms).train(), 3
    latents, times, _ = random_inputs(llms, lengths=(1,) * batch)
    texts = random_texts(llms, batch, seed=llms)

    results = []
    for given_texts in (texts, [without_padding(text) for text in texts]):
        network.zero_grad()
        prediction = network(latents, Condition(times, given_texts))
        prediction.square().mean().backward()
        gradients = {key: value.grad for key, value in network.named_parameters() if value.grad is not None}
        results.append((prediction, gradients))

    (expected, slopes), (ragged, own) = results
    assert own.keys() == slopes.keys()
    # Means of captions are summed in fp32 whatever the network's type is, here in another order.
    torch.testing.assert_close(ragged, expected, rtol=1e-4, atol=1e-6)
    for key, slope in slopes.items():
        torch.testing.assert_close(own[key], slope, rtol=1e-4, atol=1e-6, msg=key)


def test_the_pooled_text_of_an_llm_stays_padded():
    fusion = replace(SWITCHES["collaborative_three"][0], families=["a", "b", "c"], pooled=1)
    network = random_network(fusion, 3)
    latents, times, _ = random_inputs(3, lengths=(1, 1))
    texts = random_texts(3, 2, seed=0)
    given_texts = [*map(without_padding, texts[:2]), texts[2]]
    expected = network(latents, Condition(times, texts))
    torch.testing.assert_close(network(latents, Condition(times, given_texts)), expected)


def test_products_of_matrices_do_not_grow_with_the_padding():
    network = random_network()
    latents, times, _ = random_inputs(lengths=(1, 1))

    def products(padding, ragged):
        texts = [random_text(width, (9, 2), padding=padding, seed=1) for width in WIDTHS[:2]]
        texts = [without_padding(text) for text in texts] if ragged else texts
        with FlopCounterMode(display=False) as counter:
            network(latents, Condition(times, texts))
        counts = counter.get_flop_counts()["Global"]
        return sum(count for kind, count in counts.items() if "mm" in str(kind))

    assert products(0, ragged=True) == products(50, ragged=True) < products(0, ragged=False)
    assert products(50, ragged=False) > 1.5 * products(0, ragged=False)


@pytest.mark.parametrize("llms", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_compiled_regions_have_a_graph_for_all_lengths(monkeypatch, llms):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network, plain = (random_network(llms=llms).train() for _ in range(2))
    regions = [part for part in network.modules() if isinstance(part, Region)]
    compile_regions(regions)
    cuts = [2] if llms == 1 else []
    for region in {type(region): region for region in regions}.values():
        make_graphs(region, 2, (2, 3), cuts, ragged=True)
    counters = torch._dynamo.utils.counters
    made = counters["stats"]["unique_graphs"]
    # Each kind of block; a token refiner alone also cuts the prefix in its last block.
    assert made == 3

    latents, times, _ = random_inputs(llms, lengths=(1, 1))
    for seed in range(4):
        texts = list(map(without_padding, random_texts(llms, 2, seed)))
        prediction = network(latents, Condition(times, texts))
        prediction.sum().backward()
        torch.testing.assert_close(prediction, plain(latents, Condition(times, texts)))
    assert counters["stats"]["unique_graphs"] == made
    assert sum(counters["graph_break"].values()) == 0
