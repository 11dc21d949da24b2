"""Tables and goals of the benchmark of preparation at scale, from its figures."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.prepare_data import BILLION, COMMIT_ROWS, FILE_ROWS, KINDS, PART_ROWS
from benchmarks.prepare_requests import Counted, requests_per_part, requests_table
from data_prep.plan import dedupe, duplicates, finish, windows

if TYPE_CHECKING:
    from benchmarks.reporting import Goal

STEP_NAMES = ("plan", "plan, near", "snapshot", "snapshot again", "verify, 1 of 16", "gc", "report")
OF_COMMITS = STEP_NAMES[2:]
COMMITS = 1_000_000
"""Commits of a billion pairs in parts of 4,096 rows, four kinds."""
CORES, VERIFY_TASKS = 32, 16
GROUP_ROWS = BILLION // finish.WANTED_GROUPS
"""Rows of a group of a billion rows."""
RANGE_ROWS = 13_000_000
"""Maximum of a range of hashes: `finish.RANGE_BYTES` of rows of 40 bytes."""
BY_GROUP = ("hashes", "kept", "copies", "rows")
DISTANCE = 3
NOTES = (
    "CPU seconds are without imports. Figures of a billion rows and of a million commits are extrapolated:",
    "`plan` by its time per row at the largest size, with the passes and slices of a billion rows for near",
    "duplicates, without requests and their latency; steps that read commits by the line through the",
    "smallest and the largest size. `plan` has groups of the size that those of a billion rows have, as far",
    "as there are so many rows. A unit is what a kill repeats; its seconds are without the write of its",
    "object. The store is a local folder, so the steps that read commits include walking it. On S3 a request",
    "adds its latency, and with boto3 about 2 ms of CPU. A comparison is a Hamming distance that is",
    "computed, of all 20 passes together; equal hashes are found by sorting. The first snapshot finds no",
    "roll-ups; if tasks of `pairs` and of the families have left theirs, it costs about what the repeated",
    "one does. GETs per second, and path-only rows under latency, are measured by `benchmarks.small_gets`.",
    "Not measured: a real endpoint.",
)


class Unit(NamedTuple):
    """Units of a step of the finish."""

    number: int
    total: float
    """CPU seconds of all."""
    longest: float


class Cost(NamedTuple):
    """Cost of a step."""

    cpu: float
    """CPU seconds, without those of imports."""
    peak: float
    """Bytes."""
    requests: dict[str, int]
    units: dict[str, Unit]


class Figures(NamedTuple):
    """All that is measured."""

    costs: dict[int, dict[str, Cost]]
    """Rows -> step -> cost."""
    compared: dict[str, list[tuple[int, float, float]]]
    """Kind of hashes -> rows, comparisons per row, and the part of the rows that is found."""
    sliced: float
    """CPU seconds per row of another slice that a unit of the near duplicates reads."""
    counted: Sequence[Counted]
    """Requests to a server."""

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows, ascending."""
        return sorted(self.costs)

    @property
    def largest(self) -> dict[str, Cost]:
        """Costs at the largest size."""
        return self.costs[self.sizes[-1]]


def formulas(rows: int, cost: dict[str, Cost]) -> Iterator[tuple[str, str, int, int]]:
    """Yield step, formula, its value, and the requests counted at a local folder."""
    files, parts = -(-rows // FILE_ROWS), rows // COMMIT_ROWS
    total = {step: sum(entry.requests.values()) for step, entry in cost.items()}
    groups = 1 + rows // GROUP_ROWS
    value = 3 * files + rows // 2**20 + rows // (PART_ROWS * 16) + 10 * groups + groups * groups + 60
    yield "plan", "3 F GET, F PUT (dropped), P / 16 PUT, some per group", value + files, total["plan"]
    objects = KINDS * parts
    # Pairs have two payloads.
    lists = (objects + parts) // 1000 + KINDS
    value = objects + 4 * lists + 60
    yield "snapshot", "K P GET, LIST K P / 1000 (no roll-up yet)", value, total["snapshot"]
    yield (
        "snapshot again",
        "LIST 2 K P / 1000, a GET per roll-up",
        4 * lists + 40,
        total["snapshot again"],
    )
    share = objects // VERIFY_TASKS + 3 * lists + 60
    yield "verify, 1 of 16", "K P / 16 GET, LIST 2 K P / 1000", share, total["verify, 1 of 16"]
    yield "gc", "LIST all, a GET per roll-up", 6 * lists + files // 500 + 60, total["gc"]
    # 64 tables for the histograms, 32 of dropped rows, and the first part of a bucket.
    yield "report", "LIST 2 K P / 1000, a GET per roll-up, 120 GET", 8 * lists + 240, total["report"]


def cost_table(figures: Figures) -> list[str]:
    """Return the lines of CPU, memory and requests of all steps."""
    lines = ["| step | rows | CPU s | us per row | peak MB | requests of a local folder |"]
    lines.append("|---|---|---|---|---|---|")
    for step in STEP_NAMES:
        for rows in figures.sizes:
            cost = figures.costs[rows][step]
            requests = ", ".join(f"{count:,} {kind}" for kind, count in sorted(cost.requests.items()))
            per_row = 1e6 * cost.cpu / rows
            lines.append(
                f"| {step} | {rows:,} | {cost.cpu:.1f} | {per_row:.2f} | {cost.peak / 1e6:.0f} | {requests} |"
            )
    return lines


def formula_table(figures: Figures) -> list[str]:
    """Return the lines of the requests of a local folder beside their formulas."""
    lines = ["| step | formula | at most | counted |", "|---|---|---|---|"]
    for step, formula, bound, counted in formulas(figures.sizes[-1], figures.largest):
        lines.append(f"| {step} | {formula} | {bound:,} | {counted:,} |")
    return lines


def minutes_of_units(figures: Figures) -> dict[str, tuple[Unit, float]]:
    """Return the units of each step of the finish with the minutes of the longest one of a billion rows.

    Minutes of CPU at the largest size, scaled up where its units have fewer rows than those of a billion.
    """
    rows = figures.sizes[-1]
    found: dict[str, tuple[Unit, float]] = {}
    for name, unit in figures.largest["plan, near"].units.items():
        seconds = unit.longest
        if name in BY_GROUP:
            seconds *= max(1.0, GROUP_ROWS / rows)
        elif name == "exact":
            seconds *= max(1.0, RANGE_ROWS / (rows / unit.number))
        elif name == "windows":
            seconds *= max(1.0, windows.UNIT_ROWS / (rows / unit.number))
        elif name == "near":
            slices = -(-BILLION // duplicates.SLICE_ROWS)
            own = BILLION / slices
            seconds = seconds * own / rows + (BILLION - own) * figures.sliced
        found[name] = (unit, seconds / 60)
    return found


def unit_table(figures: Figures) -> list[str]:
    """Return the lines of the units of `plan, near`."""
    lines = ["| step | units | longest, CPU s | longest of 1e9 rows, CPU minutes |", "|---|---|---|---|"]
    for name, (unit, minutes) in minutes_of_units(figures).items():
        lines.append(f"| {name} | {unit.number} | {unit.longest:.2f} | {minutes:.2f} |")
    return lines


def plan_hours(figures: Figures, step: str) -> float:
    """Return the CPU hours of a finish of a billion rows."""
    rows, cost = figures.sizes[-1], figures.largest[step]
    near = cost.units.get("near", Unit(0, 0.0, 0.0))
    seconds = (cost.cpu - near.total) / rows * BILLION
    if near.number:
        # A billion rows have more passes, and each slice reads all rows.
        passes = len(dedupe.block_choices(BILLION, DISTANCE))
        slices = -(-BILLION // duplicates.SLICE_ROWS)
        before = len(dedupe.block_choices(rows, DISTANCE))
        seconds += near.total / before * passes / rows * BILLION
        seconds += passes * (slices - 1) * BILLION * figures.sliced
    return seconds / 3600


def at_commits(figures: Figures, step: str) -> tuple[float, float]:
    """Return CPU minutes and peak GB of a step at `COMMITS`.

    By the line through the smallest and the largest size; of one size, which has no slope, by the line
    through zero, which is an upper bound.
    """
    sizes, costs = figures.sizes, figures.costs
    first, last = costs[sizes[0]][step], costs[sizes[-1]][step]
    few, many = KINDS * (sizes[0] // COMMIT_ROWS), KINDS * (sizes[-1] // COMMIT_ROWS)
    if len(sizes) == 1:
        return last.cpu * COMMITS / many / 60, last.peak * max(1.0, COMMITS / many) / 1e9
    steps = (COMMITS - few) / (many - few)
    cpu, peak = (first.cpu + (last.cpu - first.cpu) * steps, first.peak + (last.peak - first.peak) * steps)
    return cpu / 60, peak / 1e9


def extrapolation_table(figures: Figures) -> list[str]:
    """Return the lines of what a billion rows take."""
    lines = ["| step of 1e9 rows | CPU | peak GB |", "|---|---|---|"]
    for step in ("plan", "plan, near"):
        hours, peak = plan_hours(figures, step), figures.largest[step].peak / 1e9
        lines.append(f"| {step} | {hours:.1f} hours, {hours / CORES:.2f} on {CORES} cores | {peak:.2f} |")
    for step in OF_COMMITS:
        minutes, peak = at_commits(figures, step)
        lines.append(f"| {step} ({COMMITS:,} commits) | {minutes:.1f} minutes | {peak:.2f} |")
    return lines


def comparison_table(figures: Figures) -> list[str]:
    """Return the lines of the comparisons of near duplicates."""
    lines = ["| hashes | rows | comparisons per row | near an earlier row |", "|---|---|---|---|"]
    for name, entries in figures.compared.items():
        for count, per_row, part in entries:
            lines.append(f"| {name} | {count:,} | {per_row:.2f} | {part:.0%} |")
    return lines


def goals_of(figures: Figures) -> "dict[str, Goal]":
    """Return the goals of the issue of scale."""
    from benchmarks.reporting import at_most  # imports torch

    goals: dict[str, Goal] = {
        "plan_hours_at_1e9_on_32_cores": at_most(plan_hours(figures, "plan") / CORES, 1.0),
        "plan_near_hours_at_1e9_on_32_cores": at_most(plan_hours(figures, "plan, near") / CORES, 1.0),
        "longest_unit_minutes": at_most(max(last for _, last in minutes_of_units(figures).values()), 5.0),
    }
    for name in ("plan", "plan, near"):
        goals[f"{name.replace(', ', '_')}_peak_gb"] = at_most(figures.largest[name].peak / 1e9, 2.0)
    for name, step in (("first", "snapshot"), ("again", "snapshot again")):
        minutes, peak = at_commits(figures, step)
        goals[f"snapshot_{name}_minutes_at_1e6_commits"] = at_most(minutes, 3.0)
        goals[f"snapshot_{name}_peak_gb_at_1e6_commits"] = at_most(peak, 2.0)
    verified = at_commits(figures, "verify, 1 of 16")[0]
    goals["verify_cpu_minutes_per_task_of_16"] = at_most(verified, 10.0)
    goals["report_cpu_minutes_at_1e6_commits"] = at_most(at_commits(figures, "report")[0], 5.0)
    goals["pairs_requests_per_part"] = at_most(requests_per_part(figures.counted, "pairs"), 10.0)
    for name, entries in figures.compared.items():
        for count, per_row, _ in entries:
            goals[f"comparisons_per_row_{name.split()[0].strip(',')}_{count}"] = at_most(per_row, 5.0)
    return goals


def tables(figures: Figures) -> list[str]:
    """Return the lines of all tables."""
    largest = figures.sizes[-1]
    lines = ["", *cost_table(figures)]
    lines += ["", f"Requests of a local folder at {largest:,} rows (F files, P parts, K kinds):", ""]
    lines += formula_table(figures)
    lines += ["", "Requests counted by an S3 server (moto), of T tasks together; source files are local:", ""]
    lines += requests_table(figures.counted)
    lines += ["", "Units of `plan, near`:", "", *unit_table(figures)]
    lines += ["", *extrapolation_table(figures), "", *comparison_table(figures)]
    goals = goals_of(figures)
    lines += ["", "| goal | |", "|---|---|", *(f"| {name} | {goal} |" for name, goal in goals.items())]
    return [*lines, "", *NOTES]
