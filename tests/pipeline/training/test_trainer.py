"""The trainer: exact resume, the same losses on any number of processes, clear ends."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from model.common.errors import UserError
from model.flops import flops_per_sample
from model.presets import PRESETS
from pipeline import learned, train
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.engine.optim import learning_rate
from pipeline.inference.sampler import Sampler
from pipeline.reporting.page import build
from pipeline.runtime.run_lock import lock_run
from pipeline.runtime.run_log import read_events, read_reports
from pipeline.runtime.stopping import EXIT_AGAIN
from pipeline.stage.config import DatasetShare, dump_stage
from tests.helpers import fake_snapshot, trainer_tasks
from tests.helpers.distributed import Pool, on_ranks
from tests.helpers.fake_ranks import open_data

NUMBERS = ("loss", "grad_norm", "lr", "caption_tokens", "loss_t0", "loss_t3", "loss_32x32", "loss_32x64")
NUMBERS += ("gate_refiner_small_0", "gate_collaborative_wide_0")
BUCKETS = {"32x32": [20, 20, 9, 16], "32x64": [24, 11]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    fake_snapshot.make(folder / "store", BUCKETS, folder)
    fake_snapshot.make(folder / "store", {"32x32": [10, 9], "32x64": [8]}, folder, name="second")
    return str(folder / "store")


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """Folder and reports of an uninterrupted run on two processes."""
    runs = tmp_path_factory.mktemp("straight")
    codes, reports = zip(*on_ranks(2, trainer_tasks.train, store, str(runs)), strict=True)
    assert codes == (0, 0)
    return runs / "small", reports[0]


def same_weights(one, other, which):
    one, other = load_weights(one, which), load_weights(other, which)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def numbers(reports):
    """What must repeat exactly; a quarter of t that no sample fell into has no loss."""
    return [[report.get(name) for name in NUMBERS] for report in reports]


@pytest.mark.parametrize("stop_at", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(store, straight, tmp_path, stop_at):
    codes = [code for code, _ in on_ranks(2, trainer_tasks.train, store, str(tmp_path), stop_at)]
    assert codes == [EXIT_AGAIN, EXIT_AGAIN]  # only the last rank was asked, both stopped
    (code, reports), _ = on_ranks(2, trainer_tasks.train, store, str(tmp_path))
    assert code == 0
    run, expected = straight
    assert [event["step"] for event in read_events(tmp_path / "small", "start")] == [0, stop_at]
    assert numbers(reports) == numbers(expected)
    assert all(same_weights(tmp_path / "small", run, which) for which in ("raw", "ema", "0.5"))
    validations = [
        [event["loss"] for event in read_events(folder, "validation")] for folder in (tmp_path / "small", run)
    ]
    assert validations[0] == validations[1]


def test_the_last_steps_are_reported_too_if_they_do_not_fill_a_report(store, straight, tmp_path):
    _, reports = on_ranks(1, trainer_tasks.train, store, str(tmp_path), None, {"log__every_steps": 5})[0]
    assert [(report["step"], report["samples"]) for report in reports] == [(5, 40), (10, 80), (12, 96)]
    losses = [each["loss"] for each in straight[1]]
    means = [sum(losses[start:end]) / (end - start) for start, end in ((0, 5), (5, 10), (10, 12))]
    assert [report["loss"] for report in reports] == pytest.approx(means, rel=0.02)


def test_a_mixture_of_datasets_trains_and_resumes_bit_for_bit_on_one_process(store, tmp_path):
    shares = {"ds": DatasetShare(0.6), "second": DatasetShare(0.4)}
    mixed, ended = {"data__dataset": "", "data__datasets": shares}, {}
    for name, stops in (("straight", [None]), ("resumed", [5, None])):
        for stop_at in stops:
            ((code, reports),) = on_ranks(1, trainer_tasks.train, store, str(tmp_path / name), stop_at, mixed)
            assert code == (0 if stop_at is None else EXIT_AGAIN)
        ended[name] = numbers(reports)
    assert ended["straight"] == ended["resumed"]
    assert all(
        same_weights(tmp_path / "straight/small", tmp_path / "resumed/small", which)
        for which in ("raw", "ema", "0.5")
    )
    snapshots = {
        event["snapshot"] for name in ended for event in read_events(tmp_path / name / "small", "start")
    }
    assert re.fullmatch(r"\{'0\.6 ds@\w+ \+ 0\.4 second@\w+'\}", str(snapshots))


SIZES = {name: getattr(PRESETS["tiny"], name) for name in ("depth", "width", "heads", "patch")}
TINY = {f"model__{name}": size for name, size in SIZES.items()} | {"optim__lr": 1e-3}


@pytest.mark.parametrize(
    ("worlds", "model"), [((1, 2), {}), pytest.param((1, 2, 4), TINY, marks=pytest.mark.slow, id="tiny")]
)
def test_losses_do_not_depend_on_the_number_of_processes(store, tmp_path, worlds, model):
    fp32 = {
        "engine__precision": "fp32",
        "samples": 8 * 10,
        "checkpoint__every_samples": 8 * 10,
        "ema": [0.9],
        **model,
    }
    losses, tokens = {}, []
    for world in worlds:
        (code, reports), *_ = on_ranks(
            world, trainer_tasks.train, store, str(tmp_path / str(world)), None, fp32
        )
        assert code == 0
        tokens.append([report["caption_tokens"] for report in reports])
        losses[world] = torch.tensor([report["loss"] for report in reports])
    for world, stop_at in ((worlds[-1], 3), (1, None)):
        (_, reports), *_ = on_ranks(world, trainer_tasks.train, store, str(tmp_path / "moved"), stop_at, fp32)
    losses["moved"] = torch.tensor([report["loss"] for report in reports])
    assert losses[1].unique().numel() == 10
    assert all(of_world == pytest.approx(tokens[0]) for of_world in tokens)
    for other in (*worlds[1:], "moved"):
        torch.testing.assert_close(losses[other], losses[1], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_goodput_is_the_time_in_steps_over_all_since_the_first_start(store, tmp_path):
    """Steps that were lost, with the checkpoint after them, count once."""
    on_ranks(2, trainer_tasks.train, store, str(tmp_path), 7)
    run = tmp_path / "small"
    shutil.rmtree(run / "checkpoints" / "step_000000007")
    (_, reports), _ = on_ranks(2, trainer_tasks.train, store, str(tmp_path))
    first, second = read_events(run, "start")
    assert second["step"] == 4
    for number, report in enumerate(
        reports[4:], start=5
    ):  # the earlier ones as first run; a report is one step
        kept = sum(each["step_seconds"] for each in reports[:number])
        assert report["goodput"] == pytest.approx(kept / (report["time"] - first["time"]), rel=0.1)
    assert 0 < reports[-1]["goodput"] < 1
    assert all(report["memory_gb"] > 0 for report in reports)


def test_a_stage_starts_from_another_at_another_resolution_with_one_llm_more(store, straight, tmp_path):
    fake_snapshot.make(tmp_path / "larger", {"64x64": [20, 20]}, tmp_path)
    one = {"fusion__families": ["small"], "samples": 16}
    ((code, _),) = on_ranks(1, trainer_tasks.train, store, str(tmp_path / "first"), None, one)
    assert code == 0
    first = tmp_path / "first" / "small"
    settings = {"start_from": str(first), "start_weights": "0.5", "name": "next"}
    ranks = on_ranks(2, trainer_tasks.start_next_stage, str(tmp_path / "larger"), str(tmp_path), settings)
    assert [code for code, _ in ranks] == [EXIT_AGAIN] * 2
    assert [len(warned) for _, warned in ranks] == [1, 0]
    assert "new branches keep their starting weights: fusion." in ranks[0][1][0]
    before, now = load_weights(first, "0.5"), load_weights(tmp_path / "next", "raw")
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert {name.split(".")[0] for name in set(now) - set(before)} == {"fusion"}
    assert all(name in ranks[0][1][0] for name in set(now) - set(before))
    codes = [
        code
        for code, _ in on_ranks(
            2, trainer_tasks.train, str(tmp_path / "larger"), str(tmp_path), None, settings
        )
    ]
    assert codes == [0, 0]


SPOILERS = {"not finite": (math.nan, {}), "a spike": (1000.0, {"optim__spike": 5.0})}


@pytest.mark.parametrize(("factor", "settings"), SPOILERS.values(), ids=SPOILERS)
def test_a_spoiled_step_is_skipped_and_counted(store, tmp_path, factor, settings):
    assert on_ranks(2, trainer_tasks.train_spoiled, store, str(tmp_path), factor, [6], settings) == [0, 0]
    run = tmp_path / "small"
    (skipped,) = read_events(run, "skipped")
    assert skipped["step"] == 7
    assert not float(skipped["grad_norm"]) < 5
    assert [report["skipped"] for report in read_reports(run)] == [0] * 6 + [1] * 6
    assert all(value.isfinite().all() for value in load_weights(run, "ema").values())


class Command:
    """`python -m pipeline.train` on two processes."""

    def __init__(self, folder, config, *arguments):
        self.folder, self.pool = folder, Pool(2)
        (folder / "stage.yaml").write_text(dump_stage(config))
        self.pool.send(trainer_tasks.command, (str(folder), str(folder / "stage.yaml"), *arguments))

    def end(self):
        """Exit codes, and what each wrote to stderr."""
        try:
            for process in self.pool.processes:
                process.join(60)
            logs = [(self.folder / f"rank_{rank:05d}.txt").read_text() for rank in range(2)]
            return [process.exitcode for process in self.pool.processes], logs
        finally:
            self.pool.kill()


@pytest.mark.slow
def test_spoiled_steps_in_a_row_end_the_run_which_says_why_and_leaves_good_checkpoints(store, tmp_path):
    config = trainer_tasks.stage(store, tmp_path, optim__max_skipped_steps=2, checkpoint__every_samples=16)
    codes, logs = Command(tmp_path, config, math.nan, range(7, 12)).end()
    assert codes == [2, 2]
    why = (
        "3 steps in a row up to step 10 had non-finite or spiking gradients: "
        "lower optim.lr, or look at the batches named in "
    )
    assert any(log.startswith(f"error: {why}{config.run / 'metrics.jsonl'}\n") for log in logs)
    assert [event["step"] for event in read_events(config.run, "skipped")] == [8, 9, 10]
    assert all(value.isfinite().all() for value in load_weights(config.run, "raw").values())
    assert not (config.run / "finished.json").exists()
    settings = {"optim__max_skipped_steps": 2, "checkpoint__every_samples": 16}
    assert [code for code, _ in on_ranks(2, trainer_tasks.train, store, str(tmp_path), None, settings)] == [
        0,
        0,
    ]
    assert read_events(config.run, "start")[-1]["step"] >= 6


def test_a_second_start_of_a_run_is_one_line_on_all_ranks(store, tmp_path):
    config = trainer_tasks.stage(store, tmp_path)
    lock_run(config.run)
    codes, logs = Command(tmp_path, config).end()
    assert codes == [2, 2]
    assert f"is being trained by process {os.getpid()} on " in logs[0]
    assert [path.name for path in config.run.iterdir()] == ["lock"]


def test_a_run_goes_on_longer_tells_what_changed_and_keeps_its_objective(store, tmp_path):
    settings = {"samples": 16, "checkpoint__every_samples": 8}
    assert on_ranks(1, trainer_tasks.train, store, str(tmp_path), None, settings)[0][0] == 0
    run = tmp_path / "small"
    refused = on_ranks(
        1, trainer_tasks.train_spoiled, store, str(tmp_path), 1.0, [], {**settings, "objective__name": "ddpm"}
    )
    assert refused[0].startswith(
        f"cannot go on from {run / 'checkpoints/step_000000002'} with objective.name="
    )
    assert (run / "finished.json").exists()
    more = {**settings, "samples": 32, "data__caption_drop": 0.5, "optim__lr": 3e-3}
    ((code, reports),) = on_ranks(1, trainer_tasks.train, store, str(tmp_path), None, more)
    assert code == 0
    assert [report["step"] for report in reports] == [1, 2, 3, 4]
    how = read_events(run, "start")[-1]["how"]
    changed = ["samples=32 (was 16)", "data.caption_drop=0.5 (was 0.1)", "optim.lr=0.003 (was 0.01)"]
    assert how == f"resumed from step_000000002 with {', '.join(changed)}"
    # warm-up over 16 samples: the rates before are of the first setting, those after of the second
    optim = trainer_tasks.stage(store, tmp_path, **more).optim
    assert [report["lr"] for report in reports[2:]] == [learning_rate(optim, seen, 32) for seen in (16, 24)]
    assert reports[0]["lr"] == 1e-2 / 17
    assert json.loads((run / "finished.json").read_text())["samples"] == 32


def test_a_signal_to_one_rank_saves_and_ends_all_with_85(store, tmp_path):
    config = trainer_tasks.stage(store, tmp_path, samples=80_000)
    command = Command(tmp_path, config)
    deadline = time.monotonic() + 60
    while len(read_reports(config.run)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(command.pool.processes[1].pid, signal.SIGTERM)
    codes, logs = command.end()
    assert codes == [EXIT_AGAIN, EXIT_AGAIN], logs
    (stop,) = read_events(config.run, "stop")
    assert stop["reason"] == "asked to stop on another rank"
    assert (config.run / "checkpoints" / "latest").read_text() == f"step_{stop['step']:09d}"


def test_losses_by_bucket_and_the_refiners_gates_are_in_the_log(straight):
    _, reports = straight
    for report in reports:  # a batch is of one bucket
        assert [report[name] for name in ("loss_32x32", "loss_32x64") if name in report] == [report["loss"]]
    assert {name for report in reports for name in report} >= {"loss_32x32", "loss_32x64"}
    gates = [name for name in reports[0] if name.startswith("gate_")]
    assert (
        len(gates) == 2 * 2 + 2 * 1
    )  # two LLMs, two blocks of their own refiners and one of the collaborative
    assert all(reports[0][name] == 0 < reports[-1][name] for name in gates)


ELASTIC = {"model__depth": 4, "elastic__depths": [4, 2], "elastic__patches": [2, 4]}


# Slow: dozens of graphs. The quick suite compiles a block of each kind in `test_engine.py`.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("world", "settings", "graphs"),
    [
        # For each kind of block: two sizes of batches, with and without padding.
        (1, {"model__checkpoint_every": 2}, 12),
        (2, {"engine__micro_batch": 2, "engine__precision": "fp32"}, 12),
        # Those of the network besides: two more numbers of patches, for all depths.
        (1, ELASTIC, 16),
    ],
)
def test_blocks_are_compiled_before_the_first_step_and_nothing_else_changes(
    store, tmp_path, world, settings, graphs
):
    """Buckets of two shapes in batches of two sizes, with and without padding, captions of all lengths."""
    settings = {"data__tokens_per_batch": 128, "data__batch_multiple": 4, "samples": 48, **settings}
    runs = {}
    for warms in (True, False):
        ranks = on_ranks(
            world,
            trainer_tasks.train_compiled,
            store,
            str(tmp_path / str(warms)),
            settings,
            warms,
            timeout=600,
        )
        runs[warms] = ranks[0][0]
        for _, after_warm_up, at_the_end, breaks in ranks:
            assert breaks == 0
            assert after_warm_up == ((graphs, graphs) if warms else (0, 0))
            assert (after_warm_up == at_the_end) == warms
    assert numbers(runs[True]) == numbers(runs[False])
    assert all(
        same_weights(*(tmp_path / str(warms) / "small" for warms in runs), which)
        for which in ("raw", "ema", "0.5")
    )


def test_pictures_while_training_do_not_depend_on_the_number_of_processes_and_leave_no_trace(store, tmp_path):
    short = {"engine__precision": "fp32", "samples": 48}
    prompts = ["a dog", "", "two cats and a bird"]
    grid = {
        "sample__every_samples": 24,
        "sample__prompts": prompts,
        "sample__height": 32,
        "sample__width": 64,
    }
    grid["sample__steps"], grid["sample__scenes"], pictures, scores = 3, 3, {}, {}
    for world in (1, 2):
        runs = tmp_path / str(world)
        (code, reports, loaded), *others = on_ranks(
            world, trainer_tasks.train_and_draw, store, str(runs), short | grid
        )
        assert code == 0
        assert (loaded, [other[2] for other in others]) == (
            ["small", "wide"],
            [[]] * (world - 1),
        )  # one rank reads the prompts
        paths = sorted((runs / "small" / "grids").iterdir())
        assert [path.name for path in paths] == ["samples_000000000024.png", "samples_000000000048.png"]
        scores[world] = [
            {key: value for key, value in event.items() if key != "time"}
            for event in read_events(runs / "small", "scenes")
        ]
        assert [event["samples"] for event in scores[world]] == [24, 48]
        assert all(0 <= event["segment"] <= event["colour"] <= 1 for event in scores[world])
        assert all(0 <= event[name] <= 1 for event in scores[world] for name in ("following", "chance"))
        pictures[world] = [np.asarray(Image.open(path)).astype(int) for path in paths]
    (_, without), _ = on_ranks(2, trainer_tasks.train, store, str(tmp_path / "without"), None, short)
    assert numbers(reports) == numbers(without)
    for one, two in zip(*pictures.values(), strict=True):
        assert np.abs(one - two).max() <= 2
    assert np.abs(pictures[1][0] - pictures[1][1]).mean() > 2  # the network has moved


def test_batches_of_several_sizes_count_their_samples(store, tmp_path):
    """By a token budget 32x64 has half the samples a step: losses, averages and intervals go by the samples
    seen."""
    budget = {"data__tokens_per_batch": 128, "data__batch_multiple": 4, "log__peak_tflops": 1.0}
    (code, reports), _ = on_ranks(2, trainer_tasks.train, store, str(tmp_path), None, budget)
    assert code == 0
    config = trainer_tasks.stage(store, tmp_path, **budget)
    plan = open_data(config).schedule.plan
    epochs = [plan(epoch) for epoch in range(2)]
    sizes = [len(epoch.batch(index).rows) for epoch in epochs for index in range(len(epoch))]
    samples = [report["samples"] for report in reports]
    assert set(sizes) == {4, 8}
    assert samples == list(itertools.accumulate(sizes))[: len(samples)]
    assert samples[-2] < 96 <= samples[-1]
    saves = {next(count for count in samples if count >= due) for due in (32, 64, 96)}
    validations = {next(count for count in samples if count >= 72)}
    events = read_events(tmp_path / "small")
    assert {event["samples"] for event in events if event["event"] == "save"} == saves
    assert {event["samples"] for event in events if event["event"] == "validation"} == validations
    for report, size in zip(reports, sizes, strict=False):
        tokens = [fake_snapshot.PREFIX + int(report["caption_tokens"] / 2)] * 2
        flops = flops_per_sample(
            config.dit(fake_snapshot.CHANNELS),
            config.fusion,
            [6, 10],
            (4, {8: 4, 4: 8}[size]),
            tokens,
            [fake_snapshot.PREFIX] * 2,
        )
        assert report["mfu"] == pytest.approx(
            report["samples_per_second"] * flops / 2e12
        )  # two processes of 1 TFLOP/s


def test_a_finished_run_shows_what_it_did(straight):
    run, reports = straight
    assert len(reports) == 12
    assert json.loads((run / "finished.json").read_text())["samples"] == 96
    record = learned.measure(run, pairs=8)
    # fresh weights predict zero, so their loss is the mean square of the target, about that of data plus
    # noise
    assert 1.5 < record["untrained_mean"] < 4.5
    assert record["right"] != record["shuffled"] != record["untrained"]
    page = build(run).read_text()
    assert "<svg" in page
    for attribute in ('src="http', '<a href="http', "url(http"):
        assert attribute not in page  # the page needs no other file and no network


def test_any_average_of_a_run_is_drawn_with_by_its_decay(straight):
    run, _ = straight
    networks = {
        which: Sampler.from_run(run, which, torch.device("cpu"), torch.float32).network
        for which in ("ema", "0.5")
    }
    weights = {which: network.state_dict() for which, network in networks.items()}
    for which in weights:
        expected = load_weights(run, which)
        assert all(torch.equal(weights[which][name], expected[name]) for name in expected)
    assert not torch.equal(weights["ema"]["final.linear.weight"], weights["0.5"]["final.linear.weight"])
    with pytest.raises(
        UserError, match=r"no weights `0.7` there: choose raw, ema, or the decay of an average: 0.9, 0.5$"
    ):
        Sampler.from_run(run, "0.7", torch.device("cpu"), torch.float32)


def say(monkeypatch, capsys, *arguments):
    """Exit code and stderr of `python -m pipeline.train`."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as end:
        train.main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.store=/nowhere/at/all", "/nowhere/at/all"),
        ("data.dataset=other", "other"),
        ("data.dataset=", "data.dataset is empty: set it"),
        ("data.store=", "data.store is empty: set it"),
        ("data.snapshot=0123456789abcdef", "0123456789abcdef"),
        ("data.latents=small", "no latents family `small`"),
        ("fusion.families=[small,larger]", "no text family `larger`: it has small, wide"),
        ("fusion.expect.small.llm=another", "was made with llm=fake small, the stage expects another"),
        ("optim.lrr=1", "Did you mean: 'lr'"),
        ("optim.name=adamv", "optim.name=adamv is unknown: did you mean `adamw`?"),
        ("optim.settings.nesterov=true", "optim.settings.nesterov: unknown for optim.name=adamw"),
        ("model.preset=huge", "model.preset=huge is unknown"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    store, tmp_path, monkeypatch, capsys, override, says
):
    stage = trainer_tasks.stage(store, tmp_path)
    (tmp_path / "stage.yaml").write_text(dump_stage(stage))
    code, error = say(monkeypatch, capsys, str(tmp_path / "stage.yaml"), "--dry-run", override)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not stage.run.exists()


def test_a_dry_run_prints_the_stage(store, tmp_path, monkeypatch, capsys):
    (tmp_path / "stage.yaml").write_text(dump_stage(trainer_tasks.stage(store, tmp_path)))
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "stage.yaml"), "--dry-run", "optim.lr=0.25"])
    train.main()
    printed = capsys.readouterr().out
    assert "lr: 0.25" in printed
    assert "100 pairs in 2 buckets" in printed
    assert not (tmp_path / "small").exists()


def test_a_finished_stage_is_not_run_again(straight, monkeypatch, capsys):
    run, _ = straight
    monkeypatch.setattr(sys, "argv", ["train", str(run / "stage.yaml")])
    train.main()
    assert "already finished" in capsys.readouterr().out
