"""Division of a rank's batch into micro-batches: samples with captions of similar length together, so that
little is padding."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.condition import Condition
from pipeline.text.texts import padded_length


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a batch."""

    rows: slice | Tensor
    """Their places in the batch."""
    tokens: list[tuple[int, bool]] | None = None
    """Caption tokens of each text, in fusion order, and True if some samples have fewer; None = as in the
    batch."""
    totals: list[int] | None = None
    """Caption tokens of all samples in each of the texts, the first ones, that the network reads without
    padding; None = it reads all with padding."""

    def condition(self, whole: Condition) -> Condition:
        """Return the samples' part of the batch's condition."""
        if self.tokens is not None:
            # Trimmed first, which copies nothing: the samples are then copied without the padding of others.
            texts = [text.trimmed(*own) for text, own in zip(whole.texts, self.tokens, strict=True)]
            whole = replace(whole, texts=texts)
        part = whole.rows(self.rows)
        if self.totals is None:
            return part

        texts: list[Any] = list(part.texts)
        for index, total in enumerate(self.totals):
            text = texts[index]
            texts[index] = text.without_padding(total + len(text.mask) * text.prefix)
        return replace(part, texts=texts)


def by_length(
    parts: Sequence[slice],
    tokens: Sequence[Sequence[int]],
    multiple: int,
    device: torch.device,
    ragged: int = 0,
) -> Iterator[MicroBatch]:
    """Yield a batch's micro-batches, the shortest captions first.

    The sum of the losses is the same, apart from the order of its terms. A batch that is done at once keeps
    its order, and so the bits of its result.

    Args:
        parts: the micro-batches as ranges of a batch.
        tokens: of each text, in fusion order, the tokens of each sample's caption.
        multiple: captions are padded to a multiple of so many tokens.
        device: of the batch.
        ragged: so many texts, the first ones, are read without padding.
    """
    if len(parts) == 1:
        yield MicroBatch(parts[0], totals=[sum(of_text) for of_text in tokens[:ragged]] or None)
        return

    sums = [sum(of_texts) for of_texts in zip(*tokens, strict=True)]
    # Stable, so that the order depends on nothing but the batch.
    order = sorted(range(len(sums)), key=sums.__getitem__)
    for part in parts:
        chosen = order[part]
        longest = []
        for counts in tokens:
            own = [counts[sample] for sample in chosen]
            length = padded_length(max(own), multiple)
            longest.append((length, min(own) < length))
        totals = []
        for of_text in tokens[:ragged]:
            totals.append(sum(of_text[sample] for sample in chosen))

        yield MicroBatch(_on_device(chosen, device), longest, totals or None)


def lengths_of_captions(longest: Sequence[int], multiple: int) -> list[tuple[int, ...]]:
    """Return all lengths to which the captions of a micro-batch may be padded, one per LLM.

    Args:
        longest: most tokens of a caption of each LLM.
        multiple: as in `by_length`.
    """
    steps = [range(multiple, padded_length(most, multiple) + 1, multiple) for most in longest]

    return list(itertools.product(*steps))


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Return numbers int64 [n] on a device, without waiting for the copy."""
    tensor = torch.tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
