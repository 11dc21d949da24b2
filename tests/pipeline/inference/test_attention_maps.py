"""Attention per word: the weights are those of the forward pass, and belong to the right words."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.config import FusionConfig
from model.functional import key_mask
from model.layers import CrossAttention
from pipeline.inference.attention_maps import (
    WORD,
    attention_to_tokens,
    overlay,
    recorded_attention,
    sum_over_words,
)
from pipeline.inference.sampler import SamplingParams
from tests.helpers.tiny_sampler import make_network, make_sampler

DRAWING = SamplingParams(steps=3, guidance=3.0, height=16, width=24)


@given(st.integers(0, 2**30), st.booleans())
@settings(deadline=None, max_examples=10)
def test_the_weights_are_those_that_forward_uses(seed, masked):
    torch.manual_seed(seed)
    layer = CrossAttention(12, 3)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    mask = key_mask(torch.arange(7) < torch.tensor([[4], [7]])) if masked else None
    weights = layer.weights(x, context, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    values = layer.key_value(context).unflatten(-1, (2, 3, -1))[:, :, 1]  # [B, T, H, d]
    mixed = torch.einsum("bhst,bthd->bshd", weights, values).flatten(2)
    torch.testing.assert_close(layer.out(mixed), layer(x, context, mask), atol=1e-5, rtol=1e-4)


def test_looking_leaves_the_network_as_it_was():
    sampler = make_sampler()
    condition = sampler.condition(["a red cat"], DRAWING).at(0.5)
    latents = torch.randn(1, 16, 4, 6)
    before = sampler.network(latents, condition)
    shares = attention_to_tokens(sampler.network, latents, condition)
    assert shares.shape == (4, 6, 2 * len("a red cat"))
    torch.testing.assert_close(shares.sum(-1), torch.ones(4, 6))
    with recorded_attention(sampler.network) as seen:
        assert torch.equal(sampler.network(latents, condition), before)
    assert len(seen) == 2
    sampler.network(latents, condition)
    assert len(seen) == 2


def test_a_failure_inside_removes_the_hooks():
    network = make_network(FusionConfig(families=["first"], mode="none", width=16, heads=2))
    with pytest.raises(RuntimeError, match="inside"), recorded_attention(network):
        raise RuntimeError("inside")
    assert not any(block.cross_attention._forward_pre_hooks for block in network.blocks)


@given(st.text("abé ,.'-猫", max_size=20))
@settings(deadline=None, max_examples=30)
def test_each_words_tokens_are_summed_over_all_llms(prompt):
    letters = [(place, place + 1) for place in range(len(prompt))]
    pairs = [(place, min(place + 2, len(prompt))) for place in range(0, len(prompt), 2)]
    suffix = [(0, 0)]
    tokens = len(letters) + len(pairs) + 2
    maps = sum_over_words(
        prompt, [letters + suffix, pairs + suffix], torch.eye(tokens).view(1, tokens, tokens)
    )
    assert [each.word for each in maps] == WORD.findall(prompt)
    for match, each in zip(WORD.finditer(prompt), maps, strict=True):
        counted = {at for at, place in enumerate(letters) if match.start() <= place[0] < match.end()}
        counted |= {
            len(letters) + 1 + at for at, (a, b) in enumerate(pairs) if a < match.end() and b > match.start()
        }
        assert set(each.shares.flatten().nonzero().flatten().tolist()) == counted


def test_a_family_that_reads_the_null_caption_belongs_to_no_word():
    sampler = make_sampler()
    _, whole = sampler.latents_and_words(["a cat"], [1], DRAWING, 1)
    _, halved = sampler.latents_and_words(
        ["a cat"], [1], SamplingParams(**{**vars(DRAWING), "without": ("second",)}), 1
    )
    assert [each.word for each in whole] == [each.word for each in halved] == ["a", "cat"]
    assert sum(each.shares.mean() for each in whole) == pytest.approx(
        1 - 2 / 10, abs=0.15
    )  # the space is one token of five
    assert all(each.shares.mean() > 0 for each in halved)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_chosen_step_sees_the_latents_that_the_network_saw_then(step):
    sampler = make_sampler()
    seen = []
    network = sampler.network
    handle = network.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0][:1].clone(), inputs[1].timesteps[:1].clone()))
    )
    sampler.latents_and_words(["a red cat", "tea"], [4, 5], DRAWING, step)
    handle.remove()
    *during, (latents, time) = (
        seen  # on a CPU a pass of the network is one image: in each step the first, then the second
    )
    of_first = during[0::2]
    assert torch.equal(latents, of_first[step - 1][0])
    assert torch.equal(time, of_first[step - 1][1])


def test_the_brightest_place_of_an_overlay_is_where_most_attention_is():
    shares = torch.zeros(4, 6)
    shares[1, 4] = 0.5
    image = overlay(Image.new("RGB", (24, 16), "grey"), shares)
    assert image.size == (256, 171)
    bright = torch.tensor(list(image.convert("L").getdata())).view(171, 256).float()
    row, column = divmod(int(bright.argmax()), 256)
    assert abs(row / 171 - 1.5 / 4) < 0.08
    assert abs(column / 256 - 4.5 / 6) < 0.08
    overlay(Image.new("RGB", (24, 16)), torch.ones(4, 6))  # all alike: nothing to divide by
