"""The captions and the costs of a captions family, from the counts in the commits of its parts."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.dataset.parts import commits_of_share, committed
from data_prep.dataset.schema import CAPTIONS, Commit
from data_prep.dataset.snapshot_reader import family_names, read_families
from data_prep.store.store import Store
from model.common.share import Share

OF_KIND, DROPPED = "captions ", "dropped "
"""Starts of the counts by kind of the captions, and by reason of the answers that are none."""


@dataclass(frozen=True)
class CaptionsReport:
    """A captions family, or one task's share of it."""

    name: str
    parts: int
    images: int
    captions: dict[str, int]
    """By kind."""
    dropped: dict[str, int]
    """Answers that are no captions, by reason; the most frequent first."""
    without: int
    """Images without any caption."""
    letters: int
    requests: int
    """Requests to the endpoint, or questions to the model."""
    repeated: int
    """Requests that were repeated because one failed."""
    prompt_tokens: int
    tokens: int
    """Tokens that the model wrote."""
    seconds: float
    """Time of all parts together; a process does two parts at a time."""

    @property
    def count(self) -> int:
        """Number of captions."""
        return sum(self.captions.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.captions.items()) or "none"
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.items()) or "none"
        return (
            f"captions family {self.name}: {self.parts:,} parts, {self.images:,} images, {self.count:,} "
            f"captions ({kinds}), {self.letters / max(1, self.count):,.0f} letters each\n"
            f"  answers dropped: {dropped}; images without a caption: {self.without:,}\n"
            f"  cost: {self.requests:,} requests, {self.repeated:,} of them repeated after a fault; "
            f"{self.prompt_tokens:,} tokens read, {self.tokens:,} written"
        )


def summarize_captions(name: str, commits: Iterable[Commit]) -> CaptionsReport:
    """Add up the commits of a captions family."""
    parts = images = 0
    total: Counter[str] = Counter()
    for commit in commits:
        parts, images = parts + 1, images + commit.rows
        total.update(commit.counts)  # pyright: ignore[reportArgumentType]
    return CaptionsReport(
        name=name,
        parts=parts,
        images=images,
        captions=_starting(total, OF_KIND),
        dropped=_starting(total, DROPPED),
        without=int(total["images without a caption"]),
        letters=int(total["letters"]),
        requests=int(total["requests"]),
        repeated=int(total["requests"] - total["answers"]),
        prompt_tokens=int(total["prompt_tokens"]),
        tokens=int(total["tokens"]),
        seconds=total["seconds"],
    )


def _starting(total: "Counter[str]", start: str) -> dict[str, int]:
    """Return the counts whose names start with `start`, by the rest of the name, the largest first."""
    chosen = {name.removeprefix(start): count for name, count in total.items() if name.startswith(start)}
    return {name: int(count) for name, count in sorted(chosen.items(), key=lambda item: (-item[1], item[0]))}


def print_captions_report(dataset: Store, name: str, share: Share) -> None:
    """Print the report of the parts in a task's share, including those that another task captioned."""
    if name not in family_names(dataset):
        return
    print(summarize_captions(name, commits_of_share(dataset, name, share)))


def captions_reports(dataset: Store) -> list[CaptionsReport]:
    """Return a report per captions family, over all of its committed parts."""
    names = [name for name, family in read_families(dataset).items() if family.kind == CAPTIONS]
    return [summarize_captions(name, committed(dataset, name).values()) for name in names]
