"""Text families: the hidden states of one LLM for every caption of the committed pairs.

A family stores the states of the prefix and of the null caption, and each channel's mean and std. Per caption
it stores the states of the caption's own tokens, quantized. Equal captions are encoded once per task.
"""

import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from data_prep.config import DatasetConfig, captions_of
from data_prep.dataset.parts import read_commit, read_plan, register_family
from data_prep.dataset.schema import CAPTIONS, PAIRS, Family
from data_prep.dataset.snapshot_reader import read_constants
from data_prep.families.encode import Encoder, encode_parts
from data_prep.families.generated import GeneratedCaptions, read_captions_family
from data_prep.pairs.pairs import Pair, read_pairs
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.share import Share
from model.config import TextConfig
from model.encoders.quantize import NOT_FINITE, dequantize, quantize_on_device
from model.encoders.text_encoder import TextEncoder, load_encoder, padding_tokens, relative_error
from model.encoders.transfer import Fetch, send

CALIBRATION_CAPTIONS = 2048
"""Number of captions over which the channels' mean and std are measured: 10,000 to 300,000 tokens."""
MIN_RELATIVE_STD = 1e-3
"""Minimum std of a channel, relative to the median of all channels."""
MAX_CACHE_BYTES = 256 << 20
"""Size of the quantized captions that are remembered between parts."""
BATCHES_PER_CHUNK = 16
"""Number of batches whose states are in memory at once, before they are quantized."""
MAX_ERROR_TOKENS = 8192
"""Number of held-out tokens of a part over which the quantization error is measured."""
PREFIX_TOLERANCE = {"fp32": 2e-3, "bf16": 5e-2}
"""Maximum relative difference per token between the family's stored prefix states and this task's."""


def text_family(
    text: TextConfig,
    encoder: TextEncoder,
    captions: Mapping[str, str] | None = None,
    kinds: Sequence[str] = (),
) -> Family:
    """Return the family that `encoder` writes.

    Args:
        text: the family's settings.
        encoder: the LLM.
        captions: hash of each captions family that it reads, by name; families that read none have no such
            entry.
        kinds: with `captions`, the kinds of all captions, by their number.
    """
    info = {
        "width": encoder.width,
        "prefix_tokens": len(encoder.prefix_ids),
        "quantisation": text.quantisation,
    }
    identity = encoder.identity
    if captions:
        identity = {**identity, CAPTIONS: dict(captions)}
        info["caption_kinds"] = list(kinds)
    return Family(text.name, "text", identity, info)


def run_text(config: DatasetConfig, text: TextConfig, dataset: Store, share: Share) -> None:
    """Encode the missing parts of this share.

    Raises:
        UserError: if the LLM cannot be loaded, a family of this name has another encoder, the stored prefix
            states differ from this task's, there are no pairs yet, or the LLM's states are not finite.
    """
    encode_parts(dataset, text.name, partial(open_text, config, text, dataset), share)


@contextmanager
def open_text(config: DatasetConfig, text: TextConfig, dataset: Store) -> Iterator[Encoder]:
    """Load the LLM, and register the family with its constants, unless another task did.

    Raises:
        UserError: as `run_text`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Before the LLM is loaded, because a name may be wrong.
    generated = {name: read_captions_family(dataset, name).hash for name in captions_of(text)}
    encoder = load_encoder(text, device)

    kinds = config.kinds_of(text)
    family = text_family(text, encoder, generated, kinds)
    # The first task measures the constants. If two do at once, one registration wins and both read its
    # constants.
    registered = dataset.exists(family.key)
    family = register_family(
        dataset, family, None if registered else measure_constants(dataset, encoder, family)
    )
    constants = read_constants(dataset, family)
    check_prefix(encoder, family, constants)

    yield family, CaptionEncoder(encoder, constants, kinds).encode_part


def measure_constants(
    dataset: Store, encoder: TextEncoder, family: Family | None = None
) -> dict[str, Tensor]:
    """Return the constants of a new family: prefix, null caption, and the channels' mean and std over a fixed
    sample.

    Args:
        dataset: the dataset's store.
        encoder: the LLM.
        family: the family, whose generated captions are in the sample too; None = those of the pairs alone.

    Raises:
        UserError: if there are no captions yet.
    """
    captions = calibration_captions(dataset, family)
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
    """Return mean and std of each channel over all tokens.

    The std of a channel that is almost constant in the sample is raised, so that other values of it stay in
    range.

    Args:
        states: states of one caption each, [T_i, W].

    Returns:
        Mean and std, fp32 [W] each.
    """
    # Sums of fp64: the variance is the small difference of two large numbers.
    count, total, square = 0, 0.0, 0.0
    for batch in states:
        exact = batch.double()
        count, total, square = count + len(batch), total + exact.sum(0), square + exact.square().sum(0)

    mean = torch.as_tensor(total) / count
    std = (torch.as_tensor(square) / count - mean.square()).clamp(min=0).sqrt()
    # If at least half of the channels are constant, the bound is 0, and 1 avoids a division by 0.
    return mean.float(), std.clamp(min=MIN_RELATIVE_STD * std.median().item() or 1.0).float()


def is_held_out(caption: str) -> bool:
    """True for the half of all captions that the calibration leaves out, so that the error can be measured on
    them."""
    # By hash, so that all tasks hold out the same captions without a list of them.
    return xxhash.xxh64_intdigest(caption.encode()) % 2 == 1


def calibration_captions(dataset: Store, family: Family | None = None) -> list[str]:
    """Return the captions over which the channels' mean and std are measured.

    They come from the first committed parts of each bucket, as many as needed.
    """
    captions: dict[str, None] = {}
    caption_kinds = read_plan(dataset).caption_kinds
    generated = GeneratedCaptions(dataset, family)
    # By number before bucket, so that all buckets contribute.
    for part in sorted(generated.ready_parts(), key=lambda part: (part.number, part.bucket)):
        pairs = read_pairs(dataset, read_commit(dataset, PAIRS, part), caption_kinds)
        for pair in generated.add(generated.commits(part), pairs):
            captions.update((text.strip(), None) for _, text in pair.captions if text.strip())
        if sum(not is_held_out(caption) for caption in captions) >= CALIBRATION_CAPTIONS:
            break

    # If all of a few captions happen to be held out, use them all.
    sample = [caption for caption in captions if not is_held_out(caption)] or list(captions)
    # Sorting by hash mixes the captions of all parts, in an order that every machine repeats.
    return sorted(sample, key=lambda caption: xxhash.xxh64_intdigest(caption.encode()))[:CALIBRATION_CAPTIONS]


def check_prefix(encoder: TextEncoder, family: Family, constants: dict[str, Tensor]) -> None:
    """Check this task's prefix states against the family's.

    Raises:
        UserError: if the prefix is tokenized differently, or its states differ by more than rounding.
    """
    if constants["prefix_ids"].tolist() != encoder.prefix_ids:
        raise UserError(
            f"family {family.name}: the prefix tokenizes differently here than when the family was created: "
            "install the same `transformers` version"
        )
    if not encoder.prefix_ids:
        return

    error = relative_error(encoder.prefix_states().cpu(), constants["prefix_states"])
    # also raises for an error that is NaN
    if not error <= PREFIX_TOLERANCE[encoder.config.dtype]:
        raise UserError(
            f"family {family.name}: this task's prefix states differ from the stored ones by {error:.2g}, "
            "more than rounding: use the library versions that registered the family, or another family name"
        )


@dataclass(frozen=True)
class EncodedCaption:
    """One caption as it is stored."""

    tokens: int
    values: bytes
    scales: bytes

    @property
    def size(self) -> int:
        """Bytes of values and scales."""
        return len(self.values) + len(self.scales)


class CaptionCache:
    """The most recently used captions, up to `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self._max_bytes = max_bytes
        self._captions: OrderedDict[str, EncodedCaption] = OrderedDict()

    def get(self, text: str) -> EncodedCaption | None:
        """Return a caption, if it is known, and mark it as used."""
        if text in self._captions:
            self._captions.move_to_end(text)
        return self._captions.get(text)

    def add(self, captions: dict[str, EncodedCaption]) -> None:
        """Remember new captions, and forget the least recently used ones."""
        # Only captions that `get` did not find are added, so no size is counted twice.
        self._captions.update(captions)
        self.bytes += sum(caption.size for caption in captions.values())
        while self.bytes > self._max_bytes:
            _, oldest = self._captions.popitem(last=False)
            self.bytes -= oldest.size


class _QuantizationError:
    """The quantization error over the first `MAX_ERROR_TOKENS` held-out tokens of a part."""

    def __init__(self, mean: Tensor, std: Tensor, quantisation: str) -> None:
        self.tokens = 0
        self._mean, self._std = mean, std
        self._quantisation = quantisation
        self._squares = torch.zeros_like(mean)

    def add(self, states: Tensor, values: Tensor, scales: Tensor, held_out: Tensor) -> None:
        """Add the error of some tokens.

        Args:
            states: raw hidden states, fp32 [N, W].
            values: their quantized values, uint8 [N, bytes per token].
            scales: their scales, fp32 [N]; empty for bf16.
            held_out: mask of the tokens to measure, [N].
        """
        rows = send(held_out.nonzero().flatten()[: MAX_ERROR_TOKENS - self.tokens], states.device)
        exact = (states[rows] - self._mean) / self._std
        # bf16 has no scales
        row_scales = scales[rows] if len(scales) else scales
        stored = dequantize(
            values[rows], row_scales, self._quantisation, self._mean, self._std, torch.float32
        )
        self._squares += (stored - exact).square().sum(0)
        self.tokens += len(rows)

    def counts(self) -> dict[str, float]:
        """Return the number of tokens, and the root mean square error relative to the std: mean and worst
        channel."""
        if not self.tokens:
            return {"error_tokens": 0}
        error = (self._squares / self.tokens).sqrt()
        return {
            "error_tokens": self.tokens,
            "error_mean": error.mean().item(),
            "error_worst": error.max().item(),
        }


class _Launched(NamedTuple):
    """A chunk of captions that is being encoded."""

    texts: list[str]
    lengths: list[int]
    """Tokens of each."""
    result: Fetch
    """Copies of the fields of `Quantized`."""


class CaptionEncoder:
    """Encodes the captions of parts, and remembers captions between parts."""

    def __init__(
        self,
        encoder: TextEncoder,
        constants: dict[str, Tensor],
        caption_kinds: Sequence[str],
        cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        """Encode nothing yet.

        Args:
            encoder: the LLM.
            constants: the family's constants, of which `mean` and `spread` are used.
            caption_kinds: names of the dataset's caption kinds.
            cache_bytes: size of the captions that are remembered.
        """
        self.cache = CaptionCache(cache_bytes)
        self._encoder = encoder
        self._quantisation = encoder.config.quantisation
        self._mean, self._std = (constants[name].to(encoder.device) for name in ("mean", "spread"))
        self._kinds = {kind: number for number, kind in enumerate(caption_kinds)}

    def encode_part(self, pairs: list[Pair]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Encode the captions of one part.

        Returns:
            Rows in `TEXT_COLUMNS`, and the counts of the encoder, of the quantization error and of `_count`.

        Raises:
            UserError: if the dataset does not name a caption's kind, or states are not finite.
        """
        start = time.perf_counter()
        # The encoder counts since it was loaded; the commit records this part alone.
        before = self._encoder_counts()
        texts: list[str] = []
        for pair in pairs:
            texts += [text.strip() for _, text in pair.captions]

        # Kept for the whole part, since the cache may forget a caption before its row is made.
        encoded = {"": EncodedCaption(0, b"", b"")}
        new: list[str] = []
        # Without duplicates but in order, so that a second run makes the same batches.
        for text in dict.fromkeys(texts):
            caption = self.cache.get(text)
            if caption is not None:
                encoded[text] = caption
            elif text:
                new.append(text)

        new_captions, counts = self._encode_captions(new)
        encoded |= new_captions
        rows = [self._row(pair, encoded) for pair in pairs]

        after = self._encoder_counts()
        counts |= {name: after[name] - before[name] for name in after}
        counts |= self._count(texts, new, encoded)
        return rows, {**counts, "seconds": time.perf_counter() - start}

    def _encoder_counts(self) -> Counter[str]:
        return Counter(self._encoder.counts) + Counter(truncated=self._encoder.truncated)

    def _row(self, pair: Pair, encoded: dict[str, EncodedCaption]) -> dict[str, Any]:
        """Return the stored row of a pair."""
        captions = [encoded[text.strip()] for _, text in pair.captions]
        return {
            "id": pair.id,
            "kinds": np.array([self._kind(kind) for kind, _ in pair.captions], np.uint8).tobytes(),
            "tokens": np.array([caption.tokens for caption in captions], np.int32).tobytes(),
            "values": b"".join(caption.values for caption in captions),
            "scales": b"".join(caption.scales for caption in captions),
        }

    def _kind(self, kind: str) -> int:
        if kind not in self._kinds:
            raise UserError(
                f"a caption of kind {kind!r}, which caption_kinds lacks: add it to the dataset's YAML"
            )
        return self._kinds[kind]

    def _count(
        self, texts: list[str], new: list[str], encoded: dict[str, EncodedCaption]
    ) -> dict[str, float]:
        """Count captions, stored tokens, and the work saved for equal captions and padding.

        The baseline, plain encoding, runs every caption with its whole prompt. It pads captions in the order
        in which they come, equal ones included, while the encoder sorts them.
        """
        encoder = self._encoder
        tokens = [encoded[text].tokens for text in texts if text]
        prefix = len(encoder.prompt_ids)
        saved = sum(tokens) + prefix * len(tokens) - sum(encoded[text].tokens + prefix for text in new)
        padding = padding_tokens(tokens) if encoder.config.reuse_prefix else 0
        return {
            "captions": len(texts),
            "empty_captions": len(texts) - len(tokens),
            "tokens": sum(tokens),
            "bytes": sum(encoded[text].size for text in texts),
            "duplicate_captions": len(tokens) - len(new),
            "duplicate_tokens_saved": saved,
            "block_tokens_saved_duplicates": saved * encoder.llm.blocks,
            "padding_tokens_saved": padding,
            "block_tokens_saved_padding": padding * encoder.llm.blocks,
        }

    def _encode_captions(self, texts: list[str]) -> tuple[dict[str, EncodedCaption], dict[str, float]]:
        """Encode new captions with the LLM, quantize and remember them, and measure the quantization
        error."""
        captions: dict[str, EncodedCaption] = {}
        error = _QuantizationError(self._mean, self._std, self._quantisation)
        outliers, waiting = 0, None

        # A GPU works on a chunk while the host stores the one before.
        for chunk in itertools.chain(self._chunks(texts), [None]):
            launched = None if chunk is None else self._launch(*chunk, error)
            if waiting is not None:
                stored, chunk_outliers = self._store(waiting)
                captions |= stored
                outliers += chunk_outliers
            waiting = launched

        return captions, {"outlier_tokens": outliers, **error.counts()}

    def _launch(self, texts: list[str], ids: list[list[int]], error: _QuantizationError) -> _Launched:
        """Encode and quantize a chunk, without waiting for a GPU, and add its part of the error."""
        states = self._encoder.encode(ids)
        lengths = [len(caption_states) for caption_states in states]
        flat = torch.cat(states).float()  # [N, W]

        result = quantize_on_device(flat, self._quantisation, self._mean, self._std)
        held_out = torch.tensor([is_held_out(text) for text in texts])
        # On held-out captions, because the mean and std were measured on some of the others.
        error.add(flat, result.values, result.scales, held_out.repeat_interleave(torch.tensor(lengths)))
        return _Launched(texts, lengths, Fetch(result))

    def _store(self, launched: _Launched) -> tuple[dict[str, EncodedCaption], int]:
        """Return the captions of a chunk and its number of outliers, and remember the captions.

        Raises:
            UserError: if states are not finite.
        """
        values, scales, outliers, finite = launched.result.wait()
        if not finite:
            raise UserError(
                f"{self._encoder.config.llm}: {NOT_FINITE}: check the weights, or set text.dtype: fp32"
            )
        captions = _cut(launched.texts, launched.lengths, values.numpy(), scales.numpy())
        self.cache.add(captions)
        return captions, int(outliers)

    def _chunks(self, texts: list[str]) -> Iterator[tuple[list[str], list[list[int]]]]:
        """Yield captions with their token ids, sorted by length, in chunks of several batches."""
        tokens = self._encoder.tokenize(texts) if texts else []
        # Captions of similar lengths share a batch.
        order = sorted(range(len(texts)), key=lambda number: len(tokens[number]))
        max_tokens = BATCHES_PER_CHUNK * self._encoder.tokens_per_batch

        chunk: list[int] = []
        size = 0
        for number in order:
            # A caption above the limit is a chunk of its own.
            if chunk and size + len(tokens[number]) > max_tokens:
                yield [texts[n] for n in chunk], [tokens[n] for n in chunk]
                chunk, size = [], 0
            chunk.append(number)
            size += len(tokens[number])
        if chunk:
            yield [texts[n] for n in chunk], [tokens[n] for n in chunk]


def _cut(
    texts: list[str], lengths: list[int], values: np.ndarray, scales: np.ndarray
) -> dict[str, EncodedCaption]:
    """Cut the values and scales of a chunk's tokens into captions."""
    captions = {}
    start = 0
    for text, length in zip(texts, lengths, strict=True):
        rows = slice(start, start + length)
        captions[text] = EncodedCaption(length, values[rows].tobytes(), scales[rows].tobytes())
        start += length
    return captions
