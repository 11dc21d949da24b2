"""From packed captions to what the network reads: prefix, null caption, padding, standardisation."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.encoders.quantize import quantize
from pipeline.text.texts import PackedText, TextConstants, text_from_states, to_text

WIDTH = 6


def make_constants(quantization="int8", prefix=3, null=2):
    draw = torch.Generator().manual_seed(1)
    mean, std = torch.randn(WIDTH, generator=draw) * 10, torch.rand(WIDTH, generator=draw) + 0.5
    states = [torch.randn(count, WIDTH, generator=draw) for count in (prefix, null)]
    return TextConstants(*states, mean, std, quantization, WIDTH)


def make_states(counts, constants):
    draw = torch.Generator().manual_seed(2)
    return [
        torch.randn(count, WIDTH, generator=draw) * constants.std + constants.mean if count else None
        for count in counts
    ]


def pack(states, constants):
    raw = torch.cat(
        [constants.mean.new_zeros(0, WIDTH), *(caption for caption in states if caption is not None)]
    )
    values, scales, _ = quantize(raw, constants.quantization, constants.mean, constants.std)
    counts = [0 if caption is None else len(caption) for caption in states]
    return PackedText(values, scales, torch.tensor(counts, dtype=torch.int32))


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(COUNTS, st.sampled_from(["int8", "bf16"]), st.integers(0, 3), st.integers(1, 4))
def test_each_caption_stands_behind_its_prefix(counts, quantization, prefix, null):
    constants = make_constants(quantization, prefix, null)
    states = make_states(counts, constants)
    text = to_text(pack(states, constants), constants, torch.float32)
    lengths = [count or null for count in counts]
    assert text.states.shape == (len(counts), prefix + max(lengths), WIDTH)
    assert text.prefix == prefix
    assert text.padded == (min(lengths) < max(lengths))
    for row, (caption, length) in enumerate(zip(states, lengths, strict=True)):
        assert text.mask[row].tolist() == [
            position < prefix + length for position in range(text.mask.shape[1])
        ]
        assert torch.equal(text.states[row, :prefix], constants.prefix)
        expected = constants.null if caption is None else (caption - constants.mean) / constants.std
        torch.testing.assert_close(text.states[row, prefix : prefix + length], expected, atol=0.08, rtol=0.02)
        assert not text.states[row, prefix + length :].any()


@settings(max_examples=40, deadline=None)
@given(COUNTS)
def test_stored_and_fresh_states_give_the_same_text(counts):
    constants = make_constants("bf16")
    states = [
        None if caption is None else caption.bfloat16().float() for caption in make_states(counts, constants)
    ]
    stored, fresh = (
        to_text(pack(states, constants), constants, torch.float32),
        text_from_states(states, constants, torch.float32),
    )
    torch.testing.assert_close(stored.states, fresh.states)
    assert torch.equal(stored.mask, fresh.mask)
    assert (stored.prefix, stored.padded) == (fresh.prefix, fresh.padded)


def test_a_caption_does_not_depend_on_its_batch():
    constants = make_constants()
    states = make_states([4, 9, 0], constants)
    together, alone = (
        to_text(pack(states, constants), constants, torch.bfloat16),
        to_text(pack(states[:1], constants), constants, torch.bfloat16),
    )
    assert torch.equal(together.states[0, : 3 + 4], alone.states[0])
    assert together.states.dtype == torch.bfloat16


def test_lengths_known_on_the_host_change_nothing():
    constants = make_constants()
    packed = pack(make_states([4, 0, 2], constants), constants)
    known = PackedText(packed.values, packed.scales, packed.lengths, [4, 0, 2])
    assert torch.equal(
        to_text(packed, constants, torch.float32).states, to_text(known, constants, torch.float32).states
    )
