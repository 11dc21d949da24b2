"""Elastic networks in training: parts are chosen alike on any ranks and after a stop, and what a step leaves
out does not move."""

import json
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from model.common.errors import UserError
from model.elastic.config import ElasticConfig, kept_blocks
from model.sub_network import SubNetwork
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.diffusion.objective import make_objective
from pipeline.stage.config import load_stage
from pipeline.stage.objective import ObjectiveConfig
from pipeline.training import elastic_validation, validation
from pipeline.training.elastic import ElasticPasses, PartChoice
from pipeline.training.elastic_validation import ElasticValidation
from pipeline.training.state import TrainState
from tests.helpers import elastic_tasks
from tests.helpers.distributed import on_ranks
from tests.helpers.networks import SMALL
from tests.seams import seam_tasks

DEPTHS = {"model__depth": 4, "elastic__depths": [4, 2]}
BOTH = {**DEPTHS, "elastic__patches": [2, 4]}
SIZES = replace(SMALL, depth=6, patch=2)
POSITIONS = 16
"""Positions of the latents, where it does not matter."""
NO_MEMORY = {"optim__betas": (0.0, 0.0), "optim__weight_decay": 0.0}
"""With these a parameter without a gradient does not move."""


@pytest.fixture(scope="module")
def store(small_store):
    return small_store


def losses_of(results):
    return [report["loss"] for report in results[0][1]]


def train(ranks, store, runs, settings, stop_at=None):
    return losses_of(on_ranks(ranks, seam_tasks.train, store, str(runs), stop_at, settings))


@pytest.fixture(scope="module")
def two_ranks(store, tmp_path_factory):
    """A run on two ranks: its folder and losses."""
    runs = tmp_path_factory.mktemp("two")
    return runs, train(2, store, runs, BOTH)


@pytest.fixture(scope="module")
def plain(store, tmp_path_factory):
    """A run of a network without parts on one rank: its folder and losses."""
    runs = tmp_path_factory.mktemp("plain")
    return runs, train(1, store, runs, {"model__depth": 4})


def test_a_network_that_always_runs_whole_trains_as_a_plain_one_bit_for_bit(store, tmp_path, plain):
    runs, losses = plain
    assert train(1, store, tmp_path, {**DEPTHS, "elastic__full": 1.0}) == losses
    one, other = (load_weights(folder / "small", "ema") for folder in (runs, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stopped_run_goes_on_bit_for_bit(store, tmp_path, two_ranks):
    runs, losses = two_ranks
    train(2, store, tmp_path, BOTH, stop_at=3)
    assert train(2, store, tmp_path, BOTH) == losses
    one, other = (load_weights(folder / "small", "ema") for folder in (runs, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["elastic.4.time_shift.vector"].any()


NOTED = {**seam_tasks.PLAIN, **BOTH, "engine__precision": "fp32", "samples": 8 * 8}


def note(ranks, store, runs, stop_at=None, **settings):
    """Parts of each step, which are the same on all ranks, and losses."""
    noted = on_ranks(ranks, elastic_tasks.train_and_note, store, str(runs), stop_at, {**NOTED, **settings})
    parts, losses = noted[0]
    assert all(other == parts for other, _ in noted)
    assert all(len(step) == 1 for step in parts)
    return parts, torch.tensor(losses)


@pytest.fixture(scope="module")
def noted(store, tmp_path_factory):
    """Parts and losses of an uninterrupted run on two ranks."""
    parts, losses = note(2, store, tmp_path_factory.mktemp("noted"))
    assert len(parts) == 8
    assert len({*map(tuple, parts)}) >= 3
    assert losses.unique().numel() == 8
    return parts, losses


@pytest.mark.parametrize("micro_batch", [2, None])
def test_parts_do_not_depend_on_ranks_and_micro_batches(store, tmp_path, noted, micro_batch):
    parts, losses = note(1, store, tmp_path, engine__micro_batch=micro_batch)
    assert parts == noted[0]
    torch.testing.assert_close(losses, noted[1], rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def stopped(store, tmp_path_factory):
    """Folder and parts of a run on two ranks that was stopped after three steps."""
    runs = tmp_path_factory.mktemp("stopped")
    return runs, note(2, store, runs, stop_at=3, engine__zero_stage=3)[0]


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 3), (2, 2), (2, 3)])
def test_a_stopped_run_goes_on_with_its_parts_on_other_ranks(
    store, tmp_path, noted, stopped, ranks, zero_stage
):
    shutil.copytree(stopped[0], tmp_path / "moved")
    parts, losses = note(ranks, store, tmp_path / "moved", engine__zero_stage=zero_stage)
    assert len(stopped[1]) == 3
    assert stopped[1] + parts == noted[0]
    torch.testing.assert_close(losses, noted[1], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_muon_goes_on_bit_for_bit_after_a_stop(store, tmp_path):
    settings = {**BOTH, "optim__name": "muon", "optim__lr": 1e-3}
    whole = train(2, store, tmp_path / "whole", settings)
    train(2, store, tmp_path / "stopped", settings, stop_at=3)
    assert train(2, store, tmp_path / "stopped", settings) == whole
    one, other = (load_weights(tmp_path / name / "small", "ema") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"engine__micro_batch": 2, "model__checkpoint_every": 1, "model__compile": True},
        {"engine__zero_stage": 2},
    ],
)
def test_one_rank_otherwise_is_the_same_to_rounding(store, tmp_path, two_ranks, settings):
    assert train(1, store, tmp_path, {**BOTH, **settings}) == pytest.approx(two_ranks[1], rel=0.02)


@pytest.mark.parametrize("zero_stage", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_step_leaves_out_does_not_move(store, tmp_path, zero_stage):
    given = {
        **seam_tasks.PLAIN,
        **BOTH,
        **NO_MEMORY,
        "engine__zero_stage": zero_stage,
        "engine__micro_batch": 2,
        "samples": 8 * 8,
        "log__peak_tflops": 1.0,
    }
    parts, moved, reports = on_ranks(2, elastic_tasks.train_and_watch, store, str(tmp_path), given)[0]
    assert len(set(parts)) >= 3
    kept, seen, steps_of = kept_blocks([4, 2]), set(), Counter()
    for part, names in zip(parts, moved, strict=True):
        depth, patch = (int(re.sub(r"\D", "", text)) for text in part.split("_"))
        blocks = {int(name.split(".")[1]) for name in names if name.startswith("blocks.")}
        assert blocks <= set(kept[depth])
        assert any(name.startswith("elastic.") for name in names) == (patch == 4)
        # the last layer starts at zero, and so do the gates: they let gradients through after two steps
        if steps_of[patch] >= 2 and sum(steps_of.values()) >= 3:
            assert blocks == set(kept[depth])
            assert ("patch_embedding.weight" in names) == (patch == 2)
            seen.add(depth)
        steps_of[patch] += 1
    assert seen
    # losses, norms, times and use of the device are kept for each part
    for report, part in zip(reports, parts, strict=True):
        assert {f"{name}_{part}" for name in ("loss", "grad_norm", "step_seconds", "mfu")} <= set(report)
        assert report[f"loss_{part}"] == report["loss"]
        assert report[f"mfu_{part}"] == pytest.approx(report["mfu"])


@pytest.mark.slow
def test_a_sandwich_trains_the_whole_and_a_part(store, tmp_path):
    settings = {
        **seam_tasks.PLAIN,
        **BOTH,
        **NO_MEMORY,
        "elastic__sandwich": True,
        "elastic__distil": 0.5,
        "engine__micro_batch": 2,
        "log__peak_tflops": 1.0,
    }
    parts, moved, reports = on_ranks(2, elastic_tasks.train_and_watch, store, str(tmp_path), settings)[0]
    assert "depth4_patch2" not in parts
    assert all({"blocks.1.mlp.up.weight", "patch_embedding.weight"} <= names for names in moved[3:])
    for report, part in zip(reports, parts, strict=True):
        assert report["loss"] == pytest.approx((report["loss_depth4_patch2"] + report[f"loss_{part}"]) / 2)
        assert report["mfu"] > 0


def test_a_part_without_weight_teaches_nothing(store, tmp_path):
    settings = {
        **seam_tasks.PLAIN,
        **BOTH,
        **NO_MEMORY,
        "elastic__sandwich": True,
        "elastic__part_weight": 0.0,
    }
    _, moved, reports = on_ranks(1, elastic_tasks.train_and_watch, store, str(tmp_path), settings)[0]
    only_of_parts = {name for names in moved for name in names if name.startswith("elastic.")}
    assert not only_of_parts
    assert "patch_embedding.weight" in moved[-1]
    # The loss of the part is measured all the same.
    assert all(sum(name.startswith("loss_depth") for name in report) == 2 for report in reports)


@pytest.mark.slow
def test_segments_train_and_validate_each_size_in_its_times(store, tmp_path):
    settings = {
        **BOTH,
        "elastic__segments": [0.5],
        "log__validate_every_samples": 16,
        "data__validation_parts": 1,
    }
    losses = train(2, store, tmp_path, settings)
    lines = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    plain = [line for line in lines if line.get("event") == "validation"]
    parts = [line for line in lines if line.get("event") == "elastic"]
    assert len(plain) == len(parts) == len(losses) * 8 // 16
    for one, other in zip(plain, parts, strict=True):
        assert one["loss"] == other["loss_depth4"] > 0 < other["loss_depth2"]


@pytest.mark.parametrize("segments", [[], [0.5]])
def test_each_part_is_validated_once(monkeypatch, segments):
    elastic, measured, logged = ElasticConfig([6, 2], [2, 4], segments=segments), [], {}

    def measure(trainer, part):
        measured.append(part)
        return torch.full((8,), float(len(measured)))

    for module in (validation, elastic_validation):
        monkeypatch.setattr(module, "held_out_losses", measure)
    trainer = SimpleNamespace(
        stage=SimpleNamespace(elastic=elastic),
        sizes=SIZES,
        inputs=SimpleNamespace(part=elastic.by_default(SIZES)),
        engine=SimpleNamespace(averaged=nullcontext),
        state=SimpleNamespace(step=1, samples=8),
        log=SimpleNamespace(scores=lambda name, step, samples, values: logged.update(values)),
        log_event=lambda name, loss, **values: logged.update(validation=loss),
    )
    ElasticValidation().validate(trainer)
    choices = elastic.choices(SIZES)
    assert measured == [elastic.by_default(SIZES), *choices[1:]]
    assert list(logged.values()) == [1.0, *range(1, len(choices) + 1)]
    assert list(logged) == ["validation", *(f"loss_{part}" for part in choices)]


def test_a_plain_stages_weights_start_an_elastic_one(store, tmp_path, plain):
    start = {"start_from": str(plain[0] / "small"), "start_weights": "raw", **BOTH}
    on_ranks(2, seam_tasks.train, store, str(tmp_path), 0, start)
    one, other = (load_weights(folder / "small", "raw") for folder in (plain[0], tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    wide = other["elastic.4.patch_embedding.weight"]
    assert wide.shape[1] == 4 * one["patch_embedding.weight"].shape[1]
    assert wide.sum() == pytest.approx(float(one["patch_embedding.weight"].sum()), rel=1e-4)
    assert not other["elastic.4.time_shift.vector"].any()


def choice(objective=None, **settings):
    config = ElasticConfig(**{"depths": [6, 4, 2], "patches": [2, 4], **settings})
    return PartChoice(config, SIZES, make_objective(objective or ObjectiveConfig()), seed=7)


@settings(max_examples=10, deadline=None)
@given(full=st.floats(0, 1), hold=st.integers(1, 9), epoch=st.integers(0, 5))
def test_parts_are_chosen_by_their_shares_and_held(full, hold, epoch):
    chosen = choice(full=full, hold=hold)
    parts = [chosen.parts(epoch, index, POSITIONS)[0] for index in range(300 * hold)]
    assert parts == [chosen.parts(epoch, index, POSITIONS)[0] for index in range(300 * hold)]
    assert all(len(set(parts[start : start + hold])) == 1 for start in range(0, len(parts), hold))
    counts = Counter(parts[::hold])
    assert counts[SubNetwork(6, 2)] / 300 == pytest.approx(full, abs=0.1)
    others = [counts[part] / 300 for part in chosen.others]
    assert others == pytest.approx([(1 - full) / 5] * 5, abs=0.1)


def test_epochs_and_seeds_have_other_parts():
    parts = {
        (seed, epoch): tuple(replace_seed(seed).parts(epoch, index, POSITIONS)[0] for index in range(50))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(parts.values())) == 4


def replace_seed(seed):
    return PartChoice(ElasticConfig(depths=[6, 4, 2]), SIZES, make_objective(ObjectiveConfig()), seed)


def draw_times(objective, positions, u):
    """Times of training of latents of so many positions."""
    latents, normal = torch.zeros(len(u), 1, 2, positions // 2), None
    return make_objective(objective).training_example(latents, latents, u, normal).timesteps


@pytest.mark.parametrize("positions", [16, 256])
@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(),
        ObjectiveConfig(shift=3.0, logit_mean=0.4),
        ObjectiveConfig(timesteps="uniform"),
        ObjectiveConfig(name="ddpm"),
        ObjectiveConfig(shift=1.5, shift_positions=64),
    ],
)
def test_segments_leave_the_density_of_times_as_it_is(objective, positions):
    chosen = choice(objective, segments=[0.6])
    uniform = torch.rand(4000, 8, generator=torch.Generator().manual_seed(0))
    shares, times = Counter(), []
    for index, u in enumerate(uniform):
        patch = chosen.parts(0, index, positions)[0].patch
        moved = draw_times(objective, positions, chosen.uniform(u, patch, positions))
        assert bool((moved >= 0.6 - 1e-6).all()) == (patch == 4)
        assert bool((moved < 0.6 + 1e-6).all()) == (patch == 2)
        shares[patch] += 1 / len(uniform)
        times.append(moved[:1])
    plain = draw_times(objective, positions, uniform.flatten())
    assert shares[4] == pytest.approx(float((plain >= 0.6).float().mean()), abs=0.03)
    of_patches = {4: 0.0, 2: 0.0}
    for part, share in chosen.shares(positions).items():
        of_patches[part.patch] += share
    assert of_patches[4] == pytest.approx(float((plain >= 0.6).float().mean()), abs=0.01)
    noise = 1e-4 * torch.rand(2, 32000, generator=torch.Generator().manual_seed(1))  # ddpm's times repeat
    mixture = torch.cat(times)
    assert kstest((mixture + noise[0, : len(mixture)]).numpy(), (plain + noise[1]).numpy()).pvalue > 1e-3


def test_a_sandwich_has_the_patches_of_its_segment():
    for index in range(50):
        whole, part = choice(segments=[0.6], sandwich=True).parts(0, index, POSITIONS)
        assert whole.depth == 6 > part.depth
        assert whole.patch == part.patch
        whole, part = choice(sandwich=True).parts(0, index, POSITIONS)
        assert whole == SubNetwork(6, 2) != part


def test_the_whole_network_teaches_itself_nothing():
    passes = ElasticPasses.__new__(ElasticPasses)
    passes.objective = make_objective(ObjectiveConfig())
    passes.stage = load_stage(
        "demo", ["elastic.depths=[4,2]", "model.depth=4", "elastic.sandwich=true", "elastic.distil=1.0"]
    )
    prediction, target = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    learned, losses = passes.objective.training_losses(prediction, target)
    assert not passes._distilled(learned, losses, prediction, prediction).any()
    half = passes._distilled(learned, losses, prediction, target)
    assert torch.allclose(half, losses)


def test_each_part_has_its_own_usual_norm():
    stage = load_stage("demo", ["optim.spike=3", "optim.warmup_samples=0"])
    state = TrainState()
    state.add_applied(1.0, "depth4_patch2")
    state.add_applied(10.0, "depth2_patch2")
    assert state.max_norm(stage.optim, "depth4_patch2") == 3
    assert state.max_norm(stage.optim, "depth2_patch2") == 30
    assert state.max_norm(stage.optim, "depth2_patch4") == float("inf")
    again = TrainState.from_dict(state.to_dict())
    assert again.part_grad_norms == state.part_grad_norms


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["elastic.depths=[9]"], "model.depth"),
        (["elastic.patches=[2,4]", "objective.patch_times.kind=ltg"], "objective.patch_times"),
        (["elastic.patches=[2,4]", "objective.first_frame=0.3"], "objective.first_frame"),
        (
            ["elastic.patches=[2,4]", "elastic.segments=[0.5]", "objective.difficulty=0.01"],
            "objective.difficulty",
        ),
        (["elastic.depth=[4,2]"], "depths"),
        (["elastic.full=1.5"], "elastic.full"),
    ],
)
def test_settings_of_a_stage_are_checked(settings, named):
    with pytest.raises(UserError, match=named):
        load_stage("demo", ["model.depth=4", "model.patch=2", *settings])


def test_latents_that_do_not_divide_into_the_largest_patches_are_refused_at_the_start(store, tmp_path):
    with pytest.raises(AssertionError, match="do not divide into patches of 8 x 8"):
        train(1, store, tmp_path, {"elastic__patches": [2, 8]})
