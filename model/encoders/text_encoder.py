"""A frozen LLM as a text encoder: captions in, hidden states out (paper section 3.1).

A decoder-only LLM reads `prefix + caption + suffix`. Under causal attention the hidden states of the prefix
(system prompt and instruction) are the same for every caption, so they are computed once, with their keys and
values. Captions are then sorted by length and packed without padding behind those keys and values
(`model/encoders/packed_attention.py`). Blocks above the one that is read are removed, and there is no LM
head. Encoders that are not causal (T5, CLIP), and causal ones with `reuse_prefix: false`, run whole prompts,
padded.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.common.dtypes import DTYPES
from model.common.errors import UserError, first_line
from model.config import TEXT_IDENTITY, TextConfig
from model.encoders.encoder_kinds import ENCODERS
from model.encoders.language_model import LanguageModel, load_language_model
from model.encoders.packed_attention import CUDA_LENGTH_STEP, Packing, plan_groups
from model.encoders.transfer import send

FORMAT = 1
"""Increase it when the same settings give other numbers."""
TOKENS_PER_BATCH = {False: 4096, True: 16_384}
"""Default of `tokens_per_batch` without and with a GPU."""
CHECK_TOLERANCE = {"bf16": 0.15, "fp32": 1e-2}
"""Largest relative difference per token between packed captions and padded prompts that loading accepts.

An architecture that cannot be packed is off by a multiple of this.
"""
PADDED_BATCH = 64
"""Captions per batch of the padded encoding that the counts of saved padding compare with."""
_PROBE = "a red cube on a table"


def load_encoder(config: TextConfig, device: torch.device) -> "TextEncoder":
    """Load the encoder of a text family.

    Args:
        config: the family's settings.
        device: where it runs, unless `config.device_map` places it.

    Raises:
        UserError: if the model cannot be found, is not in safetensors or GGUF, or cannot do what the settings
            ask for.
    """
    if config.reuse_prefix and not ENCODERS[config.encoder].causal:
        raise UserError(
            f"text {config.name}: encoder={config.encoder} is not causal, so its prefix states depend on the "
            "caption: set reuse_prefix: false"
        )
    llm = load_language_model(config, DTYPES[config.dtype], device)
    if config.device_map:
        # Token ids go to the device of the first layer. Weights that are offloaded to disk are on the meta
        # device.
        devices = (weights.device for weights in llm.module.parameters())
        device = next((place for place in devices if place.type != "meta"), device)
    return TextEncoder(config, llm, device)


def config_from_identity(identity: dict[str, Any]) -> TextConfig:
    """Return the settings of the encoder that made a family, from the family's identity."""
    return TextConfig(
        prefix=identity["prefix"], instruction="", **{name: identity[name] for name in TEXT_IDENTITY}
    )


def check_identity(encoder: "TextEncoder", name: str, identity: dict[str, Any]) -> None:
    """Check that `encoder` gives the numbers of the family `name`, whose identity is `identity`.

    Raises:
        UserError: if it does not; the message lists the settings that differ.
    """
    here = encoder.identity
    differences = []
    # The families of its captions say nothing about the encoder.
    for key in sorted((here.keys() | identity.keys()) - {"captions"}):
        if here.get(key) != identity.get(key):
            differences.append(f"{key}: {identity.get(key)!r} in the family, {here.get(key)!r} here")

    if differences:
        raise UserError(
            f"family {name} was made by another encoder ({', '.join(differences)}): "
            "use its settings, or another family name"
        )


class TextEncoder:
    """Captions -> hidden states of a frozen LLM.

    Attributes:
        llm: the language model.
        width: channels of a hidden state, over all concatenated layers.
        prompt_ids: tokens before the caption in a whole prompt.
        prefix_ids: the same tokens if their states are stored once per family; empty if the encoder is not
            causal.
        suffix_ids: tokens after the caption.
        identity: every setting that decides the numbers, for `Family.identity`.
        truncated: number of captions truncated so far.
        counts: work done and work saved so far, in tokens and in tokens x blocks.
    """

    def __init__(self, config: TextConfig, llm: LanguageModel, device: torch.device) -> None:
        """Read the template, run the prefix, and compare packed captions with padded prompts.

        Raises:
            UserError: if the template leaves no token to read, or the model cannot be packed.
        """
        self.config, self.device = config, device
        self.llm = llm
        self._tokenizer = llm.tokenizer
        self._read_template()

        self.width = llm.hidden * (len(llm.layers_read) if llm.reading == "concat" else 1)
        self.identity = {
            **config.identity,
            "weights": llm.fingerprint,
            "format": FORMAT,
        }

        self.truncated = 0
        self.counts: Counter[str] = Counter()
        self._prefix_cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._run_prefix()

    def _read_template(self) -> None:
        """Tokenize prefix and suffix."""
        name = self.config.name or self.config.llm
        self._prefix_text = self.config.full_prefix
        # In byte-level BPE a word's first token contains the space before it, so a space at the end of the
        # prefix is tokenized with the caption.
        head = self._prefix_text.rstrip(" ")
        self._lead = " " if head != self._prefix_text else ""

        # The template is the user's, so its special tokens count as such. In captions they are plain text.
        self.llm.tokenizer.encode_special_tokens = False
        before, after = self.llm.added_tokens
        prefix, joint = self._ids(head), self._ids(head + self._lead + _PROBE)
        self._tokenizer = self._continuing_tokenizer(prefix, joint, name)
        self.prompt_ids = before + (prefix[len(before) :] if prefix[: len(before)] == before else prefix)
        self.suffix_ids = self._ids(self.config.suffix) + after
        self._tokenizer.encode_special_tokens = True

        if len(self.suffix_ids) >= self.config.max_tokens:
            raise UserError(
                f"text {name}: max_tokens={self.config.max_tokens} leaves no token for a caption: raise it"
            )

        self.prefix_ids = self.prompt_ids if self.llm.kind.causal else []
        if not self._caption_ids(self._ids(self._lead))[0]:
            raise UserError(
                f"text {name}: the null caption has no token: set text.suffix, such as the end-of-turn markup"
            )

    def _continuing_tokenizer(self, prefix: list[int], joint: list[int], name: str) -> Tokenizer:
        """Return the tokenizer for captions and suffix, which continue a prompt.

        Args:
            prefix: tokens of the prefix alone.
            joint: tokens of the prefix and a caption in one text.
            name: of the family.

        Raises:
            UserError: if prefix and caption cannot be tokenized apart, since a token contains parts of both.
        """
        own = self.llm.tokenizer
        # The second one only where the first does not fit: it is a copy of the whole vocabulary.
        for make in (lambda: own, lambda: without_added_space(own)):
            tokenizer = make()
            if prefix + tokenizer.encode(self._lead + _PROBE, add_special_tokens=False).ids == joint:
                return tokenizer
        raise UserError(
            f"text {name}: the end of the prefix merges with the caption's first letters into one token: "
            "end it with chat markup, one newline or one space"
        )

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _caption_ids(self, ids: list[int]) -> tuple[list[int], bool]:
        """Truncate a caption's tokens and append the suffix. Return them, and True if they were truncated."""
        room = self.config.max_tokens - len(self.suffix_ids)
        return ids[:room] + self.suffix_ids, len(ids) > room

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each caption and the suffix, without the prefix.

        Captions are truncated so that, with the suffix, they have at most `max_tokens` tokens.
        """
        texts = [self._lead + caption.strip() for caption in captions]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)

        token_ids: list[list[int]] = []
        for encoding in encodings:
            ids, was_truncated = self._caption_ids(encoding.ids)
            token_ids.append(ids)
            self.truncated += was_truncated
        return token_ids

    def spans(self, caption: str) -> list[tuple[int, int]]:
        """Return the characters [start, end) of `caption` that each token covers; (0, 0) for the suffix."""
        # `tokenize` strips captions and puts `_lead` before them; offsets count from there.
        begin = len(caption) - len(caption.lstrip()) - len(self._lead)
        encoding = self._tokenizer.encode(self._lead + caption.strip(), add_special_tokens=False)
        tokens = len(self._caption_ids(encoding.ids)[0]) - len(self.suffix_ids)
        spans = [(max(0, start + begin), max(0, end + begin)) for start, end in encoding.offsets[:tokens]]
        return spans + [(0, 0)] * len(self.suffix_ids)

    def prefix_states(self) -> Tensor:
        """Return the hidden states of the prefix, fp32 [P, W]; P = 0 if the encoder is not causal."""
        return self._prefix_states

    def encode(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Run the LLM on captions.

        Args:
            token_ids: tokens of each caption, from `tokenize`.

        Returns:
            Hidden states of each caption's tokens, [T_i, W] in `config.dtype`, in the order given.

        Raises:
            ValueError: if a caption has no token.
        """
        if not all(token_ids):
            raise ValueError("a caption has no token: encode the null caption instead")

        lengths = [len(ids) for ids in token_ids]
        # Captions of similar length share a batch: packed, they form larger groups; padded, less is wasted.
        order = sorted(range(len(token_ids)), key=lambda row: lengths[row])
        states: dict[int, Tensor] = {}
        for rows in self._batches(order, lengths):
            batch = [list(token_ids[row]) for row in rows]
            encoded = self._encode_packed(batch) if self.config.reuse_prefix else self._encode_padded(batch)
            states.update(zip(rows, encoded, strict=True))

        self._count(lengths)
        return [states[row] for row in range(len(token_ids))]

    @property
    def tokens_per_batch(self) -> int:
        """Most tokens that the LLM reads at a time."""
        return self.config.tokens_per_batch or TOKENS_PER_BATCH[self.device.type == "cuda"]

    def _batches(self, order: list[int], lengths: list[int]) -> list[list[int]]:
        """Cut `order` into batches of at most `tokens_per_batch` tokens, with the prefix if it is run."""
        extra = 0 if self.config.reuse_prefix else len(self.prompt_ids)
        batches: list[list[int]] = []
        # More than fits, so that the first caption opens a batch.
        most = self.tokens_per_batch
        tokens = most + 1
        for row in order:
            tokens += lengths[row] + extra
            if tokens > most:
                batches.append([])
                tokens = lengths[row] + extra
            batches[-1].append(row)
        return batches

    def _count(self, lengths: list[int]) -> None:
        """Add captions of these lengths to the counts."""
        blocks, blocks_run = self.llm.blocks, self.llm.blocks_run
        prefix = len(self.prompt_ids) * len(lengths)
        if self.config.reuse_prefix:
            tokens_run, saved_prefix, saved_padding = sum(lengths), prefix, padding_tokens(lengths)
        else:
            tokens_run, saved_prefix, saved_padding = sum(lengths) + prefix, 0, 0

        self.counts.update(
            captions_encoded=len(lengths),
            tokens_run=tokens_run,
            prefix_tokens_saved=saved_prefix,
            padding_tokens_saved=saved_padding,
            block_tokens_run=tokens_run * blocks_run,
            block_tokens_saved_prefix=saved_prefix * blocks,
            block_tokens_saved_padding=saved_padding * blocks,
            block_tokens_saved_layers=tokens_run * (blocks - blocks_run),
        )

    @torch.inference_mode()
    def _run_prefix(self) -> None:
        """Compute the hidden states, keys and values of the prefix."""
        self._prefix_states = torch.zeros(0, self.width)
        if self.config.reuse_prefix:
            self._run_packed_prefix()
        elif self.prefix_ids:
            # No caption is needed: under causal attention none changes the states of the prefix.
            self._prefix_states = self._encode_padded([[]])[0].float()

    def _run_packed_prefix(self) -> None:
        """Compute the hidden states of the prefix as a single packed caption that records keys and values.

        Raises:
            UserError: if the model does not take packed captions, or gives other states for them.
        """
        tokens = len(self.prefix_ids)
        try:
            if tokens:
                packing = Packing(plan_groups([tokens]), recorded={})
                states = self._forward_packed(self.prefix_ids, list(range(tokens)), packing)
                self._prefix_states, self._prefix_cache = states.float(), packing.recorded or {}
            self._check_packing()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            # Models with an attention or a state of their own have other arguments.
            raise UserError(
                f"{self.config.llm}: a {type(self.llm.module).__name__} does not take packed captions "
                f"({first_line(error)[:100]}): set reuse_prefix: false"
            ) from error

    def _check_packing(self) -> None:
        """Compare packed captions with whole prompts, so that no architecture is packed wrongly.

        Raises:
            UserError: if they differ: the model is not causal, or has state that packing would mix between
                captions.
        """
        # Two captions of different lengths, so that a state that leaks from one to the other is found.
        captions = [self._ids(self._lead + text) + self.suffix_ids for text in (_PROBE, _PROBE[:10])]
        packed = self._encode_packed(captions)
        whole = [self._encode_padded([caption], pad=0)[0] for caption in captions]
        worst = max(
            relative_error(states, reference) for states, reference in zip(packed, whole, strict=True)
        )

        # `not <=` also refuses NaN.
        if not worst <= CHECK_TOLERANCE[self.config.dtype]:
            raise UserError(
                f"{self.config.llm}: packed captions behind a shared prefix differ from whole prompts by "
                f"{worst:.2g}, so this model is not purely causal, or its attention has more than keys and "
                "values, such as sinks: set reuse_prefix: false"
            )

    @torch.inference_mode()
    def _encode_packed(self, batch: list[list[int]]) -> list[Tensor]:
        """Return the hidden states of captions, shortest first, packed in one row behind the prefix."""
        lengths = [len(ids) for ids in batch]
        step = CUDA_LENGTH_STEP if self.device.type == "cuda" else 1
        groups = plan_groups(lengths, step=step, device=self.device)
        packing = Packing(groups, self._prefix_cache, lengths=lengths)
        start = len(self.prefix_ids)
        # Each caption follows the prefix directly, wherever it is in the packed row.
        positions = [position for length in lengths for position in range(start, start + length)]
        ids = [number for caption in batch for number in caption]
        return list(self._forward_packed(ids, positions, packing).split(lengths))

    def _forward_packed(self, ids: list[int], positions: list[int], packing: Packing) -> Tensor:
        with self.llm.packed():
            return self.llm.states(
                input_ids=send(torch.tensor([ids]), self.device),
                position_ids=send(torch.tensor([positions]), self.device),
                use_cache=False,
                packing=packing,
            )[0]  # [N, W]

    @torch.inference_mode()
    def _encode_padded(self, batch: list[list[int]], pad: int | None = None) -> list[Tensor]:
        """Return the hidden states of captions from whole prompts, padded on the right.

        For an empty caption, return those of the prefix. `pad` replaces the tokenizer's padding token.
        """
        start = len(self.prompt_ids)
        prompts = [self.prompt_ids + ids for ids in batch]
        ends = [len(prompt) for prompt in prompts]
        longest = max(ends)
        pad = self.llm.pad if pad is None else pad
        if pad is None and min(ends) < longest:
            raise UserError(
                f"{self.config.llm}: its tokenizer has no padding token: "
                "set reuse_prefix: true, which needs none"
            )

        # Padding on the right changes nothing for causal models, and positions need no correction.
        ids = torch.tensor(
            [prompt + [pad or 0] * (longest - len(prompt)) for prompt in prompts], device=self.device
        )
        mask = torch.tensor([[1] * end + [0] * (longest - end) for end in ends], device=self.device)
        # The encoders of T5 and CLIP do not accept this argument (transformers 4.57).
        options = {"use_cache": False} if self.llm.kind.causal else {}
        states = self.llm.states(input_ids=ids, attention_mask=mask, **options)  # [B, T, W]
        return [row[start:end] if end > start else row[:start] for row, end in zip(states, ends, strict=True)]


def without_added_space(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of a tokenizer that puts no space before a text.

    SentencePiece and some others do so, which is right for a prompt and wrong for its continuation.
    """

    def changed(step: dict[str, Any] | None) -> dict[str, Any] | None:
        if step is None or step["type"] == "Prepend":
            return None
        step = {key: value for key, value in step.items() if key != "add_prefix_space"}
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        for steps in {"normalizers", "pretokenizers"} & step.keys():
            step[steps] = [each for each in map(changed, step[steps]) if each is not None]
        return step

    record = json.loads(tokenizer.to_str())
    record |= {part: changed(record[part]) for part in ("normalizer", "pre_tokenizer")}
    return Tokenizer.from_str(json.dumps(record))


def padding_tokens(lengths: Sequence[int]) -> int:
    """Return the tokens of padding if every `PADDED_BATCH` captions are padded to their longest."""
    batches = [lengths[start : start + PADDED_BATCH] for start in range(0, len(lengths), PADDED_BATCH)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


def relative_error(states: Tensor, reference: Tensor) -> float:
    """Return the largest difference of a token's states from the reference, relative to its norm.

    Args:
        states: [T, W].
        reference: [T, W].
    """
    difference = (states.float() - reference.float()).norm(dim=1)
    return (difference / reference.float().norm(dim=1)).max().item()
