"""The benchmark of preparation at scale, in a tiny size: it runs, and requests stay below their formulas."""

import pytest

from benchmarks import prepare_tables
from benchmarks.prepare_data import BILLION, COMMIT_ROWS, KINDS
from benchmarks.prepare_requests import FORMULAS, Counted, Layout, count_requests, requests_per_part
from benchmarks.prepare_scale import STEPS, Counting, TimedStep, measure, sliced_seconds
from benchmarks.prepare_tables import (
    COMMITS,
    STEP_NAMES,
    Cost,
    Figures,
    Unit,
    at_commits,
    formulas,
    goals_of,
    minutes_of_units,
    plan_hours,
    tables,
)
from data_prep.dataset import rollups
from data_prep.plan import dedupe, duplicates
from data_prep.store.store import Store

ROWS = 3_000


def test_each_step_runs_and_its_requests_are_below_the_formulas(tmp_path, monkeypatch):
    monkeypatch.setattr(rollups, "MIN_ROWS", 1)
    costs, place = {}, tmp_path
    for number, (name, step) in enumerate(STEPS.items()):
        if step.write is not None:
            place = tmp_path / str(number)
            step.write(place, ROWS)
        backend = Counting(place)
        TimedStep.seconds.clear()
        step.run(Store(backend, "ds/"), place, ROWS)
        made = {name: Unit(len(all), sum(all), max(all)) for name, all in TimedStep.seconds.items()}
        costs[name] = Cost(1.0, 1e6, dict(backend.requests), made)
    steps = [step for step, _, bound, counted in formulas(ROWS, costs) if 0 < counted <= bound]
    assert steps == ["plan", "snapshot", "snapshot again", "verify, 1 of 16", "gc", "report"]
    assert {"hashes", "exact", "kept", "near", "copies", "rows", "windows"} == {*costs["plan, near"].units}
    page = (place / "report.html").read_text()
    assert "min_side: below 256" in page
    assert "data:image/jpeg" in page


def test_a_step_is_measured_in_a_process_of_its_own(tmp_path):
    STEPS["plan"].write(tmp_path, 3000)
    cost = measure("plan", tmp_path, 3000)
    assert cost.peak > 5e7
    assert cost.requests["PUT"] >= 1
    assert cost.units["hashes"].number == 1
    assert 0 <= cost.units["rows"].longest <= cost.units["rows"].total < 60


def test_requests_counted_by_a_server_are_below_the_formulas(tmp_path):
    found = count_requests(tmp_path, [Layout(3, 8, 8), Layout(3, 8, 2)], [1, 3])
    assert [(entry.step, entry.parts, entry.tasks) for entry in found] == [
        (step, parts, tasks) for parts in (3, 12) for tasks in (1, 3) for step in FORMULAS
    ]
    for entry in found:
        assert entry.lists < entry.total <= FORMULAS[entry.step][1](3, entry.parts, entry.tasks), entry
    assert 5 < requests_per_part(found, "pairs") <= 10
    assert 5 < requests_per_part(found, "family") <= 10


def figures_of(cpu, near=(20.0, 2.0)):
    """Figures of 1 CPU s per `cpu` rows for each step; `near` is total and longest of its units."""
    costs = {}
    for rows in (64_000, 640_000):
        units = {"near": Unit(10, *near), "rows": Unit(1, 5.0, 5.0)}
        costs[rows] = {
            name: Cost(rows / cpu, rows * 100.0, {"GET": 1}, units if name == "plan, near" else {})
            for name in STEP_NAMES
        }
    compared = {"products on white": [(24_000, 2.0, 0.5), (96_000, 6.0, 0.5)]}
    counted = [
        Counted("pairs", 3, 10, 2, {"GET": 88, "LIST": 2}),
        Counted("pairs", 3, 20, 2, {"GET": 178, "LIST": 2}),
        Counted("pairs", 3, 10, 4, {"GET": 90, "LIST": 4}),
        Counted("pairs", 3, 20, 4, {"GET": 190, "LIST": 14}),
    ]
    return Figures(costs, compared, 1e-8, counted)


def test_what_follows_for_a_billion_rows():
    figures = figures_of(cpu=1000)
    assert plan_hours(figures, "plan") == pytest.approx(1e6 / 3600)
    # Near duplicates have as many passes as those of a billion rows, whose slices each read all rows.
    passes = {rows: len(dedupe.block_choices(rows, 3)) for rows in (640_000, BILLION)}
    slices = -(-BILLION // duplicates.SLICE_ROWS)
    seconds = (640 - 20) / 640e3 * 1e9 + 20 / 640e3 * 1e9 * passes[BILLION] / passes[640_000]
    seconds += passes[BILLION] * (slices - 1) * 10
    assert plan_hours(figures, "plan, near") == pytest.approx(seconds / 3600)
    # The line through two sizes: as many rows as a million commits have.
    rows = COMMITS / KINDS * COMMIT_ROWS
    assert at_commits(figures, "gc") == pytest.approx((rows / 1000 / 60, rows * 100 / 1e9))

    minutes = {name: last for name, (_, last) in minutes_of_units(figures).items()}
    assert minutes["rows"] == pytest.approx(5 / 60 * prepare_tables.GROUP_ROWS / 640e3)
    own = BILLION / slices
    assert minutes["near"] == pytest.approx((2.0 * own / 640e3 + (BILLION - own) * 1e-8) / 60)


def test_every_goal_is_in_the_tables():
    figures = figures_of(cpu=10_000)
    goals = goals_of(figures)
    assert goals["pairs_requests_per_part"].value == 10
    assert goals["comparisons_per_row_products_96000"].met is False
    assert goals["longest_unit_minutes"].goal == 5
    assert {"snapshot_first_minutes_at_1e6_commits", "snapshot_again_minutes_at_1e6_commits"} < {*goals}
    assert goals["report_cpu_minutes_at_1e6_commits"].goal == 5
    assert {goal.goal for goal in goals.values()} == {1.0, 2.0, 3.0, 5.0, 10.0}
    text = "\n".join(tables(figures))
    for name, goal in goals.items():
        assert f"| {name} | {goal} |" in text
    assert "requests of a local folder" in text
    assert "| pairs | 3 | 20 | 4 | 9 P + T (LIST + 8) | 216 | 204 | 14 | 9.50 |" in text


def test_rows_of_other_slices_cost_little(tmp_path):
    assert 0 < sliced_seconds(tmp_path, rows=1 << 16, repetitions=2) < 1e-5
