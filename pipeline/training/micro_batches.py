"""Division of a rank's batch into micro-batches: samples with captions of similar length together, so that
little is padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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

    def condition(self, whole: Condition) -> Condition:
        """Return the samples' part of the batch's condition."""
        if self.tokens is None:
            return whole.rows(self.rows)
        # Trimmed first, which copies nothing: the samples are then copied without the padding of others.
        texts = [text.trimmed(*own) for text, own in zip(whole.texts, self.tokens, strict=True)]
        return replace(whole, texts=texts).rows(self.rows)


def by_length(
    parts: Sequence[slice], tokens: Sequence[Sequence[int]], multiple: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Yield a batch's micro-batches, the shortest captions first.

    The sum of the losses is the same, apart from the order of its terms. A batch that is done at once keeps
    its order, and so the bits of its result.

    Args:
        parts: the micro-batches as ranges of a batch.
        tokens: of each text, in fusion order, the tokens of each sample's caption.
        multiple: captions are padded to a multiple of so many tokens.
        device: of the batch.
    """
    if len(parts) == 1:
        yield MicroBatch(parts[0])
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
        yield MicroBatch(torch.tensor(chosen, device=device), longest)
