"""The trainer: exact resume, the same losses on any number of processes, clear ends."""

import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import UserError
from pipeline import learned, train
from pipeline.checkpoint import load_weights
from pipeline.config import DatasetShare, dump_stage
from pipeline.loader import TrainingData
from pipeline.metrics import read_events
from pipeline.report import build
from pipeline.sampler import Sampler
from pipeline.stopping import EXIT_AGAIN
from tests.distributed import on_ranks
from tests.pipeline import fake_snapshot, trainer_tasks

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


@pytest.mark.parametrize("stop_at", [1, 6])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(store, straight, tmp_path, stop_at):
    codes = [code for code, _ in on_ranks(2, trainer_tasks.train, store, str(tmp_path), stop_at)]
    assert codes == [EXIT_AGAIN, EXIT_AGAIN]  # only the last rank was asked, both stopped
    (code, reports), _ = on_ranks(2, trainer_tasks.train, store, str(tmp_path))
    assert code == 0
    run, expected = straight
    assert [event["step"] for event in read_events(tmp_path / "small", "start")] == [0, stop_at]
    assert numbers(reports) == numbers(expected)
    assert all(same_weights(tmp_path / "small", run, which) for which in ("raw", "ema", "0.5"))
    validations = [[event["loss"] for event in read_events(folder, "validation")] for folder in (tmp_path / "small", run)]
    assert validations[0] == validations[1]


def test_a_mixture_of_datasets_trains_and_resumes_bit_for_bit_on_one_process(store, tmp_path):
    shares = {"ds": DatasetShare(0.6), "second": DatasetShare(0.4)}
    mixed, ended = {"data__dataset": "", "data__datasets": shares}, {}
    for name, stops in (("straight", [None]), ("resumed", [5, None])):
        for stop_at in stops:
            ((code, reports),) = on_ranks(1, trainer_tasks.train, store, str(tmp_path / name), stop_at, mixed)
            assert code == (0 if stop_at is None else EXIT_AGAIN)
        ended[name] = numbers(reports)
    assert ended["straight"] == ended["resumed"]
    assert all(same_weights(tmp_path / "straight/small", tmp_path / "resumed/small", which) for which in ("raw", "ema", "0.5"))
    snapshots = {event["snapshot"] for name in ended for event in read_events(tmp_path / name / "small", "start")}
    assert re.fullmatch(r"\{'0\.6 ds@\w+ \+ 0\.4 second@\w+'\}", str(snapshots))


TINY = {f"model__{size}": None for size in ("depth", "width", "heads", "patch")} | {"model__preset": "tiny", "optim__lr": 1e-3}


@pytest.mark.parametrize("model", [{}, pytest.param(TINY, marks=pytest.mark.slow, id="tiny")])
def test_losses_do_not_depend_on_the_number_of_processes(store, tmp_path, model):
    fp32 = {"engine__precision": "fp32", "samples": 8 * 20, "checkpoint__every_samples": 8 * 20, "ema": [0.9], **model}
    losses = {}
    for world in (1, 2, 4):
        (code, reports), *_ = on_ranks(world, trainer_tasks.train, store, str(tmp_path / str(world)), None, fp32)
        assert code == 0
        losses[world] = torch.tensor([report["loss"] for report in reports])
    assert losses[1].unique().numel() == 20
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[4], losses[1], rtol=1e-4, atol=0)


def test_losses_by_bucket_and_the_refiners_gates_are_in_the_log(straight):
    _, reports = straight
    for report in reports:  # a batch is of one bucket
        assert [report[name] for name in ("loss_32x32", "loss_32x64") if name in report] == [report["loss"]]
    assert {name for report in reports for name in report} >= {"loss_32x32", "loss_32x64"}
    gates = [name for name in reports[0] if name.startswith("gate_")]
    assert len(gates) == 2 * 2 + 2 * 1  # two LLMs, two blocks of their own refiners and one of the collaborative
    assert all(reports[0][name] == 0 < reports[-1][name] for name in gates)


@pytest.mark.parametrize(
    ("world", "settings"), [(1, {"model__checkpoint_every": 2}), (2, {"engine__micro_batch": 2, "engine__precision": "fp32"})]
)
def test_blocks_are_compiled_before_the_first_step_and_nothing_else_changes(store, tmp_path, world, settings):
    """Buckets of two shapes in batches of two sizes, with and without padding, captions of all lengths."""
    settings = {"data__tokens_per_batch": 128, "data__batch_multiple": 4, "samples": 48, **settings}
    runs = {}
    for warms in (True, False):
        ranks = on_ranks(world, trainer_tasks.train_compiled, store, str(tmp_path / str(warms)), settings, warms)
        runs[warms] = ranks[0][0]
        for _, after_warm_up, at_the_end, breaks in ranks:
            assert breaks == 0
            assert after_warm_up == ((4, 4) if warms else (0, 0))
            assert (after_warm_up == at_the_end) == warms
    assert numbers(runs[True]) == numbers(runs[False])
    assert all(same_weights(*(tmp_path / str(warms) / "small" for warms in runs), which) for which in ("raw", "ema", "0.5"))


def test_pictures_while_training_do_not_depend_on_the_number_of_processes_and_leave_no_trace(store, tmp_path):
    short = {"engine__precision": "fp32", "samples": 48}
    prompts = ["a dog", "", "two cats and a bird"]
    grid = {"sample__every_samples": 24, "sample__prompts": prompts, "sample__height": 32, "sample__width": 64}
    grid["sample__steps"], grid["sample__scenes"], pictures, scores = 3, 3, {}, {}
    for world in (1, 2):
        runs = tmp_path / str(world)
        (code, reports, loaded), *others = on_ranks(world, trainer_tasks.train_and_draw, store, str(runs), short | grid)
        assert code == 0
        assert (loaded, [other[2] for other in others]) == (["small", "wide"], [[]] * (world - 1))  # one rank reads the prompts
        paths = sorted((runs / "small" / "grids").iterdir())
        assert [path.name for path in paths] == ["samples_000000000024.png", "samples_000000000048.png"]
        scores[world] = [
            {key: value for key, value in event.items() if key != "time"} for event in read_events(runs / "small", "scenes")
        ]
        assert [event["samples"] for event in scores[world]] == [24, 48]
        assert all(0 <= event["segment"] <= event["colour"] <= 1 for event in scores[world])
        pictures[world] = [np.asarray(Image.open(path)).astype(int) for path in paths]
    (_, without), _ = on_ranks(2, trainer_tasks.train, store, str(tmp_path / "without"), None, short)
    assert numbers(reports) == numbers(without)
    for one, two in zip(*pictures.values(), strict=True):
        assert np.abs(one - two).max() <= 2
    assert np.abs(pictures[1][0] - pictures[1][1]).mean() > 2  # the network has moved


def test_batches_of_several_sizes_count_their_samples(store, tmp_path):
    """By a token budget 32x64 has half the samples a step: losses, averages and intervals go by the samples seen."""
    budget = {"data__tokens_per_batch": 128, "data__batch_multiple": 4, "log__peak_tflops": 1.0}
    (code, reports), _ = on_ranks(2, trainer_tasks.train, store, str(tmp_path), None, budget)
    assert code == 0
    plan = TrainingData(trainer_tasks.stage(store, tmp_path, **budget), 0, 1, torch.device("cpu")).plan
    sizes = [plan(epoch).size(index) for epoch in range(2) for index in range(len(plan(epoch)))]
    samples = [report["samples"] for report in reports]
    assert set(sizes) == {4, 8}
    assert samples == list(itertools.accumulate(sizes))[: len(samples)]
    assert samples[-2] < 96 <= samples[-1]
    reached = [next(count for count in samples if count >= due) for due in (32, 48, 64, 96)]
    events = read_events(tmp_path / "small")
    assert {event["samples"] for event in events if event["event"] == "save"} == {reached[0], reached[2], reached[3]}
    assert {event["samples"] for event in events if event["event"] == "validation"} == {reached[1], reached[3]}
    per_sample = [(report["mfu"] / report["samples_per_second"], size) for report, size in zip(reports, sizes, strict=False)]
    small, large = (sum(value for value, size in per_sample if size == wanted) for wanted in (8, 4))
    assert large / sizes[: len(samples)].count(4) > 1.2 * small / sizes[: len(samples)].count(8), "larger latents, more FLOPs"


def test_a_finished_run_shows_what_it_did(straight):
    run, reports = straight
    assert len(reports) == 12
    assert json.loads((run / "finished.json").read_text())["samples"] == 96
    record = learned.measure(run, pairs=8)
    # fresh weights predict zero, so their loss is the mean square of the target, about that of data plus noise
    assert 1.5 < record["untrained_mean"] < 4.5
    assert record["right"] != record["shuffled"] != record["untrained"]
    page = build(run).read_text()
    assert "<svg" in page
    for attribute in ('src="http', '<a href="http', "url(http"):
        assert attribute not in page  # the page needs no other file and no network


def test_any_average_of_a_run_is_drawn_with_by_its_decay(straight):
    run, _ = straight
    networks = {which: Sampler.from_run(run, which, torch.device("cpu"), torch.float32).network for which in ("ema", "0.5")}
    weights = {which: network.state_dict() for which, network in networks.items()}
    for which in weights:
        expected = load_weights(run, which)
        assert all(torch.equal(weights[which][name], expected[name]) for name in expected)
    assert not torch.equal(weights["ema"]["final.linear.weight"], weights["0.5"]["final.linear.weight"])
    with pytest.raises(UserError, match=r"no weights `0.7` there: choose raw, ema, or the decay of an average: 0.9, 0.5$"):
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
        ("model.preset=huge", "model.preset=huge is unknown"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(store, tmp_path, monkeypatch, capsys, override, says):
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
