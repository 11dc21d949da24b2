"""What a text family took and saved: from the counts in the commits of its parts."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.dataset.parts import committed, committed_parts, read_commit, read_plan
from data_prep.dataset.schema import Commit
from data_prep.dataset.snapshot_reader import read_families
from data_prep.store.store import Store
from model.common.share import Share

SAVINGS = {
    "prefix": "the instruction once",
    "layers": "layers not run",
    "padding": "no padding",
    "duplicates": "equal captions once",
}
"""Counts `block_tokens_saved_<name>`, and what they mean."""


@dataclass(frozen=True)
class TextReport:
    """A text family, or a task's share of it."""

    name: str
    parts: int
    captions: int
    empty: int
    truncated: int
    tokens: int
    """As stored, equal captions counted each time."""
    bytes: int
    """Of the payload files."""
    seconds: float
    """Of all processes together."""
    saved: dict[str, float]
    """Saving -> share of the plain way's work, in tokens x blocks."""
    work: float
    """What was run, as a share of the plain way's."""
    error_mean: float
    """Root mean square error of a channel in units of its spread, on captions that the calibration did not see: mean ..."""
    error_worst: float
    """... and the worst channel of any part."""
    outlier_tokens: int

    @property
    def bytes_per_caption(self) -> float:
        """Of captions that are not empty."""
        return self.bytes / max(1, self.captions - self.empty)

    @property
    def tokens_per_second(self) -> float:
        """Of one process."""
        return self.tokens / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        savings = ", ".join(f"{words} {self.saved[name]:.1%}" for name, words in SAVINGS.items())
        return (
            f"text family {self.name}: {self.parts:,} parts, {self.captions:,} captions ({self.empty:,} empty, "
            f"{self.truncated:,} cut at max_tokens), {self.bytes:,} bytes, {self.bytes_per_caption:,.0f} a caption, "
            f"{self.tokens_per_second:,.0f} tokens/s a process\n"
            f"  of the plain way's work, saved: {savings}; run: {self.work:.1%}\n"
            f"  error a channel, of its spread: mean {self.error_mean:.2%}, worst {self.error_worst:.2%}; "
            f"{self.outlier_tokens:,} of {self.tokens:,} tokens coarser than usual by an outlier"
        )


def summarize(name: str, commits: Iterable[Commit]) -> TextReport:
    """Add up the commits of a text family."""
    found = [commit for commit in commits if commit.rows]
    total: Counter[str] = Counter()
    for commit in found:
        total.update(commit.counts)  # pyright: ignore[reportArgumentType]
    saved = {saving: total[f"block_tokens_saved_{saving}"] for saving in SAVINGS}
    run = total["block_tokens_run"]
    plain = max(1, run + sum(saved.values()))
    measured = [commit.counts for commit in found if commit.counts.get("error_tokens")]
    tokens_measured = sum(counts["error_tokens"] for counts in measured)
    return TextReport(
        name,
        len(found),
        int(total["captions"]),
        int(total["empty_captions"]),
        int(total["truncated"]),
        int(total["tokens"]),
        sum(file.bytes for commit in found for file in commit.files),
        total["seconds"],
        {saving: count / plain for saving, count in saved.items()},
        run / plain,
        sum(counts["error_mean"] * counts["error_tokens"] for counts in measured) / max(1, tokens_measured),
        max((counts["error_worst"] for counts in measured), default=0.0),
        int(total["outlier_tokens"]),
    )


def print_text_report(dataset: Store, name: str, share: Share) -> None:
    """Print what a task's share of a text family took, whoever encoded it."""
    there = committed_parts(dataset, name)
    print(summarize(name, [read_commit(dataset, name, part) for part in share.owns(read_plan(dataset).parts) if part in there]))


def text_reports(dataset: Store) -> list[TextReport]:
    """Every text family, over all of its committed parts."""
    names = [name for name, family in read_families(dataset).items() if family.kind == "text"]
    return [summarize(name, committed(dataset, name).values()) for name in names]
