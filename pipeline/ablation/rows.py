"""Rows of an ablation: which settings each has, what each reached over its seeds, and which orderings hold."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

from data_prep.dataset.schema import Snapshot
from model.common.errors import UserError
from model.common.settings import read_settings
from pipeline.stage.config import StageConfig, load_run, load_stage

PAPER_ROWS = Path(__file__).with_name("paper.yaml")


@dataclass
class Row:
    """One row: a stage with settings over it."""

    title: str = ""
    settings: list[str] = field(default_factory=list)
    """`key=value` over the stage."""
    paper: float | None = None
    """What the paper reports for this row, where it does (T2I-avg: the mean of T2I-CompBench colour, shape, texture)."""


@dataclass
class Ablation:
    """Rows, and the tables that show them; a row is trained once, however many tables show it."""

    families: dict[str, str] = field(default_factory=dict)
    """Role -> text family of the dataset, for `${families.role}` in the settings of rows."""
    rows: dict[str, Row] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)


def read_ablation(path: Path, overrides: list[str], only: Sequence[str]) -> Ablation:
    """Read the rows.

    Args:
        path: YAML of `families`, `rows`, `tables`; without `tables` all rows make one.
        overrides: `key=value` over it, such as `families.a=smollm2`.
        only: rows to keep; empty = all.

    Raises:
        UserError: no such file, an unknown key, a row that a table or `only` names but that does not exist.
    """
    ablation: Ablation = read_settings(Ablation, path, overrides)
    ablation.tables = ablation.tables or {path.stem: list(ablation.rows)}
    for name in [*only, *(row for rows in ablation.tables.values() for row in rows)]:
        if name not in ablation.rows:
            raise UserError(f"row `{name}` does not exist in {path}: it has {', '.join(ablation.rows)}")
    kept = set(only or ablation.rows)
    ablation.rows = {name: row for name, row in ablation.rows.items() if name in kept}
    ablation.tables = {title: [name for name in rows if name in kept] for title, rows in ablation.tables.items()}
    ablation.tables = {title: rows for title, rows in ablation.tables.items() if rows}
    return ablation


@dataclass(frozen=True)
class Job:
    """One training run of an ablation: a row with a seed."""

    row: str
    seed: int
    stage: StageConfig

    @property
    def run(self) -> Path:
        """Folder of this run."""
        return self.stage.run

    def score(self) -> dict[str, Any] | None:
        """What the run reached; None before it is trained and scored."""
        file = self.run / "score.json"
        return json.loads(file.read_text()) if file.exists() else None

    @property
    def prompts(self) -> Path:
        """What the run was asked to draw, one prompt a line."""
        return self.run / "prompts.txt"

    def check(self, prompts: Sequence[str]) -> None:
        """Hold settings and prompts against those that an earlier start of this run kept.

        Raises:
            UserError: they differ, so the rows of the table would not have equal data, steps, seeds and prompts.
        """
        if (self.run / "stage.yaml").exists():
            now, before = _flat(asdict(self.stage)), _flat(asdict(load_run(self.run)))
            changed = [f"{key}={value}" for key, value in now.items() if before.get(key) != value]
            if changed:
                raise UserError(
                    f"{self.run} was trained with other settings than are asked for now ({changed[0]}): "
                    "remove that folder, or give name=... for another ablation"
                )
        if self.prompts.exists() and self.prompts.read_text(encoding="utf-8").splitlines() != list(prompts):
            raise UserError(f"{self.run} drew other prompts: give --scored and --segments as then, or remove that folder")


def _flat(settings: Any, above: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(settings, dict):
        return {above: settings}
    parts = [_flat(value, f"{above}.{key}".lstrip(".")) for key, value in settings.items()]
    return {key: value for part in parts for key, value in part.items()}


def make_jobs(
    stage: str, settings: list[str], ablation: Ablation, seeds: int, snapshot: Snapshot
) -> tuple[list[Job], list[str]]:
    """All runs of the ablation, seed by seed, so that a table fills evenly; and the rows left out for want of a family."""
    base = load_stage(stage, settings)
    folder = f"{base.runs}/{base.name}_ablation"
    missing = {}
    jobs = []
    for seed in range(seeds):
        for name, row in ablation.rows.items():
            own = [f"runs={folder}/{name}", f"name=seed_{seed}", f"data.seed={seed}", f"data.snapshot={snapshot.id}"]
            config = load_stage(stage, [*settings, *row.settings, *own])
            absent = [family for family in config.fusion.families if family not in snapshot.families]
            if absent:
                missing[name] = absent[0]
            else:
                jobs.append(Job(name, seed, config))
    return jobs, [f"{ablation.rows[name].title}: no text family `{family}`" for name, family in missing.items()]


@dataclass(frozen=True)
class SeedMean:
    """Mean of a score over seeds, with the half width of its 95 % interval (Student's t)."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Estimate":
        """From one value per seed; one seed alone has no interval, which is infinite then."""
        given = list(values)
        if len(given) < 2:
            return cls(mean(given), math.inf, len(given))
        return cls(mean(given), float(student.ppf(0.975, len(given) - 1)) * stdev(given) / math.sqrt(len(given)), len(given))

    def text(self, scale: float, decimals: int) -> str:
        """Mean ± half width, times `scale`."""
        half = "" if math.isinf(self.half) else f" ± {scale * self.half:.{decimals}f}"
        return f"{scale * self.mean:.{decimals}f}{half}"

    def __str__(self) -> str:
        """Percent."""
        return self.text(100, 1)


def paired_difference(better: dict[int, float], worse: dict[int, float]) -> SeedMean | None:
    """Difference of two rows over the seeds that both have: with equal data and seeds a row's noise is partly the other's."""
    seeds = sorted(better.keys() & worse.keys())
    return SeedMean.of(better[seed] - worse[seed] for seed in seeds) if seeds else None


@dataclass(frozen=True)
class Ordering:
    """Whether one of the paper's orderings holds here: `better` above `worse`, as the paper has them."""

    better: str
    worse: str
    difference: SeedMean

    @property
    def verdict(self) -> str:
        """`holds` and `reversed` where the interval of the difference leaves out zero, else `undecided`."""
        if abs(self.difference.mean) <= self.difference.half:
            return "undecided"
        return "holds" if self.difference.mean > 0 else "reversed"


def orderings(ablation: Ablation, scores: dict[str, dict[int, float]]) -> dict[str, list[Ordering]]:
    """Table -> each pair of its rows that the paper orders and that has been measured here (row -> seed -> score)."""
    found = {}
    for title, names in ablation.tables.items():
        pairs = []
        for one, other in combinations(names, 2):
            papers = ablation.rows[one].paper, ablation.rows[other].paper
            if papers[0] is None or papers[1] is None or one not in scores or other not in scores:
                continue
            better, worse = (one, other) if papers[0] > papers[1] else (other, one)
            difference = paired_difference(scores[better], scores[worse])
            if difference is not None:
                pairs.append(Ordering(better, worse, difference))
        found[title] = pairs
    return found
