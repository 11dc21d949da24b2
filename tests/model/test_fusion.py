from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.common.errors import UserError
from model.config import FusionConfig
from model.fusion import TextFusion
from tests.helpers.networks import (
    SMALL,
    SWITCHES,
    WIDTHS,
    close,
    few,
    normal,
    random_inputs,
    random_text,
    randomise,
)

every_switch = pytest.mark.parametrize(("config", "llms"), SWITCHES.values(), ids=SWITCHES)


def fusion(config, llms, seed=0):
    return randomise(TextFusion(config, WIDTHS[:llms], SMALL), seed)


@every_switch
def test_prefix_tokens_influence_the_output_and_are_absent_from_it(config, llms):
    fuse, time = fusion(config, llms), normal(2, 32)
    _, _, texts = random_inputs(llms)
    tokens, mask, pooled = fuse(texts, time)
    assert tokens.shape == (2, 4 * llms, 32)
    assert mask.tolist() == [[True] * 4 * llms, [True, True, False, False] * llms]
    assert pooled.shape == (2, 32)
    for text in texts:
        text.states = text.states.clone()
        text.states[:, : text.prefix] *= normal(text.prefix, 1, seed=9)
    changed, _, changed_pooled = fuse(texts, time)
    refined = config.crop == "after" and (
        config.refiner != "none" or (llms > 1 and config.mode == "collaborative")
    )
    assert close(changed, tokens) == (not refined and config.pool != "all")
    assert close(changed_pooled, pooled) == (config.pool != "all")


@every_switch
@pytest.mark.parametrize("lengths", [(1, 5, 3), (4, 4, 4)])
def test_padding_changes_nothing(config, llms, lengths):
    fuse, time = fusion(config, llms), normal(3, 32)
    _, _, texts = random_inputs(llms, lengths, padding=3, fill=float("nan"))
    tokens, mask, pooled = fuse(texts, time)
    assert not pooled.isnan().any()
    for row, length in enumerate(lengths):
        alone = [random_text(WIDTHS[i], [length], i + 2) for i in range(llms)]
        for text, source in zip(alone, texts, strict=True):
            text.states = source.states[row : row + 1, : source.prefix + length]
            text.padded = False
        wanted, all_tokens, wanted_pooled = fuse(alone, time[row : row + 1])
        assert all_tokens.all()
        assert close(tokens[row][mask[row]], wanted[0])
        assert close(pooled[row], wanted_pooled[0])


@few
@given(st.integers(0, 6), st.floats(0.01, 1000))
def test_the_size_of_a_state_does_not_matter(position, factor):
    fuse, time = fusion(FusionConfig(), 2), normal(1, 32)
    _, _, texts = random_inputs(lengths=(5,))
    before = fuse(texts, time)[0]
    texts[0].states[:, position] *= factor
    assert torch.allclose(fuse(texts, time)[0], before, rtol=1e-2, atol=1e-2)


@every_switch
def test_a_caption_without_tokens_gives_numbers(config, llms):
    fuse = fusion(config, llms).train()
    _, _, texts = random_inputs(llms, lengths=(3, 0))
    texts[0].mask[1] = False
    tokens, _, pooled = fuse(texts, normal(2, 32))
    (tokens.square().sum() + pooled.square().sum()).backward()
    assert tokens.isfinite().all()
    assert all(
        parameter.grad.isfinite().all() for parameter in fuse.parameters() if parameter.grad is not None
    )


@pytest.mark.parametrize("time", [True, False])
def test_time_enters_where_it_is_asked_for(time):
    fuse = fusion(FusionConfig(time=time), 2)
    _, _, texts = random_inputs()
    assert close(fuse(texts, normal(2, 32))[0], fuse(texts, normal(2, 32, seed=1))[0]) == (not time)


def test_without_pooled_text_the_condition_has_nothing_of_the_caption():
    fuse = fusion(FusionConfig(pool="none", width=16, heads=4), 2)
    _, _, texts = random_inputs()
    tokens, _, pooled = fuse(texts, normal(2, 32))
    assert pooled.shape == (2, 32)
    assert not pooled.any()
    assert tokens.abs().sum() > 0
    assert not any("pool" in name for name, _ in fuse.named_parameters())


def test_one_llm_has_no_collaborative_refiner():
    assert fusion(FusionConfig(), 1).collaborative is None
    assert fusion(FusionConfig(), 2).collaborative is not None


def test_both_llms_reach_each_other_only_by_collaboration():
    for mode in ("concat", "collaborative"):
        fuse, time = fusion(FusionConfig(mode=mode), 2), normal(2, 32)
        _, _, texts = random_inputs()
        before = fuse(texts, time)[0][:, 4:]
        texts[0].states = texts[0].states + normal(*texts[0].states.shape, seed=4)
        assert close(fuse(texts, time)[0][:, 4:], before) == (mode == "concat")


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="families is empty"):
        TextFusion(FusionConfig(), [], SMALL)
    with pytest.raises(UserError, match="mode=none takes one LLM, not 2"):
        TextFusion(FusionConfig(mode="none"), [8, 8], SMALL)
    with pytest.raises(UserError, match=r"width=30 is not a multiple of fusion\.heads=4"):
        TextFusion(FusionConfig(width=30, heads=4), [8], replace(SMALL))
    with pytest.raises(ValueError, match="1 texts for a network of 2 LLMs"):
        fusion(FusionConfig(), 2)(random_inputs(1)[2], normal(2, 32))
