"""The leaderboard of the speedrun, as markdown."""

from collections.abc import Sequence

from pipeline.speedruns.record import Record, seconds_to_target
from pipeline.speedruns.track import PROMPTS, TARGET, TRACKS


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

        own = sorted(
            (record for record in records if record["track"] == name), key=lambda record: -_seconds(record)
        )
        if not own:
            lines.append("No record yet.")
            continue

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
