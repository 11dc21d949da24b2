"""The costs and savings of a text family, from the counts in the commits of its parts.

The baseline is plain encoding: whole prompts, padded, through every layer. Work is counted in tokens x
    blocks.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.dataset.parts import commits_of_share, committed
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
"""Names in `block_tokens_saved_<name>`, the counts of the work that was saved, and their descriptions."""


@dataclass(frozen=True)
class TextReport:
    """A text family, or one task's share of it."""

    name: str
    parts: int
    captions: int
    empty: int
    """Captions without a token."""
    truncated: int
    """Captions cut at `max_tokens`."""
    tokens: int
    """Stored tokens. Equal captions count each time."""
    bytes: int
    """Size of the payload files."""
    seconds: float
    """Time of all processes together."""
    saved: dict[str, float]
    """Saving -> share of the baseline's work."""
    work: float
    """Share of the baseline's work that was run."""
    error_mean: float
    """Root mean square quantization error, in units of the channel's std, over captions outside the
    calibration sample: mean of all channels."""
    error_worst: float
    """The same for the worst channel of any part."""
    outlier_tokens: int

    @property
    def bytes_per_caption(self) -> float:
        """Bytes per caption that is not empty."""
        return self.bytes / max(1, self.captions - self.empty)

    @property
    def tokens_per_second(self) -> float:
        """Speed of one process."""
        return self.tokens / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        savings = ", ".join(f"{words} {self.saved[name]:.1%}" for name, words in SAVINGS.items())
        return (
            f"text family {self.name}: {self.parts:,} parts, {self.captions:,} captions "
            f"({self.empty:,} empty, {self.truncated:,} cut at max_tokens), {self.bytes:,} bytes, "
            f"{self.bytes_per_caption:,.0f} per caption, {self.tokens_per_second:,.0f} tokens/s per process\n"
            f"  work saved, compared with whole padded prompts through every layer: {savings}; "
            f"run: {self.work:.1%}\n"
            f"  error per channel, relative to its std: mean {self.error_mean:.2%}, "
            f"worst {self.error_worst:.2%}; {self.outlier_tokens:,} of {self.tokens:,} tokens "
            "quantized more coarsely because of an outlier"
        )


def payload_bytes(commits: Iterable[Commit]) -> int:
    """Return the size of the payload files of some parts."""
    total = 0
    for commit in commits:
        total += sum(file.bytes for file in commit.files)
    return total


def summarize(name: str, commits: Iterable[Commit]) -> TextReport:
    """Add up the commits of a text family."""
    # Parts without pairs were never encoded and have no counts.
    filled = [commit for commit in commits if commit.rows]
    total: Counter[str] = Counter()
    for commit in filled:
        total.update(commit.counts)  # pyright: ignore[reportArgumentType]

    # Whatever was not run was saved, so both add up to the baseline.
    saved = {saving: total[f"block_tokens_saved_{saving}"] for saving in SAVINGS}
    run = total["block_tokens_run"]
    baseline = max(1, run + sum(saved.values()))

    # Means are weighted by the tokens that they were measured on; parts of cached captions have none.
    measured = [commit.counts for commit in filled if commit.counts.get("error_tokens")]
    error_tokens = sum(counts["error_tokens"] for counts in measured)
    error_sum = sum(counts["error_mean"] * counts["error_tokens"] for counts in measured)
    return TextReport(
        name=name,
        parts=len(filled),
        captions=int(total["captions"]),
        empty=int(total["empty_captions"]),
        truncated=int(total["truncated"]),
        tokens=int(total["tokens"]),
        bytes=payload_bytes(filled),
        seconds=total["seconds"],
        saved={saving: count / baseline for saving, count in saved.items()},
        work=run / baseline,
        error_mean=error_sum / max(1, error_tokens),
        # The worst channel is a maximum, which needs no weights.
        error_worst=max((counts["error_worst"] for counts in measured), default=0.0),
        outlier_tokens=int(total["outlier_tokens"]),
    )


def print_text_report(dataset: Store, name: str, share: Share) -> None:
    """Print the report of the parts in a task's share, including those that another task encoded."""
    print(summarize(name, commits_of_share(dataset, name, share)))


def text_reports(dataset: Store) -> list[TextReport]:
    """Return a report per text family, over all of its committed parts."""
    names = [name for name, family in read_families(dataset).items() if family.kind == "text"]
    return [summarize(name, committed(dataset, name).values()) for name in names]
