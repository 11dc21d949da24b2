"""Language models and tokenizers that people use as text encoders: right states, or one line."""

from functools import partial

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomModel,
    GptOssConfig,
    GptOssModel,
    MambaConfig,
    MambaModel,
    OPTConfig,
    OPTModel,
)

from model.common.errors import UserError
from model.encoders.text_encoder import load_encoder, relative_error, without_added_space
from tests.helpers import tiny_llm

CPU = torch.device("cpu")
PREFIXES = [
    "{instruction} ",
    "[INST] {instruction}\n",
    "{instruction}",
    "[INST] {instruction} ",
    "[INST]\n</s>",
]
SIZES = {"vocab_size": 300, "hidden_size": 48}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prompts_of_a_tokenizer_that_adds_a_space_are_those_of_the_whole_text(tmp_path, legacy, prefix):
    """SentencePiece puts a space before a text, which is right before a prompt and wrong inside of it."""
    words = tiny_llm.sentencepiece(legacy)
    template = {"suffix": " [/INST]", "prefix": prefix, "instruction": "Describe:"}
    config = tiny_llm.make(tmp_path, partial(tiny_llm.llama, vocab_size=400), words, **template)
    encoder = load_encoder(config, CPU)
    for caption in ("a red cube", "red", "7  cubes, Ä"):
        (ids,) = encoder.tokenize([caption])
        text = prefix.replace("{instruction}", "Describe:") + caption
        prompt = encoder.prompt_ids + ids[: len(ids) - len(encoder.suffix_ids)]
        assert prompt == words(text)["input_ids"]

        covered = encoder.spans(caption)[: len(ids) - len(encoder.suffix_ids)]
        assert "".join(caption[start:end] for start, end in dict.fromkeys(covered)).split() == caption.split()
        (states,), (plain,) = encoder.encode([ids]), encoder._encode_padded([ids], pad=0)
        assert relative_error(states, plain) < 1e-4


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_without_the_added_space_is_the_same_but_for_it(legacy):
    backend = tiny_llm.sentencepiece(legacy).backend_tokenizer
    continuing = without_added_space(backend)
    for text in ("a red cube", "Ä  7", "</s>a"):
        expected = backend.encode("x" + text, add_special_tokens=False).ids[2:]
        if not (legacy and text.startswith("</s>")):
            assert continuing.encode(text, add_special_tokens=False).ids == expected
    spaced = tiny_llm.tokenizer().backend_tokenizer
    assert without_added_space(spaced).encode("a b").ids == spaced.encode("a b").ids


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: BloomModel(BloomConfig(**SIZES, n_layer=5, n_head=4)), "a BloomModel does not take packed"),
        (lambda: MambaModel(MambaConfig(**SIZES, num_hidden_layers=5)), "a MambaModel does not take packed"),
        (
            lambda: OPTModel(OPTConfig(**SIZES, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=48)),
            "its blocks were not found",
        ),
        (
            lambda: GptOssModel(
                GptOssConfig(**tiny_llm.SIZES, sliding_window=8, num_local_experts=2, num_experts_per_tok=1)
            ),
            "such as sinks: set reuse_prefix: false",
        ),
    ],
)
def test_models_that_take_no_packed_captions_are_one_line(tmp_path, build, says):
    with pytest.raises(UserError, match=says):
        load_encoder(tiny_llm.make(tmp_path, build), CPU)
