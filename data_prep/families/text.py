"""Text families: the states of one LLM for every caption of the committed pairs.

Stored once a family: the states of the prefix and of the null caption, and each channel's mean and spread. Stored a caption:
its own tokens, quantised. Equal captions are encoded once across the task.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import committed_parts, read_commit, read_plan, register_family
from data_prep.dataset.schema import PAIRS, Family
from data_prep.dataset.snapshot_reader import read_constants
from data_prep.families.encode import encode_family
from data_prep.pairs.pairs import Pair, read_pairs
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.share import Share
from model.config import TextConfig
from model.encoders.quantize import dequantize, quantize
from model.encoders.text_encoder import TextEncoder, load_encoder, padding_tokens, relative_error

CALIBRATION_CAPTIONS = 2048
"""Captions behind the channels' mean and spread: 10,000 to 300,000 tokens."""
MEMORY_BYTES = 256 << 20
"""Quantised captions kept for the case that they come again."""
BATCHES_PER_CHUNK = 16
"""Batches whose states are held at once before they are quantised."""
ERROR_TOKENS = 8192
"""Held-out tokens of a part over which the quantisation's error is measured."""
PREFIX_TOLERANCE = {"fp32": 2e-3, "bf16": 5e-2}
"""Largest relative difference a token between the family's stored prefix states and this task's."""


def text_family(text: TextConfig, encoder: TextEncoder) -> Family:
    """The family that `encoder` writes."""
    info = {"width": encoder.width, "prefix_tokens": len(encoder.prefix_ids), "quantisation": text.quantisation}
    return Family(text.name, "text", encoder.identity, info)


def run_text(config: DatasetConfig, text: TextConfig, dataset: Store, share: Share) -> None:
    """Register the family, with its constants, unless another task did; then encode the missing parts of this share.

    Raises:
        UserError: no such LLM; a family of this name was made by another encoder; the stored prefix states are not this
            task's; no pairs yet; or the LLM's states are not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(text, device)
    family = text_family(text, encoder)
    known = dataset.exists(family.key)
    family = register_family(dataset, family, None if known else measure_constants(dataset, encoder))
    constants = read_constants(dataset, family)
    check_prefix(encoder, family, constants)
    job = TextJob(encoder, constants, config.caption_kinds)
    encode_family(dataset, family, job.encode_part, share)


def measure_constants(dataset: Store, encoder: TextEncoder) -> dict[str, Tensor]:
    """The constants of a new family: prefix, null caption, and the channels' mean and spread over a fixed sample.

    Raises:
        UserError: there are no captions yet.
    """
    captions = calibration_captions(dataset)
    if not captions:
        raise UserError(f"{dataset.uri}: no captions yet: run `python -m data_prep pairs DATASET.yaml` first")
    mean, std = measure_channels(encoder.encode(encoder.tokenize(captions)))
    (null_ids,) = encoder.tokenize([""])
    (null_states,) = encoder.encode([null_ids])
    return {
        "prefix_ids": torch.tensor(encoder.prefix_ids, dtype=torch.int64),
        "prefix_states": encoder.prefix_states().float().cpu(),
        "null_ids": torch.tensor(null_ids, dtype=torch.int64),
        "null_states": null_states.float().cpu(),
        "mean": mean.cpu(),
        "spread": std.cpu(),
    }


def measure_channels(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and spread of each channel, fp32 [W] each, over all tokens of `states`, each [T_i, W].

    A channel that hardly moves in the sample gets a spread that keeps its values in range when it does.
    """
    count, total, square = 0, 0.0, 0.0
    for batch in states:
        exact = batch.double()
        count, total, square = count + len(batch), total + exact.sum(0), square + exact.square().sum(0)
    mean = torch.as_tensor(total) / count
    std = (torch.as_tensor(square) / count - mean.square()).clamp(min=0).sqrt()
    return mean.float(), std.clamp(min=1e-3 * std.median().item() or 1.0).float()


def is_held_out(caption: str) -> bool:
    """Whether a caption stays out of the calibration, so that the error can be measured on it: half of all do."""
    return xxhash.xxh64_intdigest(caption.encode()) % 2 == 1


def calibration_captions(dataset: Store) -> list[str]:
    """The sample for the channels' mean and spread: from the first committed part of each bucket on, as many as it takes."""
    found: dict[str, None] = {}
    kinds = read_plan(dataset).caption_kinds
    for part in sorted(committed_parts(dataset, PAIRS), key=lambda part: (part.number, part.bucket)):
        commit = read_commit(dataset, PAIRS, part)
        for pair in read_pairs(dataset, commit, kinds) if commit.rows else []:
            found.update((text.strip(), None) for _, text in pair.captions if text.strip())
        if sum(not is_held_out(caption) for caption in found) >= CALIBRATION_CAPTIONS:
            break
    # A few captions could fall into the held-out half altogether: then all are used.
    used = [caption for caption in found if not is_held_out(caption)] or list(found)
    return sorted(used, key=lambda caption: xxhash.xxh64_intdigest(caption.encode()))[:CALIBRATION_CAPTIONS]


def check_prefix(encoder: TextEncoder, family: Family, constants: dict[str, Tensor]) -> None:
    """Check this task's prefix states against the family's.

    Raises:
        UserError: another tokenisation, or states that differ beyond rounding.
    """
    if constants["prefix_ids"].tolist() != encoder.prefix_ids:
        raise UserError(f"family {family.name}: another tokenizer version cuts the prefix otherwise: use the same everywhere")
    if not encoder.prefix_ids:
        return
    error = relative_error(encoder.prefix_states().cpu(), constants["prefix_states"])
    if not error <= PREFIX_TOLERANCE[encoder.config.dtype]:
        raise UserError(
            f"family {family.name}: this task's prefix states differ from the stored ones by {error:.2g}, more than rounding: "
            "use the library versions that registered the family, or another family name"
        )


@dataclass(frozen=True)
class _Caption:
    """One caption as stored."""

    tokens: int
    values: bytes
    scales: bytes


class TextJob:
    """Encodes parts, and remembers captions between them."""

    def __init__(self, encoder: TextEncoder, constants: dict[str, Tensor], caption_kinds: Sequence[str]) -> None:
        self._encoder = encoder
        self._quantisation = encoder.config.quantisation
        self._mean, self._std = (constants[name].to(encoder.device) for name in ("mean", "spread"))
        self._kinds = {kind: number for number, kind in enumerate(caption_kinds)}
        self._memory: OrderedDict[str, _Caption] = OrderedDict()
        self._remembered = 0

    def encode_part(self, pairs: list[Pair]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Rows of one part in `TEXT_COLUMNS`, and what was counted: see `_count`.

        Raises:
            UserError: a caption of a kind that the dataset does not name, or states that are not finite.
        """
        start = time.perf_counter()
        before = Counter(self._encoder.counts) + Counter(truncated=self._encoder.truncated)
        texts = [text.strip() for pair in pairs for _, text in pair.captions]
        new = [text for text in dict.fromkeys(texts) if text and text not in self._memory]
        encoded, counts = self._encode_captions(texts, new)
        rows = []
        for pair in pairs:
            captions = [encoded[text.strip()] for _, text in pair.captions]
            rows.append(
                {
                    "id": pair.id,
                    "kinds": np.array([self._kind(kind) for kind, _ in pair.captions], np.uint8).tobytes(),
                    "tokens": np.array([caption.tokens for caption in captions], np.int32).tobytes(),
                    "values": b"".join(caption.values for caption in captions),
                    "scales": b"".join(caption.scales for caption in captions),
                }
            )
        after = Counter(self._encoder.counts) + Counter(truncated=self._encoder.truncated)
        counts |= {name: after[name] - before[name] for name in after}
        counts |= self._count(texts, new, encoded)
        return rows, {**counts, "seconds": time.perf_counter() - start}

    def _kind(self, kind: str) -> int:
        if kind not in self._kinds:
            raise UserError(f"a caption of kind {kind!r}, which caption_kinds lacks: add it to the dataset's YAML")
        return self._kinds[kind]

    def _count(self, texts: list[str], new: list[str], encoded: dict[str, _Caption]) -> dict[str, float]:
        """Captions and tokens as stored; what equal captions saved, which the plain way would have run whole; and what packing
        saved: the plain way pads captions as they come, equal ones too, while the encoder has seen them sorted."""
        encoder = self._encoder
        tokens = [encoded[text].tokens for text in texts if text]
        prefix = len(encoder.prompt_ids)
        saved = sum(tokens) + prefix * len(tokens) - sum(encoded[text].tokens + prefix for text in new)
        padding = padding_tokens(tokens) if encoder.config.reuse_prefix else 0
        return {
            "captions": len(texts),
            "empty_captions": len(texts) - len(tokens),
            "tokens": sum(tokens),
            "bytes": sum(len(encoded[text].values) + len(encoded[text].scales) for text in texts),
            "duplicate_captions": len(tokens) - len(new),
            "duplicate_tokens_saved": saved,
            "block_tokens_saved_duplicates": saved * encoder.llm.blocks,
            "padding_tokens_saved": padding,
            "block_tokens_saved_padding": padding * encoder.llm.blocks,
        }

    def _encode_captions(self, texts: list[str], new: list[str]) -> tuple[dict[str, _Caption], dict[str, float]]:
        """Every distinct caption: the `new` ones from the LLM, the others from memory, the empty one without a token."""
        encoded = {"": _Caption(0, b"", b"")}
        for text in dict.fromkeys(texts):
            if text in self._memory:
                self._memory.move_to_end(text)
                encoded[text] = self._memory[text]
        outliers, errors, error_tokens = 0, torch.zeros_like(self._mean), 0
        for chunk, ids in self._chunks(new):
            states = self._encoder.encode(ids)
            lengths = [len(state) for state in states]
            flat = torch.cat(states).float()  # [N, W]
            values, scales, outliers_here = self._quantize(flat)
            outliers += outliers_here
            held_out = torch.tensor([is_held_out(text) for text in chunk]).repeat_interleave(torch.tensor(lengths))
            rows = held_out.nonzero().flatten()[: ERROR_TOKENS - error_tokens].to(flat.device)
            errors += self._squared_error(flat, values, scales, rows)
            error_tokens += len(rows)
            encoded |= self._store(chunk, lengths, values.cpu().numpy(), scales.cpu().numpy())
        counts: dict[str, float] = {"outlier_tokens": outliers, "error_tokens": error_tokens}
        if error_tokens:
            error = (errors / error_tokens).sqrt()
            counts |= {"error_mean": error.mean().item(), "error_worst": error.max().item()}
        return encoded, counts

    def _chunks(self, texts: list[str]) -> Iterator[tuple[list[str], list[list[int]]]]:
        """Captions sorted by length, in chunks of some batches, with their token ids."""
        tokens = self._encoder.tokenize(texts) if texts else []
        order = sorted(range(len(texts)), key=lambda row: len(tokens[row]))
        limit = BATCHES_PER_CHUNK * self._encoder.config.tokens_per_batch
        chunk: list[int] = []
        size = 0
        for row in order:
            if chunk and size + len(tokens[row]) > limit:
                yield [texts[at] for at in chunk], [tokens[at] for at in chunk]
                chunk, size = [], 0
            chunk.append(row)
            size += len(tokens[row])
        if chunk:
            yield [texts[at] for at in chunk], [tokens[at] for at in chunk]

    def _quantize(self, states: Tensor) -> tuple[Tensor, Tensor, int]:
        try:
            return quantize(states, self._quantisation, self._mean, self._std)
        except ValueError as error:
            raise UserError(f"{self._encoder.config.llm}: {error}: check the weights, or set text.dtype: fp32") from error

    def _squared_error(self, states: Tensor, values: Tensor, scales: Tensor, rows: Tensor) -> Tensor:
        """Squared error of the quantisation a channel [W], in units of the channel's spread, summed over `rows`."""
        exact = (states[rows] - self._mean) / self._std
        chosen = scales[rows] if len(scales) else scales
        stored = dequantize(values[rows], chosen, self._quantisation, self._mean, self._std, torch.float32)
        return (stored - exact).square().sum(0)

    def _store(self, texts: list[str], lengths: list[int], values: np.ndarray, scales: np.ndarray) -> dict[str, _Caption]:
        """Cut a chunk into captions, and remember them as long as there is room."""
        captions = {}
        start = 0
        for text, length in zip(texts, lengths, strict=True):
            rows = slice(start, start + length)
            captions[text] = _Caption(length, values[rows].tobytes(), scales[rows].tobytes())
            start += length
        self._memory.update(captions)
        self._remembered += sum(len(caption.values) + len(caption.scales) for caption in captions.values())
        while self._remembered > MEMORY_BYTES:
            _, oldest = self._memory.popitem(last=False)
            self._remembered -= len(oldest.values) + len(oldest.scales)
        return captions
