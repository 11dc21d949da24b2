"""Random language models of a few thousand weights, saved as transformers saves real ones."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from model.config import TextConfig

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
WINDOW = {"sliding_window": 6}


def llama(**changes):
    return LlamaModel(LlamaConfig(**{**SIZES, **changes}))


def qwen3():
    return Qwen3Model(Qwen3Config(**SIZES))


def mistral():
    """A model in which every layer attends over a sliding window."""
    return MistralModel(MistralConfig(**SIZES, **WINDOW))


def gemma2():
    """A model with alternating layers with and without a window, and capped scores."""
    settings = Gemma2Config(
        **SIZES, **WINDOW, query_pre_attn_scalar=12, attn_logit_softcapping=2.0, attn_implementation="eager"
    )
    return Gemma2Model(settings)


def gemma3(bidirectional=False):
    config = Gemma3TextConfig(**SIZES, **WINDOW, query_pre_attn_scalar=12)
    config.use_bidirectional_attention = bidirectional
    return Gemma3TextModel(config)


def llava():
    """A language model inside a multimodal checkpoint."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28
    )
    settings = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=299)
    return LlavaForConditionalGeneration(settings)


def t5():
    return T5EncoderModel(T5Config(vocab_size=300, d_model=48, d_kv=12, d_ff=64, num_layers=4, num_heads=4))


def clip():
    sizes = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    return CLIPTextModel(
        CLIPTextConfig(**{**sizes, "max_position_embeddings": 77, "bos_token_id": 1, "eos_token_id": 2})
    )


def tokenizer(before="", after="", pad=True):
    """A byte-level tokenizer without merges: one token per byte, and four special ones."""
    special = ["<pad>", "<bos>", "<eos>", "<end>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(special + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    template = [(token, special.index(token)) for token in (before, after) if token]
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=template
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **({"pad_token": "<pad>"} if pad else {}))


def sentencepiece(legacy):
    """Llama 2's kind of tokenizer, which puts a space before every text; in its older form, before every
    piece between special tokens."""
    letters = sorted({chr(code) for code in range(33, 127)})
    merges = [("▁", "a"), ("▁", "r"), ("▁r", "e"), ("▁re", "d"), ("▁", "t"), ("▁", "D"), ("▁", "[")]
    pieces = ["<unk>", "<s>", "</s>", "▁", *letters, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def save(folder, module, words=None, safe=True):
    """Write model and tokenizer to `folder`."""
    module.save_pretrained(folder, safe_serialization=safe)
    (words or tokenizer("<bos>")).save_pretrained(folder)
    return str(folder)


def make(folder, build, words=None, **settings):
    """Save a random model, and return the settings that read it."""
    torch.manual_seed(0)
    save(folder, build(), words)
    return TextConfig(**{"name": "tiny", "llm": str(folder), "suffix": "<end>", "dtype": "fp32", **settings})
