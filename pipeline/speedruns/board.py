"""The leaderboard of the speedrun: a page of markdown, and a figure of each track's learning curves."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from model.common.files import write_atomic
from pipeline.reporting.curves import Line, curve
from pipeline.speedruns.record import Record, seconds_to, seconds_to_target
from pipeline.speedruns.track import PROMPTS, TARGET, TRACKS


def write_board(page: Path, records: Sequence[Record]) -> None:
    """Write the leaderboard, and beside it `speedrun_<track>.svg` of each track with records.

    Args:
        page: the markdown file to write.
        records: checked ones.
    """
    write_atomic(page, leaderboard(records))
    for name in TRACKS:
        if own := in_order(records, name):
            write_atomic(page.with_name(figure_name(name)), learning_curves(own))


def figure_name(track: str) -> str:
    """Return the file name of a track's learning curves."""
    return f"speedrun_{track}.svg"


def in_order(records: Sequence[Record], track: str) -> list[Record]:
    """Return a track's records in the order in which they were set: each is faster than the one before."""
    own = [record for record in records if record["track"] == track]
    return sorted(own, key=lambda record: -_seconds(record))


def learning_curves(records: Sequence[Record]) -> str:
    """Return an SVG of the share of right segments over minutes, the seeds' mean with lowest and highest.

    Args:
        records: of one track, slowest first.
    """
    lines: dict[str, Line] = {}
    bands: dict[str, Line] = {}
    for record in records:
        minutes, shares = score_points(record)
        label = f"{record['name']}, {_seconds(record) / 60:.1f} minutes"
        lines[label] = minutes, [100 * statistics.fmean(each) for each in shares]
        bands[label] = [100 * min(each) for each in shares], [100 * max(each) for each in shares]

    axes = ("minutes of training steps", "right segments, %")
    return curve("", "", lines, axes, bottom=0.0, bands=bands, level=100 * TARGET)["svg"]


def score_points(record: Record) -> tuple[list[float], list[list[float]]]:
    """Return mean minutes of each number of samples at which every seed was scored, and the seeds' shares."""
    minutes: list[float] = []
    shares: list[list[float]] = []
    # A seed ends at the target, so the later scores of slower seeds have no mean.
    for scores in zip(*(log["scores"] for log in record["runs"]), strict=False):
        seconds = [seconds_to(log, each["samples"]) for log, each in zip(record["runs"], scores, strict=True)]
        minutes.append(statistics.fmean(seconds) / 60)
        shares.append([each["segment"] for each in scores])
    return minutes, shares


def leaderboard(records: Sequence[Record]) -> str:
    """Return the tables of all tracks: records in the order in which they were set, each with its gain.

    Args:
        records: checked ones.
    """
    lines = [
        "# Speedrun",
        "",
        f"Seconds of training steps from fresh weights to {TARGET:.0%} of the segments right on {PROMPTS} "
        "held-out prompts, mean of the seeds; the rules are in `docs/speedrun.md`.",
    ]
    for name, track in TRACKS.items():
        lines += ["", f"## Track {name}: {track.hardware}", ""]

        own = in_order(records, name)
        if not own:
            lines.append("No record yet.")
            continue

        lines += [f"![Learning curves of the records]({figure_name(name)})", ""]
        lines += ["| record | minutes | by seed | gain | change | conditions |", "|---|---|---|---|---|---|"]
        before: Record | None = None
        for record in own:
            gain = "" if before is None else f"{1 - _seconds(record) / _seconds(before):.0%}"
            seeds = ", ".join(f"{(seconds_to_target(log) or 0.0) / 60:.1f}" for log in record["runs"])
            cells = [
                record["name"],
                f"{_seconds(record) / 60:.1f}",
                seeds,
                gain,
                record["change"],
                record["conditions"],
            ]
            lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
            before = record

    return "\n".join(lines) + "\n"


def _seconds(record: Record) -> float:
    # `read_checked` has refused records without.
    assert record["seconds"] is not None
    return record["seconds"]


def _cell(text: str) -> str:
    """Return a text that stays in its cell."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
