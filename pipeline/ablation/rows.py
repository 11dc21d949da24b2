"""Rows of an ablation: the settings of each, its results over the seeds, and which orderings hold."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NotRequired

from scipy.stats import t as student
from typing_extensions import TypedDict

from data_prep.dataset.schema import Snapshot
from model.common.errors import UserError
from model.common.records import OPEN, read_record
from model.common.settings import read_settings
from pipeline.ablation.paired import Difference, Segments, paired_difference
from pipeline.stage.config import StageConfig, load_run, load_stage

PAPER_ROWS = Path(__file__).with_name("paper.yaml")


@dataclass
class Row:
    """One row: a stage with settings that override its own."""

    title: str = ""
    settings: list[str] = field(default_factory=list)
    """`key=value` settings of the stage."""
    paper: float | None = None
    """The paper's result: T2I-avg, the mean of T2I-CompBench color, shape, texture; None = not reported."""


@dataclass
class Ablation:
    """Rows, and the tables that show them. A row is trained once, however many tables show it."""

    families: dict[str, str] = field(default_factory=dict)
    """Role -> text family of the dataset, for `${families.role}` in the settings of rows."""
    rows: dict[str, Row] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    """Title -> names of the rows."""
    pairs: dict[str, list[list[str]]] = field(default_factory=dict)
    """Title -> pairs of rows, the one that is expected to be above first; those that the paper orders are
    compared without being named here."""


def read_ablation(path: Path, overrides: list[str], only: Sequence[str]) -> Ablation:
    """Read the rows.

    Args:
        path: YAML of `families`, `rows`, `tables`; without `tables`, all rows are one table.
        overrides: `key=value` settings of the YAML, such as `families.a=smollm2`.
        only: rows to keep; empty = all.

    Raises:
        UserError: if the file does not exist or has an unknown key, or a table or `only` names an unknown
            row.
    """
    ablation: Ablation = read_settings(Ablation, path, overrides)
    ablation.tables = ablation.tables or {path.stem: list(ablation.rows)}
    for title, pairs in ablation.pairs.items():
        if title not in ablation.tables or any(len(pair) != 2 for pair in pairs):
            raise UserError(f"pairs of `{title}` in {path}: give pairs of two rows of one of the tables")
    for name in chain(only, *ablation.tables.values(), *chain.from_iterable(ablation.pairs.values())):
        if name not in ablation.rows:
            raise UserError(f"row `{name}` does not exist in {path}: it has {', '.join(ablation.rows)}")

    # rows before tables: a table that loses all of its rows disappears
    chosen = set(only or ablation.rows)
    ablation.rows = {name: row for name, row in ablation.rows.items() if name in chosen}
    tables: dict[str, list[str]] = {}
    for title, rows in ablation.tables.items():
        chosen_rows = [name for name in rows if name in chosen]
        if chosen_rows:
            tables[title] = chosen_rows
    ablation.tables = tables

    return ablation


class Score(TypedDict):
    """`score.json`: results of a run."""

    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]

    score: float
    """Prompt following in [0, 1]."""
    attributes: dict[str, float]
    """Shares of right claims."""
    chance: dict[str, float]
    """The same of images against other prompts."""
    segments: list[list[float]]
    """Scores of each prompt's segments."""
    contrast: NotRequired[dict[str, list[float]]]
    """Kind of contrast -> score of each of its prompts, or pairs of prompts."""
    loss: float | None
    """Last validation loss."""
    seconds: NotRequired[float]


@dataclass(frozen=True)
class Job:
    """One training run of an ablation: a row with a seed."""

    row: str
    seed: int
    stage: StageConfig

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.stage.run

    def score(self) -> Score | None:
        """Return the run's results, or None before it is trained and scored."""
        file = self.run / "score.json"
        return read_record(file, Score, "remove it and run again") if file.exists() else None

    @property
    def prompts(self) -> Path:
        """File of the prompts that the run generated images of, one per line."""
        return self.run / "prompts.txt"

    def check(self, prompts: Sequence[str]) -> None:
        """Compare settings and prompts with those that an earlier start of this run stored.

        Raises:
            UserError: if they differ: the table's rows would not have equal data, steps, seeds and prompts.
        """
        if (self.run / "stage.yaml").exists():
            before = _flatten(asdict(load_run(self.run)))
            now = _flatten(asdict(self.stage))
            # settings that only the old file has are those of an older version and do not count
            changed = [f"{key}={value}" for key, value in now.items() if before.get(key) != value]
            if changed:
                raise UserError(
                    f"{self.run} was trained with other settings than are asked for now ({changed[0]}): "
                    "remove that folder, or give name=... for another ablation"
                )

        # images of other prompts would be scored with the wrong captions
        if self.prompts.exists() and self.prompts.read_text(encoding="utf-8").splitlines() != list(prompts):
            raise UserError(
                f"{self.run} has images of other prompts: give --scored, --segments and --contrast as then, "
                "or remove that folder"
            )


def _flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as dotted key -> value."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}.{key}".lstrip("."))
    return flat


def make_jobs(
    stage: str, settings: list[str], ablation: Ablation, seeds: int, snapshot: Snapshot
) -> tuple[list[Job], list[str]]:
    """Return all runs of the ablation, seed by seed, so that a table fills evenly.

    Args:
        stage: name or path of the stage.
        settings: `key=value` settings of the stage.
        ablation: the rows.
        seeds: number of runs per row.
        snapshot: snapshot that all runs read.

    Returns:
        The runs, and a line about each row that was left out because the snapshot lacks a text family.
    """
    base = load_stage(stage, settings)
    folder = f"{base.runs}/{base.name}_ablation"
    missing: dict[str, str] = {}
    jobs: list[Job] = []
    for seed in range(seeds):
        for name, row in ablation.rows.items():
            # last, so that they win: a row cannot change its data, seed or folder
            own = [
                f"runs={folder}/{name}",
                f"name=seed_{seed}",
                f"data.seed={seed}",
                f"data.snapshot={snapshot.id}",
            ]
            # the row's settings override the user's, so that rows differ as planned
            config = load_stage(stage, [*settings, *row.settings, *own])
            absent = [family for family in config.fusion.families if family not in snapshot.families]
            # the row is named in the report, which so shows why a table is shorter than the paper's
            if absent:
                missing[name] = absent[0]
            else:
                jobs.append(Job(name, seed, config))
    left_out = [f"{ablation.rows[name].title}: no text family `{family}`" for name, family in missing.items()]

    return jobs, left_out


@dataclass(frozen=True)
class SeedMean:
    """Mean of a score over seeds, with the half width of its 95 % interval (Student's t)."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "SeedMean":
        """Compute the mean of one value per seed; the half width of a single seed is infinite."""
        values = list(values)
        count = len(values)
        if count < 2:
            return cls(mean(values), math.inf, count)
        # 0.975 leaves 2.5 % on each side; t and not the normal one, since seeds are few
        half = float(student.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count)
        return cls(mean(values), half, count)

    @classmethod
    def between(cls, better: Mapping[int, float], worse: Mapping[int, float]) -> "SeedMean | None":
        """Return the mean difference of one value per seed over the seeds that both have; None without any.

        Differences are taken seed by seed: with equal data and seeds, two rows share part of their noise.
        """
        seeds = sorted(better.keys() & worse.keys())
        return cls.of(better[seed] - worse[seed] for seed in seeds) if seeds else None

    def text(self, scale: float, decimals: int) -> str:
        """Return mean ± half width, times `scale`."""
        half = "" if math.isinf(self.half) else f" ± {scale * self.half:.{decimals}f}"
        return f"{scale * self.mean:.{decimals}f}{half}"

    def __str__(self) -> str:
        """Percent."""
        return self.text(100, 1)


@dataclass(frozen=True)
class Ordering:
    """Two rows of which somebody says that `better` is above `worse`, and their difference here."""

    better: str
    worse: str
    difference: Difference
    contrast: dict[str, Difference] = field(default_factory=dict)
    """Kind of contrast -> difference of its scores."""

    @property
    def verdict(self) -> str:
        """`holds` or `reversed` if the interval of the difference does not contain zero, else `undecided`."""
        if not self.difference.decided:
            return "undecided"
        return "holds" if self.difference.mean > 0 else "reversed"


def orderings(ablation: Ablation, scores: dict[str, dict[int, Score]]) -> dict[str, list[Ordering]]:
    """Compare all pairs of rows that the paper orders, and those of `pairs`.

    Args:
        ablation: rows and tables.
        scores: row -> seed -> results, as far as measured.

    Returns:
        Table -> pairs of its rows that have scores.
    """
    by_table: dict[str, list[Ordering]] = {}
    for title, names in ablation.tables.items():
        pairs = [*_ordered_by_paper(ablation, names), *ablation.pairs.get(title, [])]
        by_table[title] = []
        for better, worse in pairs:
            rows = scores.get(better, {}), scores.get(worse, {})
            difference = paired_difference(*(_segments(row) for row in rows))
            if difference is not None:
                by_table[title].append(Ordering(better, worse, difference, _contrast(*rows)))

    return by_table


def _segments(row: dict[int, Score]) -> dict[int, Segments]:
    return {seed: record["segments"] for seed, record in row.items()}


def _contrast(better: dict[int, Score], worse: dict[int, Score]) -> dict[str, Difference]:
    """Return the difference for each kind of contrast that all runs have."""
    measured = [run.get("contrast", {}) for run in (*better.values(), *worse.values())]
    differences: dict[str, Difference] = {}
    for kind in set(measured[0]).intersection(*measured[1:]):
        difference = paired_difference(_contrast_segments(better, kind), _contrast_segments(worse, kind))
        if difference is not None:
            differences[kind] = difference
    return dict(sorted(differences.items()))


def _contrast_segments(row: dict[int, Score], kind: str) -> dict[int, Segments]:
    """Return the scores of a row as those of prompts with a single segment."""
    segments: dict[int, Segments] = {}
    for seed, run in row.items():
        segments[seed] = [[value] for value in run.get("contrast", {})[kind]]
    return segments


def _ordered_by_paper(ablation: Ablation, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of rows that have numbers in the paper, the better one first."""
    numbers = {name: ablation.rows[name].paper for name in names}
    for first, second in combinations([name for name in names if numbers[name] is not None], 2):
        # In the paper's order, so that a positive difference agrees with the paper.
        yield (first, second) if numbers[first] > numbers[second] else (second, first)  # type: ignore[operator]
