"""Records of the speedrun: the log of each seed's run, and the seconds to the target that follow from it."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from model.common.errors import UserError
from model.common.files import write_atomic
from model.common.records import STRICT, Count, read_record, seal
from pipeline.runtime.run_log import latest_reports, read_events, read_reports, seconds_in_steps
from pipeline.speedruns.track import MIN_SEEDS, PROMPTS, TARGET, find_track, load_entry

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Report(TypedDict):
    """A report of the trainer, over the steps since the one before."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    step: Count
    samples: Count
    loss: float
    samples_per_second: Positive


class Scores(TypedDict):
    """Scores of the images of the held-out prompts by the exact scorer, as shares of 1."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    samples: Count
    segment: Share
    """Segments with all of their claims right: the measure of the speedrun."""
    colour: Share
    shape: Share
    count: NotRequired[Share]
    """Share of the right groups of several objects. Attributes that no prompt states have no score."""
    size: NotRequired[Share]
    texture: NotRequired[Share]


class SeedLog(TypedDict):
    """The log of one seed's run."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    seed: Count
    snapshot: str
    reports: list[Report]
    scores: list[Scores]


class Record(TypedDict):
    """A record, as its file holds it."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    format: Literal[1]
    track: str
    name: str
    change: str
    """The idea, in a sentence."""
    settings: list[str]
    """`key=value` over the track's stage."""
    conditions: str
    """Date, hardware and versions."""
    runs: list[SeedLog]
    seconds: Positive | None
    """Mean over the seeds of the seconds to the target; None if a seed did not reach it."""


def read_log(run: Path, seed: int) -> SeedLog:
    """Return the log of a finished or running run.

    Args:
        run: its folder.
        seed: its `data.seed`.
    """
    reports: list[Report] = []
    for line in read_reports(run):
        if line.get("samples_per_second"):
            report: Any = {name: line[name] for name in Report.__annotations__}
            reports.append(report)

    scores: dict[int, Scores] = {}
    for event in read_events(run, "scenes"):
        known: Any = {name: event[name] for name in Scores.__annotations__ if name in event}
        # A run that was continued from an earlier checkpoint scored some samples again.
        scores[event["samples"]] = known

    starts = read_events(run, "start")
    snapshot = str(starts[0].get("snapshot", "")) if starts else ""

    return {
        "seed": seed,
        "snapshot": snapshot,
        "reports": reports,
        "scores": [scores[samples] for samples in sorted(scores)],
    }


def seconds_to(log: SeedLog, samples: int) -> float:
    """Return the seconds in training steps up to a number of samples; images and starts do not count."""
    until: list[dict[str, Any]] = [dict(report) for report in log["reports"] if report["samples"] <= samples]
    seconds = seconds_in_steps(latest_reports(until))
    covered = until[-1]["samples"] if until else 0
    if samples <= covered:
        return seconds

    # The score is between two reports: the next one's speed holds there.
    later = [report for report in log["reports"] if report["samples"] > samples]
    if not later:
        raise UserError(f"seed {log['seed']}: no report after {samples:,} samples: the log is cut")

    return seconds + (samples - covered) / later[0]["samples_per_second"]


def samples_to_target(log: SeedLog) -> int | None:
    """Return the samples at the first score that reaches the target; None if none does."""
    return next((scores["samples"] for scores in log["scores"] if scores["segment"] >= TARGET), None)


def seconds_to_target(log: SeedLog) -> float | None:
    """Return the seconds to the first score that reaches the target; None if none does."""
    samples = samples_to_target(log)
    return None if samples is None else seconds_to(log, samples)


def has_reached(log: SeedLog) -> bool:
    """Return True if a score reaches the target, and a report after it times it."""
    samples = samples_to_target(log)
    return samples is not None and any(report["samples"] >= samples for report in log["reports"])


def mean_seconds(runs: Sequence[SeedLog]) -> float | None:
    """Return the mean of the seconds to the target; None if a seed did not reach it."""
    seconds = [seconds_to_target(log) for log in runs]
    reached = [value for value in seconds if value is not None]
    return statistics.fmean(reached) if reached and len(reached) == len(seconds) else None


def write_record(path: Path, record: Record) -> None:
    """Write a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, seal(dict(record)))


def read_checked(path: Path) -> Record:
    """Read a record, and check that it keeps the rules and that its seconds follow from its log.

    Raises:
        UserError: if it does not.
    """
    record = read_record(path, Record, "make it again with `python -m pipeline.speedrun run`")
    stage = load_entry(find_track(record["track"]), record["settings"])
    runs = record["runs"]

    # the rules
    seeds = {log["seed"] for log in runs}
    if len(seeds) < len(runs) or len(seeds) < MIN_SEEDS:
        raise UserError(f"{path}: {len(seeds)} different seeds, and {MIN_SEEDS} are needed")
    if len({log["snapshot"] for log in runs}) > 1:
        raise UserError(f"{path}: its runs read different snapshots: run all seeds on the same data")
    if stage.sample.scenes != PROMPTS:
        raise UserError(f"{path}: judged on {stage.sample.scenes} prompts, not {PROMPTS}")

    # the log of each seed
    for log in runs:
        samples = [report["samples"] for report in log["reports"]]
        if samples != sorted(set(samples)):
            raise UserError(f"{path}: the reports of seed {log['seed']} are not in order")
        if any(scores["samples"] > stage.samples + stage.global_batch for scores in log["scores"]):
            raise UserError(f"{path}: seed {log['seed']} has scores beyond the end of its stage")

    # the clock
    seconds = mean_seconds(runs)
    if seconds is None or record["seconds"] is None:
        raise UserError(f"{path}: not every seed has {TARGET:.0%} of the segments right: this is no record")
    if abs(seconds - record["seconds"]) > 0.1:
        raise UserError(f"{path}: its log says {seconds:.1f} seconds, not {record['seconds']:.1f}")

    return record
