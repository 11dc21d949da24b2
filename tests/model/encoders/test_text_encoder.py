from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.captions import dense_captions, short_captions
from benchmarks.text_encoding import ENCODERS, load_plain
from model.common.errors import UserError
from model.encoders import packed_attention, text_encoder
from model.encoders.language_model import parse_layer
from model.encoders.packed_attention import block_mask, plan_groups
from model.encoders.text_encoder import (
    TextEncoder,
    check_identity,
    config_from_identity,
    load_encoder,
    relative_error,
)
from tests.helpers import tiny_llm

CPU = torch.device("cpu")
CAPTIONS = [
    "a cat",
    "",
    "two dogs, “quoted”",
    "一只猫",
    "x",
    "a cat",
    "seven birds on a wire over the street",
]


def plain_states(module, prefix, captions, batch=16, read=lambda output: output.hidden_states[-3]):
    """Return transformers' own states of whole prompts, padded, with all blocks run."""
    by_row = {}
    order = sorted(range(len(captions)), key=lambda row: len(captions[row]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        prompts = [prefix + captions[row] for row in rows]
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
        with torch.inference_mode():
            states = read(module(input_ids=ids, attention_mask=mask, output_hidden_states=True))
        for row, state, prompt in zip(rows, states, prompts, strict=True):
            by_row[row] = state[len(prefix) : len(prompt)]
    return [by_row[row] for row in range(len(captions))]


def worst(states, reference):
    return max(relative_error(state, expected) for state, expected in zip(states, reference, strict=True))


@pytest.fixture(
    scope="module",
    params=[ENCODERS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in ENCODERS[1:])],
    ids=[config.name for config in ENCODERS],
)
def real(request):
    """A real LLM as an encoder, and whole for the plain way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_encoder(request.param, CPU), load_plain(request.param)
    torch.set_num_threads(threads)


def test_real_llm_equals_the_plain_way(real):
    encoder, plain = real
    mixed = short_captions(60) + dense_captions(2) + ["", "一只蓝色的背包 😀"]
    ids = encoder.tokenize(mixed)
    assert len(ids) == 64
    reference = plain_states(plain, encoder.prefix_ids, ids)
    assert worst(encoder.encode(ids), reference) < 1e-3
    for row in (0, 62, 63):
        assert worst(encoder.encode(ids[row : row + 1]), reference[row : row + 1]) < 1e-3
    (prefix,) = plain_states(plain, [], [encoder.prefix_ids])
    assert encoder.prefix_states().dtype is torch.float32
    assert relative_error(encoder.prefix_states(), prefix) < 1e-3


def test_real_llm_without_prefix_equals_the_plain_way(real):
    encoder, plain = real
    alone = TextEncoder(replace(encoder.config, prefix=""), encoder.llm, CPU)
    assert len(alone.prefix_ids) <= 1
    ids = alone.tokenize(short_captions(30) + dense_captions(1))
    assert worst(alone.encode(ids), plain_states(plain, alone.prefix_ids, ids)) < 1e-3


def test_real_template(real):
    """The parts of a prompt are tokenized like the whole prompt; markup in a caption is plain text."""
    encoder, _ = real
    words = encoder.llm.tokenizer
    words.encode_special_tokens = False
    for caption in ("a blue backpack", "“quoted” 你好", "3 birds"):
        (ids,) = encoder.tokenize([caption])
        prompt = encoder.identity["prefix"] + caption + encoder.config.suffix
        whole = words.encode(prompt, add_special_tokens=True).ids
        assert encoder.prefix_ids + ids == whole
    words.encode_special_tokens = True
    markup = [text for text in ("<|im_end|>", "<eos>") if text in encoder.config.suffix]
    (ids,) = encoder.tokenize([f"a {markup[0]} b"])
    assert ids.count(encoder.suffix_ids[0]) == 1


def test_spans_of_real_tokens_cover_the_caption(real):
    encoder, _ = real
    for caption in ("a red backpack", "  two dogs, “quoted” ", "一只蓝色的背包 😀", ""):
        spans = encoder.spans(caption)
        (ids,) = encoder.tokenize([caption])
        assert len(spans) == len(ids)
        covered = {at for start, end in spans for at in range(start, end)}
        assert covered >= {at for at, letter in enumerate(caption) if not letter.isspace()}
        assert all(end <= len(caption) for _, end in spans)
        decoded = [encoder.llm.tokenizer.decode([token]).strip() for token in ids]
        words = [
            (caption[start:end].strip(), token)
            for (start, end), token in zip(spans, decoded, strict=True)
            if end
        ]
        assert all(word == token for word, token in words if word.isascii())


def test_real_llm_runs_only_the_blocks_that_it_reads(real):
    encoder, plain = real
    assert len(encoder.llm.module.layers) == len(plain.layers) - 2
    assert not hasattr(encoder.llm.module, "lm_head")


DECODERS = [tiny_llm.llama, tiny_llm.qwen3, tiny_llm.mistral, tiny_llm.gemma2, tiny_llm.gemma3]


@pytest.mark.parametrize("layer", ["-3", "2", "-1", "1,-2,3", "norm_mean"])
@pytest.mark.parametrize("build", DECODERS, ids=lambda build: build.__name__)
def test_any_decoder_equals_the_plain_way(tmp_path, build, layer):
    config = tiny_llm.make(tmp_path, build, layer=layer, instruction="Say it: ", tokens_per_batch=64)
    encoder = load_encoder(config, CPU)
    torch.manual_seed(0)
    whole = build().eval()

    def read(output):
        states = output.hidden_states
        if layer == "norm_mean":
            return sum(torch.nn.functional.layer_norm(state, state.shape[-1:]) for state in states[1:]) / (
                len(states) - 1
            )
        return torch.cat([states[int(index)] for index in layer.split(",")], dim=-1)

    ids = encoder.tokenize(CAPTIONS)
    reference = plain_states(whole, encoder.prefix_ids, ids, read=read)
    assert encoder.width == reference[0].shape[1]
    assert worst(encoder.encode(ids), reference) < 1e-4
    padded = load_encoder(replace(config, reuse_prefix=False), CPU)
    assert worst(padded.encode(ids), reference) < 1e-4
    assert relative_error(padded.prefix_states(), encoder.prefix_states()) < 1e-4


@pytest.mark.parametrize("build", [tiny_llm.llama, tiny_llm.gemma2], ids=lambda build: build.__name__)
def test_rounded_lengths_change_nothing(tmp_path, monkeypatch, build):
    """On GPUs lengths are rounded up inside attention."""
    encoder = load_encoder(tiny_llm.make(tmp_path, build), CPU)
    ids = encoder.tokenize(CAPTIONS)
    exact = encoder.encode(ids)
    monkeypatch.setattr(
        text_encoder,
        "plan_groups",
        lambda lengths, step=1, device=None: plan_groups(lengths, step=8, device=device),
    )
    assert worst(encoder.encode(ids), exact) < 1e-5


def attention_by_starts(
    q, k, v, starts, key_starts, longest, longest_keys, *, scale, window_size, enable_gqa
):
    """What a GPU's kernel does, caption by caption: causal from the last key backwards, with a window."""
    assert starts.dtype == key_starts.dtype == torch.int32
    assert (starts.diff().max(), key_starts.diff().max()) == (longest, longest_keys)
    assert all(tensor.is_contiguous() for tensor in (q, k, v))
    back, ahead = window_size
    assert ahead == 0

    rows = []
    for own, read in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True):
        of_queries, of_keys = slice(*own), slice(*read)
        length, keys = own[1] - own[0], read[1] - read[0]
        distance = torch.arange(keys - length, keys)[:, None] - torch.arange(keys)
        mask = (distance >= 0) & (distance <= (keys if back < 0 else back))
        parts = [part.transpose(0, 1)[None] for part in (q[of_queries], k[of_keys], v[of_keys])]
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("instruction", ["", "Say it: "])
@pytest.mark.parametrize("build", DECODERS, ids=lambda build: build.__name__)
def test_a_gpus_kernel_gets_all_captions_at_once(tmp_path, monkeypatch, build, instruction):
    encoder = load_encoder(tiny_llm.make(tmp_path, build, instruction=instruction), CPU)
    ids, calls = encoder.tokenize(CAPTIONS), []
    expected = encoder.encode(ids)

    def counted(*arguments, **options):
        calls.append(options["window_size"])
        return attention_by_starts(*arguments, **options)

    monkeypatch.setattr(packed_attention, "has_kernel", lambda query: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    assert worst(encoder.encode(ids), expected) < 1e-4
    # One call for each block that is run; Gemma 2 bounds its scores, which the kernel does not.
    blocks = 0 if build is tiny_llm.gemma2 else len(encoder.llm.module.layers)
    assert len(calls) == blocks
    if build in (tiny_llm.mistral, tiny_llm.gemma3):
        assert any(back > 0 for back, _ in calls)


def test_states_do_not_depend_on_order_and_batch(tmp_path):
    encoder = load_encoder(tiny_llm.make(tmp_path, tiny_llm.llama, tokens_per_batch=30), CPU)
    ids = encoder.tokenize(CAPTIONS)
    together = encoder.encode(ids)
    assert [len(state) for state in together] == [len(caption) for caption in ids]
    assert worst(together, [encoder.encode([caption])[0] for caption in ids]) < 1e-5
    assert encoder.encode([]) == []
    with pytest.raises(ValueError, match="no token"):
        encoder.encode([[5], []])


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30).map(sorted),
    row_tokens=st.integers(1, 64),
    step=st.integers(1, 16),
)
def test_groups_hold_every_token_once(lengths, row_tokens, step):
    groups = plan_groups(lengths, row_tokens, step)
    at = 0
    for group in groups:
        assert group.start == at
        at += group.tokens
        slots = group.rows * group.captions * group.length
        assert group.captions * group.length <= max(row_tokens, group.length)
        if group.inverse is None:
            assert slots == group.tokens
        else:
            assert group.index.shape == (slots,)
            assert group.index[group.inverse].tolist() == list(range(group.start, at))
    assert at == sum(lengths)
    # Moved to a device by one copy: all indices are parts of one tensor.
    moved = plan_groups(lengths, row_tokens, step, device=CPU)
    indices = [each for group in moved for each in (group.index, group.inverse) if each is not None]
    assert len({each.untyped_storage().data_ptr() for each in indices}) <= 1
    for group, other in zip(groups, moved, strict=True):
        assert replace(group, index=None, inverse=None) == replace(other, index=None, inverse=None)
        if group.index is not None:
            assert torch.equal(group.index, other.index)
            assert torch.equal(group.inverse, other.inverse)
    assert sum(group.rows * group.captions for group in groups) == len(lengths)


@settings(max_examples=50, deadline=None)
@given(
    captions=st.integers(1, 4),
    length=st.integers(1, 6),
    prefix=st.integers(0, 5),
    window=st.none() | st.integers(1, 8),
)
def test_mask_shows_the_prefix_and_itself(captions, length, prefix, window):
    mask = block_mask(captions, length, prefix, window, CPU)
    assert mask.shape == (captions * length, prefix + captions * length)
    for row in range(captions * length):
        own, position = row // length, prefix + row % length
        for column in range(prefix + captions * length):
            inside = column < prefix or (column - prefix) // length == own
            key = column if column < prefix else prefix + (column - prefix) % length
            assert mask[row, column] == (inside and 0 <= position - key < (window or 99))


def test_language_model_inside_a_multimodal_checkpoint(tmp_path):
    encoder = load_encoder(tiny_llm.make(tmp_path, tiny_llm.llava), CPU)
    assert type(encoder.llm.module).__name__ == "LlamaModel"
    torch.manual_seed(0)
    whole = tiny_llm.llava().model.language_model.eval()
    ids = encoder.tokenize(CAPTIONS)
    assert worst(encoder.encode(ids), plain_states(whole, encoder.prefix_ids, ids)) < 1e-4


@pytest.mark.parametrize(("build", "kind"), [(tiny_llm.t5, "t5"), (tiny_llm.clip, "clip")])
def test_encoders_that_are_not_causal_llms(tmp_path, build, kind):
    words = tiny_llm.tokenizer("<bos>" if kind == "clip" else "", "<eos>")
    plain = {"encoder": kind, "prefix": "", "suffix": "", "reuse_prefix": False, "max_tokens": 60}
    config = tiny_llm.make(tmp_path, build, words, layer="-1", **plain)
    with pytest.raises(UserError, match="reuse_prefix: false"):
        load_encoder(replace(config, reuse_prefix=True), CPU)
    torch.manual_seed(0)
    whole = build().eval()
    for layer, read in {
        "-1": lambda output: output.last_hidden_state,
        "-2": lambda output: output.hidden_states[-2],
    }.items():
        encoder = load_encoder(replace(config, layer=layer), CPU)
        assert encoder.prefix_states().shape == (0, encoder.width)
        ids = encoder.tokenize(CAPTIONS)
        assert {caption[-1] for caption in ids} == {2}  # <eos>
        reference = plain_states(whole, encoder.prompt_ids, ids, read=read)
        assert worst(encoder.encode(ids), reference) < 1e-4


def test_long_captions_are_cut_and_counted(tmp_path):
    encoder = load_encoder(tiny_llm.make(tmp_path, tiny_llm.llama, max_tokens=8), CPU)
    short, long = encoder.tokenize(["abc", "abcdefghijk"])
    assert len(long) == 8
    assert long[-1] == short[-1] == 3  # <end>
    assert encoder.truncated == 1


def test_counts(tmp_path):
    """Work done and work saved add up to the work of whole padded prompts."""
    encoder = load_encoder(tiny_llm.make(tmp_path, tiny_llm.llama), CPU)
    ids = encoder.tokenize(CAPTIONS)
    encoder.encode(ids)
    counts, prefix = encoder.counts, len(encoder.prefix_ids)
    assert counts["tokens_run"] == sum(map(len, ids))
    assert counts["prefix_tokens_saved"] == prefix * len(ids)
    plain = 5 * len(ids) * (prefix + max(map(len, ids)))
    assert sum(count for name, count in counts.items() if name.startswith("block_tokens")) == plain
    assert counts["block_tokens_run"] == 3 * counts["tokens_run"]


def test_identity_rebuilds_the_encoder(tmp_path):
    config = tiny_llm.make(tmp_path, tiny_llm.llama, quantisation="int4", max_tokens=33)
    encoder = load_encoder(config, CPU)
    again = load_encoder(config_from_identity(encoder.identity), CPU)
    assert again.identity == encoder.identity
    check_identity(again, "f", encoder.identity)
    other = load_encoder(replace(config, layer="2", suffix="<eos>"), CPU)
    with pytest.raises(UserError, match=r"layer.*suffix"):
        check_identity(other, "f", encoder.identity)


def test_other_weights_are_another_identity(tmp_path):
    config = tiny_llm.make(tmp_path / "a", tiny_llm.llama)
    first = load_encoder(config, CPU).identity["weights"]
    torch.manual_seed(1)
    tiny_llm.save(tmp_path / "a", tiny_llm.llama())
    assert load_encoder(config, CPU).identity["weights"] != first


def test_bf16_states(tmp_path):
    config = tiny_llm.make(tmp_path, tiny_llm.llama)
    exact, rounded = load_encoder(config, CPU), load_encoder(replace(config, dtype="bf16"), CPU)
    ids = exact.tokenize(CAPTIONS)
    states = rounded.encode(ids)
    assert {state.dtype for state in states} == {torch.bfloat16}
    assert worst(states, exact.encode(ids)) < 0.1


def test_huge_states_survive(tmp_path):
    """Gemma's states exceed 1e5, which fp16 cannot represent, so nothing on the way may be fp16."""
    config = tiny_llm.make(tmp_path, tiny_llm.llama, dtype="bf16")
    llm = load_encoder(config, CPU).llm
    with torch.no_grad():
        llm.module.embed_tokens.weight.mul_(1e6)
    encoder = TextEncoder(config, llm, CPU)
    (states,) = encoder.encode(encoder.tokenize(["a cat"]))
    assert torch.isfinite(states).all()
    assert states.abs().max() > 1e5


@pytest.mark.parametrize("layer", ["0", "6", "-6", "x", "1,,2", ""])
def test_layers_that_do_not_exist(layer):
    with pytest.raises(UserError, match=r"text\.layer"):
        parse_layer(layer, 5)


@pytest.mark.parametrize(
    "build", [tiny_llm.llama, tiny_llm.gemma3, tiny_llm.llava], ids=lambda build: build.__name__
)
@pytest.mark.parametrize("layer", ["-2", "norm_mean"])
def test_a_model_on_several_devices_gives_the_same_states(tmp_path, build, layer):
    """accelerate's dispatch: here every other block is on disk and is loaded when it is run."""
    config = tiny_llm.make(tmp_path, build, layer=layer)
    whole = load_encoder(config, CPU)
    ids = whole.tokenize(CAPTIONS)
    inside = "language_model." if build is tiny_llm.llava else ""
    pieces = {f"{inside}layers.{block}": "disk" if block % 2 else "cpu" for block in range(5)}
    pieces |= {f"{inside}{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    if inside:
        pieces |= {"vision_tower": "cpu", "multi_modal_projector": "disk"}
    for device_map in ("auto", pieces):
        offloaded = load_encoder(replace(config, device_map=device_map), CPU)
        assert ("meta" in {weights.device.type for weights in offloaded.llm.module.parameters()}) == (
            device_map is pieces
        )
        assert offloaded.device == CPU
        assert worst(offloaded.encode(ids), whole.encode(ids)) < 1e-6
        assert offloaded.identity == whole.identity


def test_models_that_cannot_be_packed_are_refused(tmp_path):
    config = tiny_llm.make(tmp_path, lambda: tiny_llm.gemma3(bidirectional=True))
    with pytest.raises(UserError, match="not purely causal"):
        load_encoder(config, CPU)
    load_encoder(replace(config, reuse_prefix=False), CPU)


def test_wrong_use_is_named(tmp_path):
    config = tiny_llm.make(tmp_path / "good", tiny_llm.llama)
    cases = {
        "no token": replace(config, suffix="", prefix="<bos>"),
        "leaves no token": replace(config, max_tokens=1),
        "not a T5": replace(config, encoder="t5", reuse_prefix=False),
        "no such folder": replace(config, llm=str(tmp_path / "missing")),
        "commit hash": replace(config, llm="org/model", revision="main"),
        "at most 512": replace(config, max_tokens=600),
        "cannot load it": replace(config, device_map="everywhere"),
        "read to one device": replace(ENCODERS[0], device_map="auto"),
    }
    for message, wrong in cases.items():
        with pytest.raises(UserError, match=message):
            load_encoder(wrong, CPU)


def test_a_prefix_that_merges_with_the_caption_is_refused(real):
    encoder, _ = real
    with pytest.raises(UserError, match="merges with the caption"):
        TextEncoder(replace(encoder.config, prefix="Describe w"), encoder.llm, CPU)


def test_pickled_weights_are_refused(tmp_path):
    tiny_llm.save(tmp_path, tiny_llm.llama(), safe=False)
    with pytest.raises(UserError, match=r"pickled: only safetensors"):
        load_encoder(replace(ENCODERS[0], llm=str(tmp_path)), CPU)


def test_the_plain_way_needs_a_padding_token(tmp_path):
    config = tiny_llm.make(tmp_path, tiny_llm.llama, tiny_llm.tokenizer("<bos>", pad=False))
    encoder = load_encoder(replace(config, reuse_prefix=False), CPU)
    with pytest.raises(UserError, match="padding token"):
        encoder.encode(encoder.tokenize(["a", "abc"]))
    packed = load_encoder(config, CPU)
    packed.encode(packed.tokenize(["a", "abc"]))
