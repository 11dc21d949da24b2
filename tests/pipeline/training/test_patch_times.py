"""Patch times and the difficulty head in training: alike on any ranks, after a stop, in any micro-batch."""

import json
import re
import shutil

import pytest
import torch

from pipeline.checkpoint.checkpoints import load_weights
from tests.helpers import trainer_tasks
from tests.helpers.distributed import on_ranks
from tests.seams import seam_tasks

LTG = {"objective__patch_times__kind": "ltg", "objective__patch_times__levels": 4}
ON = {**LTG, "objective__difficulty": 0.01}


@pytest.fixture(scope="module")
def store(small_store):
    return small_store


def losses_of(results):
    return [report["loss"] for report in results[0][1]]


@pytest.fixture(scope="module")
def two_ranks(store, tmp_path_factory):
    """A run on two ranks: its folder and losses."""
    runs = tmp_path_factory.mktemp("two")
    return runs, losses_of(on_ranks(2, seam_tasks.train, store, str(runs), None, ON))


@pytest.fixture(scope="module")
def stopped(store, tmp_path_factory):
    """A run on two ranks that was stopped after three steps."""
    runs = tmp_path_factory.mktemp("stopped")
    on_ranks(2, seam_tasks.train, store, str(runs), 3, ON)
    return runs


def test_a_stopped_run_goes_on_bit_for_bit(store, tmp_path, two_ranks, stopped):
    runs, losses = two_ranks
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    assert losses_of(on_ranks(2, seam_tasks.train, store, str(tmp_path), None, ON)) == losses
    one, other = (load_weights(folder / "small", "ema") for folder in (runs, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["final.difficulty.linear.weight"].any()


@pytest.mark.slow
def test_one_rank_in_micro_batches_compiled_and_checkpointed_is_the_same_to_rounding(
    store, tmp_path, two_ranks
):
    settings = {"engine__micro_batch": 2, "model__checkpoint_every": 1, "model__compile": True}
    losses = losses_of(on_ranks(1, seam_tasks.train, store, str(tmp_path), None, {**ON, **settings}))
    assert losses == pytest.approx(two_ranks[1], rel=0.02)


def test_a_run_of_two_ranks_goes_on_with_one(store, tmp_path, two_ranks, stopped):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    resumed = losses_of(on_ranks(1, seam_tasks.train, store, str(tmp_path), None, ON))
    assert resumed[:3] == two_ranks[1][:3]
    assert resumed == pytest.approx(two_ranks[1], rel=0.02)


def test_one_level_trains_as_a_shared_time_bit_for_bit(store, tmp_path):
    one_level = {**LTG, "objective__patch_times__levels": 1}
    runs = [(tmp_path / "shared", {}), (tmp_path / "level", one_level)]
    losses = [losses_of(on_ranks(1, seam_tasks.train, store, str(run), None, given)) for run, given in runs]
    assert losses[0] == losses[1]
    one, other = (load_weights(run / "small", "raw") for run, _ in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_network_gets_a_head_and_a_detached_one_leaves_the_rest(store, tmp_path):
    on_ranks(1, seam_tasks.train, store, str(tmp_path / "parent"), None, LTG)
    start = {"start_from": str(tmp_path / "parent" / "small"), "start_weights": "raw", **LTG}
    detached = {**start, "objective__difficulty": 0.01, "model__difficulty": "detached"}
    # without clipping, as the norm that it scales by counts the head's gradients too
    runs = {name: {**given, "optim__clip": 1e9} for name, given in (("plain", start), ("head", detached))}
    losses = [
        losses_of(on_ranks(1, seam_tasks.train, store, str(tmp_path / name), None, given))
        for name, given in runs.items()
    ]
    assert losses[0] == losses[1]
    plain, head = (load_weights(tmp_path / name / "small", "raw") for name in runs)
    assert set(head) - set(plain) == {f"final.difficulty.linear.{part}" for part in ("weight", "bias")}
    assert all(torch.equal(plain[name], head[name]) for name in plain)
    assert head["final.difficulty.linear.weight"].any()


@pytest.mark.slow
def test_no_batch_makes_a_new_graph(store, tmp_path):
    settings = {"samples": 8 * 4, "data__validation_parts": 0, **ON}
    ((reports, after, at_the_end, breaks),) = on_ranks(
        1, trainer_tasks.train_compiled, store, str(tmp_path), settings, True
    )
    assert len(reports) == 4
    assert after == at_the_end
    assert breaks == 0


def validations(runs):
    lines = (json.loads(line) for line in (runs / "small" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event") == "patches"]


def test_validation_is_the_same_on_any_number_of_ranks(store, tmp_path):
    settings = {"log__validate_every_samples": 16, "samples": 16, "data__validation_parts": 1, **ON}
    found = []
    for ranks in (1, 2):
        on_ranks(ranks, trainer_tasks.train, store, str(tmp_path / str(ranks)), None, settings)
        (values,) = validations(tmp_path / str(ranks))
        found.append({name: value for name, value in values.items() if name not in ("time", "event")})
    one, two = found
    assert set(one) == set(two)
    assert sum(name.startswith("rank_correlation_t") for name in one) == 8
    assert all(-1 <= value <= 1 for name, value in one.items() if name.startswith("rank"))
    fixed = [value for name, value in one.items() if name.startswith("difficulty_t")]
    assert len(fixed) == 8
    assert len(set(fixed)) == 8
    # Every patch is in one bin, and the samples have equally many patches.
    binned = [value for name, value in one.items() if re.fullmatch(r"loss_t\d", name)]
    assert min(binned) <= one["loss"] <= max(binned)
    assert one["loss"] == pytest.approx(two["loss"], rel=0.02)
    assert one["difficulty"] == pytest.approx(two["difficulty"], rel=0.02)
