"""The benchmark of preparation at scale, in a tiny size: it runs, and requests stay below their formulas."""

import json

from benchmarks import prepare_scale
from benchmarks.prepare_scale import STEPS, Cost, Counting, formulas, measure
from data_prep.dataset import rollups
from data_prep.store.store import Store

ROWS = 3_000


def test_it_ends_with_a_line_of_goals_and_requests_are_below_the_formulas(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rollups, "MIN_ROWS", 1)
    costs, place = {}, tmp_path
    for number, (name, step) in enumerate(STEPS.items()):
        if name in ("plan", "plan, near", "snapshot"):
            place = tmp_path / str(number)
            step.write(place, ROWS)
        backend = Counting(place)
        step.run(Store(backend, "ds/"), place, ROWS)
        costs[name] = Cost(1.0, 1e6, dict(backend.requests))
    for step, _, bound, counted in formulas(ROWS, costs):
        assert 0 < counted <= bound, step

    prepare_scale.finish_report([ROWS], {ROWS: costs}, [200, 400], keep=False)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["benchmark"] == "prepare_scale"
    assert {goal["goal"] for goal in last["goals"].values()} == {1.0, 2.0, 3.0, 5.0, 10.0}


def test_a_step_is_measured_in_a_process_of_its_own(tmp_path):
    STEPS["plan"].write(tmp_path, 3000)
    cost = measure("plan", tmp_path, 3000)
    assert cost.peak > 5e7
    assert cost.requests["PUT"] >= 1
