"""A frozen LLM as a text encoder: captions in, hidden states out (paper section 3.1).

A decoder-only LLM reads `prefix + caption + suffix`. Under causal attention the states of the prefix (system prompt and
instruction) are the same for every caption, so they are computed once, with their keys and values; captions are then
packed, sorted by length, without padding, behind those keys and values (`model/encoders/packed_attention.py`). Blocks above the
one that is read are cut away, and there is no LM head. Encoders that are not causal (T5, CLIP), or `reuse_prefix: false`,
take the plain way: whole prompts, padded.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.common.dtypes import DTYPES
from model.common.errors import UserError
from model.config import TextConfig
from model.encoders.language_model import LanguageModel, load_language_model
from model.encoders.packed_attention import CUDA_LENGTH_STEP, Packing, plan_groups

FORMAT = 1
"""Changes when the same settings would give other numbers."""
CHECK_TOLERANCE = {"bf16": 0.15, "fp32": 1e-2}
"""Largest relative difference per token between the packed and the plain way that loading accepts: an architecture that
cannot be packed is off by a multiple of this."""
_PROBE = "a red cube on a table"
_IDENTITY = ("llm", "revision", "encoder", "layer", "suffix", "max_tokens", "dtype", "reuse_prefix", "quantisation")


def load_encoder(config: TextConfig, device: torch.device) -> "TextEncoder":
    """Load the encoder of a text family.

    Raises:
        UserError: the model cannot be found, is not in safetensors or GGUF, or cannot do what the settings ask for.
    """
    if config.encoder != "causal" and config.reuse_prefix:
        raise UserError(
            f"text {config.name}: encoder={config.encoder} is not causal, so its prefix states depend on the caption: "
            "set reuse_prefix: false"
        )
    llm = load_language_model(config, DTYPES[config.dtype], device)
    if config.device_map:  # tokens go where its first layer is; what is offloaded to disk lies on no device
        device = next((weights.device for weights in llm.module.parameters() if weights.device.type != "meta"), device)
    return TextEncoder(config, llm, device)


def config_from_identity(identity: dict[str, Any]) -> TextConfig:
    """Settings of the encoder that made a family, from the family's identity."""
    return TextConfig(prefix=identity["prefix"], instruction="", **{name: identity[name] for name in _IDENTITY})


def check_identity(encoder: "TextEncoder", name: str, identity: dict[str, Any]) -> None:
    """Check that `encoder` gives the numbers of the family `name`.

    Raises:
        UserError: it does not; the message says which settings differ.
    """
    ours = encoder.identity
    different = sorted(key for key in ours.keys() | identity.keys() if ours.get(key) != identity.get(key))
    if different:
        shown = ", ".join(f"{key}: {identity.get(key)!r} in the family, {ours.get(key)!r} here" for key in different)
        raise UserError(f"family {name} was made by another encoder ({shown}): use its settings, or another family name")


class TextEncoder:
    """Captions -> states of a frozen LLM.

    Attributes:
        width: channels of a state, over all the layers concatenated.
        prefix_ids: tokens before every caption, kept once; empty where the encoder is not causal.
        identity: every setting that decides the numbers, for `Family.identity`.
        truncated: captions cut so far.
        counts: what was run and what was saved so far, in tokens and in tokens x blocks.
    """

    def __init__(self, config: TextConfig, llm: LanguageModel, device: torch.device) -> None:
        """Read the template, run the prefix, and check the packed way against the plain one."""
        self.config, self.device = config, device
        self._llm = llm
        self._tokenizer = llm.tokenizer
        self._read_template()
        self.width = llm.hidden * (len(llm.layers_read) if llm.reading == "concat" else 1)
        self.identity = {
            **{name: getattr(config, name) for name in _IDENTITY},
            "prefix": self._prefix_text,
            "weights": llm.fingerprint,
            "format": FORMAT,
        }
        self.truncated = 0
        self.counts: Counter[str] = Counter()
        self._prefix_cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._run_prefix()

    def _read_template(self) -> None:
        """Tokenise prefix and suffix. A space that ends the prefix belongs to the caption's first token."""
        name = self.config.name or self.config.llm
        self._prefix_text = self.config.prefix.replace("{instruction}", self.config.instruction)
        head = self._prefix_text.rstrip(" ")
        self._lead = " " if head != self._prefix_text else ""
        before, after = self._llm.added_tokens
        # Special tokens are read as such in the template, which is the user's; in captions they are plain text.
        self._tokenizer.encode_special_tokens = False
        prefix = self._ids(head)
        self._before = before + (prefix[len(before) :] if prefix[: len(before)] == before else prefix)
        self._suffix = self._ids(self.config.suffix) + after
        joint = self._ids(head + self._lead + _PROBE)
        self._tokenizer.encode_special_tokens = True
        if prefix + self._ids(self._lead + _PROBE) != joint:
            raise UserError(
                f"text {name}: the end of the prefix merges with the caption's first letters into one token: end it with "
                "chat markup, one newline or one space"
            )
        if len(self._suffix) >= self.config.max_tokens:
            raise UserError(f"text {name}: max_tokens={self.config.max_tokens} leaves no token for a caption: raise it")
        self.prefix_ids = self._before if self.config.encoder == "causal" else []
        if not self._caption_ids(self._ids(self._lead))[0]:
            raise UserError(f"text {name}: the null caption has no token: set text.suffix, such as the end-of-turn markup")

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _caption_ids(self, ids: list[int]) -> tuple[list[int], bool]:
        """Cut a caption and close it; also whether it was cut. Encoders that are not causal keep the prefix in it."""
        room = self.config.max_tokens - len(self._suffix)
        return ids[:room] + self._suffix, len(ids) > room

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption and the suffix, without the prefix, cut at `max_tokens` (the suffix stays)."""
        texts = [self._lead + caption.strip() for caption in captions]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        cut = [self._caption_ids(encoding.ids) for encoding in encodings]
        self.truncated += sum(was_cut for _, was_cut in cut)
        return [ids for ids, _ in cut]

    def spans(self, caption: str) -> list[tuple[int, int]]:
        """Where in `caption` each token of `tokenize` stands, [start, end) in characters; of the suffix's tokens (0, 0)."""
        begin = len(caption) - len(caption.lstrip()) - len(self._lead)
        encoding = self._tokenizer.encode(self._lead + caption.strip(), add_special_tokens=False)
        kept = len(self._caption_ids(encoding.ids)[0]) - len(self._suffix)
        places = [(max(0, start + begin), max(0, end + begin)) for start, end in encoding.offsets[:kept]]
        return places + [(0, 0)] * len(self._suffix)

    @property
    def prompt_prefix(self) -> int:
        """Tokens that the plain way runs before every caption."""
        return len(self._before)

    @property
    def blocks(self) -> int:
        """Blocks that the plain way runs on every token."""
        return self._llm.blocks

    def prefix_states(self) -> Tensor:
        """States of the prefix, fp32 [P, W]; P = 0 where the encoder is not causal."""
        return self._prefix_states

    def encode(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """States of each caption's tokens, [T_i, W] in `config.dtype`, in the order given.

        Raises:
            ValueError: a caption without tokens.
        """
        if not all(token_ids):
            raise ValueError("a caption has no token: encode the null caption instead")
        order = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))
        states: list[Tensor | None] = [None] * len(token_ids)
        for rows in self._batches(order, [len(ids) for ids in token_ids]):
            batch = [list(token_ids[row]) for row in rows]
            encoded = self._encode_packed(batch) if self.config.reuse_prefix else self._encode_padded(batch)
            for row, state in zip(rows, encoded, strict=True):
                states[row] = state
        self._count([len(ids) for ids in token_ids])
        return [state for state in states if state is not None]

    def _batches(self, order: list[int], lengths: list[int]) -> list[list[int]]:
        """Cut `order` into batches of at most `tokens_per_batch` tokens, what is run beside the caption included."""
        extra = 0 if self.config.reuse_prefix else len(self._before)
        batches: list[list[int]] = []
        tokens = self.config.tokens_per_batch + 1
        for row in order:
            tokens += lengths[row] + extra
            if tokens > self.config.tokens_per_batch:
                batches.append([])
                tokens = lengths[row] + extra
            batches[-1].append(row)
        return batches

    def _count(self, lengths: list[int]) -> None:
        """Add to the counts."""
        total, run = self._llm.blocks, self._llm.blocks_run
        tokens, prefix = sum(lengths), len(self._before)
        padding = padding_tokens(lengths)
        reused = prefix * len(lengths) if self.config.reuse_prefix else 0
        kept = tokens + prefix * len(lengths) - reused
        saved_padding = padding if self.config.reuse_prefix else 0
        self.counts.update(
            captions_encoded=len(lengths),
            tokens_run=kept,
            prefix_tokens_saved=reused,
            padding_tokens_saved=saved_padding,
            block_tokens_run=kept * run,
            block_tokens_saved_prefix=reused * total,
            block_tokens_saved_padding=saved_padding * total,
            block_tokens_saved_layers=kept * (total - run),
        )

    @torch.inference_mode()
    def _run_prefix(self) -> None:
        """Compute the states, keys and values of the prefix."""
        if not self.prefix_ids:
            self._prefix_states = torch.zeros(0, self.width)
        elif not self.config.reuse_prefix:
            self._prefix_states = self._encode_padded([[]])[0].float()
        else:
            packing = Packing(plan_groups([len(self.prefix_ids)]), recorded={})
            self._prefix_states = self._forward_packed(self.prefix_ids, list(range(len(self.prefix_ids))), packing).float()
            self._prefix_cache = packing.recorded or {}
        if self.config.reuse_prefix:
            self._check_packing()

    def _check_packing(self) -> None:
        """Compare the packed way with the plain one on two captions, so that no architecture is packed wrongly.

        Raises:
            UserError: they differ: the model is not causal, or keeps state that packing would mix between captions.
        """
        captions = [ids + self._suffix for ids in (self._ids(self._lead + _PROBE), self._ids(self._lead + _PROBE[:10]))]
        packed = self._encode_packed(captions)
        plain = [self._encode_padded([caption], pad=0)[0] for caption in captions]
        worst = max(relative_error(ours, theirs) for ours, theirs in zip(packed, plain, strict=True))
        if not worst <= CHECK_TOLERANCE[self.config.dtype]:
            raise UserError(
                f"{self.config.llm}: packed captions behind a shared prefix differ from whole prompts by {worst:.2g}, so this "
                "model is not purely causal: set reuse_prefix: false"
            )

    @torch.inference_mode()
    def _encode_packed(self, batch: list[list[int]]) -> list[Tensor]:
        """States of captions, shortest first, packed into one row behind the prefix's keys and values."""
        lengths = [len(ids) for ids in batch]
        step = CUDA_LENGTH_STEP if self.device.type == "cuda" else 1
        packing = Packing(plan_groups(lengths, step=step), self._prefix_cache)
        start = len(self.prefix_ids)
        positions = [start + place for length in lengths for place in range(length)]
        return list(self._forward_packed([number for ids in batch for number in ids], positions, packing).split(lengths))

    def _forward_packed(self, ids: list[int], positions: list[int], packing: Packing) -> Tensor:
        with self._llm.packed():
            return self._llm.states(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                use_cache=False,
                packing=packing,
            )[0]  # [N, W]

    @torch.inference_mode()
    def _encode_padded(self, batch: list[list[int]], pad: int | None = None) -> list[Tensor]:
        """States of captions from whole prompts, padded on the right; for an empty caption the prefix's."""
        prompts = [self._before + ids for ids in batch]
        longest = max(len(prompt) for prompt in prompts)
        pad = self._llm.pad if pad is None else pad
        if pad is None and any(len(prompt) < longest for prompt in prompts):
            raise UserError(f"{self.config.llm}: its tokenizer has no padding token: set reuse_prefix: true, which needs none")
        ids = torch.tensor([prompt + [pad or 0] * (longest - len(prompt)) for prompt in prompts], device=self.device)
        mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device)
        arguments = {} if self.config.encoder != "causal" else {"use_cache": False}
        states = self._llm.states(input_ids=ids, attention_mask=mask, **arguments)  # [B, T, W]
        start = len(self._before)
        ends = [len(prompt) for prompt in prompts]
        return [row[start:end] if end > start else row[:start] for row, end in zip(states, ends, strict=True)]


def padding_tokens(lengths: Sequence[int]) -> int:
    """Tokens that the plain way adds: it pads every 64 captions, as they come, to the longest of them."""
    chunks = [lengths[start : start + 64] for start in range(0, len(lengths), 64)]
    return sum(max(chunk) * len(chunk) - sum(chunk) for chunk in chunks)


def relative_error(states: Tensor, reference: Tensor) -> float:
    """Largest difference of a token's states [T, W] from the reference, relative to the length of the token's vector."""
    difference = (states.float() - reference.float()).norm(dim=1)
    return (difference / reference.float().norm(dim=1)).max().item()
