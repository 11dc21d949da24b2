"""Engines do each missing unit, whatever was there before and whatever dies, and all write the same bytes.

The pool of actors is a stand-in here, in this process; `test_ray.py` has a real cluster.
"""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import engines
from data_prep.__main__ import main, parse
from data_prep.config import DedupeConfig
from data_prep.dataset.parts import committed_parts, read_plan, register_family
from data_prep.dataset.schema import PAIRS
from data_prep.dataset.verify import verify
from data_prep.engines import Ray, run
from data_prep.families.encode import FamilyStep, encode_family
from data_prep.pairs.pairs import PairsStep, run_pairs
from data_prep.plan.plan import run_plan
from data_prep.plan.units import SupersededError, make_units
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.data_prep.plan.test_finish import config_for, small_units  # noqa: F401
from tests.helpers.engines import DeadPool, NumberStep, numbers, stored
from tests.helpers.fake_dataset import FAMILIES, encoder
from tests.helpers.raw_material import ALONE

THREE = [Share(0, 3), Share(1, 3), Share(2, 3)]
PLAN = {
    "files": [[(n, "a fox"), (n + 1, "two"), (12, "x"), (14 + n, "y"), (8, "z")] for n in range(4)],
    "evaluation": [3],
    "listed": [(0, 1)],
    "dedupe": DedupeConfig(True, 4),
    "settings": {"part_rows": 1, "shuffle_window": 2},
}


@pytest.fixture
def dataset(tmp_path):
    return open_store(str(tmp_path / "numbers"), create=True).sub("ds")


@pytest.fixture
def on_pool(monkeypatch):
    """Return a function that replaces the pool of actors by a `DeadPool`."""

    def replace(**settings):
        pool = DeadPool(**settings)
        monkeypatch.setattr(engines, "_pool", pool)
        return pool

    return replace


def prepare_on(config, shares):
    """Run all steps of a preparation, each on all of `shares`; return the dataset and the verifications."""
    dataset = open_store(config.store, create=True).sub("ds")
    for share in [*shares, shares[0]]:
        run_plan(config, dataset, share)
    for share in shares:
        run_pairs(config, dataset, share)
    for family in FAMILIES:
        registered = register_family(dataset, family, None)
        for share in shares:
            encode_family(dataset, registered, encoder(registered), share)
    return dataset, [verify(dataset, True, share) for share in shares]


def test_all_steps_write_the_same_bytes_on_each_engine(tmp_path, on_pool, small_units):  # noqa: F811
    config = config_for(tmp_path, PLAN)
    expected, parts = None, None
    for name, shares in {"alone": [ALONE], "share": THREE, "ray": [Ray()]}.items():
        on_pool(seed=3, dies=(1, 4), dies_late=(2,))
        config.store = str(tmp_path / name)
        dataset, verifications = prepare_on(config, shares)
        content = stored(dataset)
        assert not [key for key in content if key.startswith("scan/finish")]
        assert [problem for each in verifications for problem in each.problems] == []
        counts = sum((each.parts for each in verifications), Counter())
        expected, parts = expected or content, parts or counts
        assert content == expected, name
        assert counts == parts
        assert counts == dict.fromkeys(("pairs", "latents", "llm"), len(read_plan(dataset).parts))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    st.integers(0, 12),
    st.sets(st.integers(0, 11)),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.integers(1, 4),
    st.booleans(),
)
def test_what_is_missing_is_done_and_nothing_else(tmp_path_factory, count, before, order, tasks, helps):
    """Some units are there; tasks run in any order, some of them twice and some never."""
    dataset = open_store(str(tmp_path_factory.mktemp("n")), create=True).sub("ds")
    step = NumberStep(dataset, count, helps=helps)
    for unit in map("{:03d}".format, before):
        dataset.put_new(f"numbers/{unit}", b"before")
    present = {f"{number:03d}" for number in before}
    for index in order:
        share = Share(index % tasks, tasks)
        own = set(step.units if helps else share.owns(step.units))
        missing = set(step.missing())
        assert missing == set(step.units) - present
        outcome = run(step, share)
        assert outcome.counts.total() == len(own & missing)
        assert {note.removeprefix("note ") for note in outcome.notes} == own & missing
        present |= own
        assert not set(step.missing()) & own
        # A unit that is there stays as it is.
        for unit in map("{:03d}".format, before):
            assert dataset.read(f"numbers/{unit}") == b"before"
    assert numbers(dataset) == present


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.data())
def test_on_ray_only_units_that_fail_are_left_and_they_are_named(tmp_path_factory, data):
    count, batch = data.draw(st.integers(2, 20)), data.draw(st.integers(1, 5))
    some = st.sets(st.integers(0, count - 1), max_size=2)
    fail, kills, before = data.draw(some), data.draw(some), data.draw(some)
    names = [f"{number:03d}" for number in range(count)]
    fail, kills, before = ({names[number] for number in numbers} for numbers in (fail, kills, before))
    dataset = open_store(str(tmp_path_factory.mktemp("n")), create=True).sub("ds")
    for unit in before:
        dataset.put_new(f"numbers/{unit}", b"before")
    step = NumberStep(dataset, count, fail=fail, batch=batch)
    pool = DeadPool(data.draw(st.integers(0, 9)), dies=(0, 2), dies_late=(1,), kills=kills)
    left = (fail | kills) - before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "_pool", pool)
        # A single missing unit is done in this process, where nothing imitates its death.
        if len(step.missing()) < 2:
            return
        if left:
            with pytest.raises(UserError) as caught:
                run(step, Ray())
            message = str(caught.value)
            assert f"{len(left)} of {count - len(before)} units could not be done" in message
            if len(left) <= engines.MAX_NAMED:
                assert all(unit in message for unit in left)
            assert ("killed each time" in message) == bool(kills - before)
        else:
            run(step, Ray())
    assert set(step.missing()) == left


def test_a_worker_that_cannot_be_set_up_ends_the_job(dataset, on_pool):
    pool = on_pool()
    with pytest.raises(UserError, match="numbers: no such model: name another"):
        run(NumberStep(dataset, 5, broken="no such model: name another"), Ray())
    assert len(pool.batches) == 1


def test_a_fault_of_all_units_ends_the_job_early(dataset, on_pool, monkeypatch):
    monkeypatch.setattr(engines, "MAX_FAILURES", 3)
    pool = on_pool()
    step = NumberStep(dataset, 50)
    step.fail = set(step.units)
    with pytest.raises(UserError, match="50 of 50 units could not be done"):
        run(step, Ray())
    assert len(pool.batches) == 4


def test_a_single_unit_needs_no_actor(dataset, on_pool):
    pool = on_pool()
    run(NumberStep(dataset, 1), Ray())
    assert (numbers(dataset), pool.batches) == ({"000"}, [])


def test_units_come_in_batches_and_then_one_by_one(dataset, on_pool):
    pool = on_pool(kills=["005"])
    with pytest.raises(UserError, match="005: its worker was killed"):
        run(NumberStep(dataset, 8, batch=4), Ray())
    assert sorted(map(len, pool.batches)) == [1, 1, 1, 1, 4, 4]


def test_a_plan_that_another_engine_finished_supersedes_the_rest(dataset):
    dataset.put_new("manifest.json", b"{}")
    keys = ["scan/finish/x/000000", "scan/finish/x/000001"]
    with pytest.raises(SupersededError):
        make_units(dataset, Ray(), "x", keys, lambda number: b"")


def test_parts_without_pairs_are_named_on_each_engine(tmp_path, on_pool, small_units):  # noqa: F811
    on_pool()
    config = config_for(tmp_path, PLAN)
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    parts = [str(part) for part in read_plan(dataset).parts]
    run_pairs(config, dataset, Share(1, 2))
    family = register_family(dataset, FAMILIES[0], None)
    absent = len(parts) - len(committed_parts(dataset, PAIRS))
    for share in (Ray(), ALONE):
        with pytest.raises(
            UserError, match=rf"{absent} of {len(parts)} parts .*no pairs yet \({min(parts[:absent])}"
        ):
            encode_family(dataset, family, encoder(family), share)
        assert committed_parts(dataset, family.name) == committed_parts(dataset, PAIRS)
    step, pairs = FamilyStep(dataset, family.name, None), PairsStep(config, dataset, read_plan(dataset))
    assert set(step.missing()) == set(pairs.missing()) == set(parts[:absent])
    assert [step.exists(part) for part in parts] == [False] * absent + [True] * (len(parts) - absent)


def test_room_counts_the_actors_that_fit_on_the_nodes():
    def node(cpus, gpus=0, alive=True):
        return {"Alive": alive, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}

    step = NumberStep(None, 0)
    step.cpus, step.gpus = 4, 1
    assert engines._room(step, [node(8), node(10), node(64, alive=False)]) == (4, 0, 4)
    assert engines._room(step, [node(2), node(3)]) == (3, 0, 1)
    assert engines._room(step, [node(32, 8), node(8, 4), node(16)]) == (4, 1, 8 + 2)
    step.gpus = 0
    assert engines._room(step, [node(32, 8)]) == (4, 0, 8)


def test_the_command_line_names_the_engine(monkeypatch, capsys):
    for name in ("SLURM_ARRAY_TASK_ID", "LI_DIT_TASKS"):
        monkeypatch.delenv(name, raising=False)
    chosen = {
        "": Share(),
        "--engine alone": Share(),
        "--task 1/4": Share(1, 4),
        "--engine share --task 1/4": Share(1, 4),
        "--engine ray": Ray(),
        "--engine ray --actors 3": Ray(actors=3),
    }
    for options, share in chosen.items():
        task = parse(["pairs", "x.yaml", *options.split()]).task
        assert (task, type(task)) == (share, type(share))
    for options in ("--engine share", "--engine ray --task 1/4", "--engine alone --task 1/4", "--actors 2"):
        with pytest.raises(SystemExit) as exit:
            main(["pairs", "x.yaml", *options.split()])
        assert exit.value.code == 2
        assert "--engine" in capsys.readouterr().err


def test_without_ray_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"\.\[ray\]"), engines.connected(Ray()):
        pass
    with engines.connected(ALONE):
        pass


def test_results_of_an_actor_are_json(dataset):
    actor = engines._Actor(NumberStep(dataset, 4, fail=["002"]), "/nonexistent")
    (result,) = actor({"units": [json.dumps(["000", "001"])]})["result"]
    result = engines._Result(**json.loads(result))
    assert (result.units, result.counts, result.sums) == (["000", "001"], {"squared": 2}, {"sum": 1})
    assert (result.notes, result.error) == (["note 000", "note 001"], "")
    # What is there by now is not done again.
    (result,) = actor({"units": [json.dumps(["001", "002"])]})["result"]
    assert json.loads(result)["error"] == "002 is not right: correct it"
