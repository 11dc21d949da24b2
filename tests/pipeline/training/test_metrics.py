"""What a run writes about itself can be read back: JSONL always, TensorBoard by default, W&B only where asked
for."""

import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.common.errors import UserError
from pipeline.runtime import console
from pipeline.runtime.run_log import read_events, read_reports
from pipeline.stage.config import LogConfig
from pipeline.training.metrics import TIMESTEP_BINS, Interval, MetricsLog, RankSums, peak_memory_gb

REPORTS = {1: {"loss": 3.0, "lr": 0.5}, 2: {"loss": math.nan, "lr": 0.25}, 3: {"loss": 1.0, "lr": 0.125}}


def write(run, log, writes=True):
    out = MetricsLog(run, log, "name: small", 0, writes)
    out.event("start", step=0)
    for step, values in REPORTS.items():
        out.report(step, 8 * step, values)
    out.scores("scenes", 3, 24, {"colour": 0.5})
    out.image("samples", np.zeros((4, 4, 3), np.uint8), 24)
    out.close()


def test_the_default_is_jsonl_and_tensorboard(tmp_path):
    write(tmp_path, LogConfig())
    reports = read_reports(tmp_path)
    assert [report["loss"] for report in reports] == [3.0, None, 1.0]  # JSON has no NaN
    assert [event["colour"] for event in read_events(tmp_path, "scenes")] == [0.5]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("lr")] == [(8, 0.5), (16, 0.25), (24, 0.125)]
    assert [event.value for event in board.Scalars("scenes/colour")] == [0.5]
    assert board.Tags()["images"] == ["samples"]


def test_only_rank_0_writes_and_the_last_run_of_a_step_counts(tmp_path):
    write(tmp_path, LogConfig(), writes=False)
    assert not list(tmp_path.iterdir())
    write(tmp_path, LogConfig(tensorboard=False))
    # went back to the checkpoint of step 2
    out = MetricsLog(tmp_path, LogConfig(tensorboard=False), "", 16, True)
    out.report(3, 24, {"loss": 7.0})
    out.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [report["loss"] for report in read_reports(tmp_path)] == [3.0, None, 7.0]
    assert not (tmp_path / "tensorboard").exists()


@settings(max_examples=10, deadline=None)
@given(crashes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=3))
def test_tensorboard_shows_each_step_once_after_a_crash(tmp_path_factory, crashes):
    """Of what was written about steps that were lost, only the second time counts."""
    run = tmp_path_factory.mktemp("run")
    reached, shown, last = 0, {}, {}
    for start, (back, steps) in enumerate([(0, 5), *crashes]):
        first = max(0, reached - back)
        out = MetricsLog(run, LogConfig(), "name: small", 8 * first, True)
        shown = {step: value for step, value in shown.items() if step <= 8 * first}
        for step in range(first + 1, first + steps + 1):
            out.report(step, 8 * step, {"loss": float(start)})
            out.image("samples", np.full((2, 2, 3), start, np.uint8), 8 * step)
            shown[8 * step] = last[step] = float(start)
        out.close()
        # the reader takes files by name, which has the second of the start
        (new,) = (run / "tensorboard").glob("*tfevents*[!s]")
        new.rename(new.with_name(f"events.out.tfevents.{start}.s"))
        reached = first + steps
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert {event.step: event.value for event in board.Scalars("loss")} == shown
    assert [event.step for event in board.Scalars("loss")] == sorted(shown)
    assert [event.step for event in board.Images("samples")] == sorted(shown)
    assert {report["step"]: report["loss"] for report in read_reports(run)} == last


def test_wandb_is_used_when_it_is_named_and_its_absence_is_one_line(tmp_path, monkeypatch):
    logged, begun = [], []
    session = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **settings: begun.append(settings) or session)
    )
    write(tmp_path, LogConfig(tensorboard=False))
    assert not begun
    write(tmp_path, LogConfig(tensorboard=False, wandb="project"))
    assert begun[0]["project"] == "project"
    assert begun[0]["id"] == tmp_path.name  # so that a resumed run goes on in the same curves
    assert logged[0] == (1, {"samples": 8, "loss": 3.0, "lr": 0.5})
    assert logged[-1] == "finished"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="the package wandb is missing: pip install wandb"):
        write(tmp_path, LogConfig(tensorboard=False, wandb="project"))


class FakeWandb:
    """A W&B project by its documented rule, seen in its package 0.31: the history has a row per step; what
    is logged for the last step joins its row, and what is logged for an earlier one is ignored."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.ignored: list[tuple[int, dict[str, float]]] = []

    def init(self, *, id: str, resume: str, **settings: object) -> SimpleNamespace:
        assert resume == "allow"
        history = self.runs.setdefault(id, {})

        def log(values: dict[str, float], step: int) -> None:
            if history and step < max(history):
                self.ignored.append((step, values))
            else:
                history.setdefault(step, {}).update(values)

        return SimpleNamespace(log=log, finish=lambda: None)


@settings(max_examples=20, deadline=None)
@given(
    crashes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=3),
    scored=st.sets(st.integers(1, 40)),
)
def test_wandb_shows_each_step_once_after_a_crash(tmp_path_factory, crashes, scored):
    """Steps that a crash lost, and that were trained again, keep one row with their losses and scores."""
    run, project = tmp_path_factory.mktemp("run"), FakeWandb()
    reached, expected, again = 0, {}, 0  # `again` = steps that were trained again before the last one shown
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", project)
        for back, steps in [(0, 5), *crashes]:
            first = max(0, reached - back)
            out = MetricsLog(run, LogConfig(tensorboard=False, wandb="project"), "", 8 * first, True)
            for step in range(first + 1, first + steps + 1):
                again += step < max(expected, default=0)
                out.report(step, 8 * step, {"loss": 1 / step})
                expected[step] = {"samples": 8 * step, "loss": 1 / step}
                if step in scored:
                    out.scores("following", step, 8 * step, {"score": step / 2})
                    expected[step]["following/score"] = step / 2
            # A crash: nobody closes the log.
            reached = first + steps
    assert project.runs == {run.name: expected}
    assert list(project.runs[run.name]) == sorted(expected)
    # What was ignored had been written before: a resumed run repeats the numbers of its steps exactly.
    assert len(project.ignored) >= again
    assert all(values.items() <= expected[step].items() for step, values in project.ignored)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=30))
def test_the_mean_loss_is_that_of_its_timestep_bins(observations):
    losses, timesteps = torch.tensor(observations, dtype=torch.float64).unbind(1)
    bins = [f"loss_t{index}" for index in range(TIMESTEP_BINS)]
    sums = RankSums(["loss", *bins], torch.device("cpu"))
    sums.add("loss", losses)
    sums.add_losses(losses, timesteps)
    means = sums.take()
    assert sum(means[name][1] for name in bins) == means["loss"][1] == len(observations)
    assert sum(mean * count for mean, count in (means[name] for name in bins)) == pytest.approx(
        float(losses.sum()), abs=1e-9
    )
    for index, name in enumerate(bins):
        inside = losses[(timesteps * TIMESTEP_BINS).long() == index]
        assert means[name][0] == pytest.approx(float(inside.mean()) if len(inside) else 0.0)
    assert all(count == 0 for _, count in sums.take().values())


def test_an_interval_that_a_checkpoint_cut_in_two_reports_as_a_whole_one():
    whole, first = Interval(), Interval()
    for step in range(5):
        whole.add("loss", step, weight=1 + step)
    for step in range(2):
        first.add("loss", step, weight=1 + step)
    rest = Interval.from_dict(json.loads(json.dumps(first.to_dict())))
    for step in range(2, 5):
        rest.add("loss", step, weight=1 + step)
    assert rest.means() == whole.means()
    assert not whole.counts


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is the GPU's memory")
def test_memory_is_the_most_that_the_process_has_held():
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert peak_memory_gb() == pytest.approx(int(kilobytes) / 2**20, rel=0.05)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere(monkeypatch, terminal):
    screen = io.StringIO()
    monkeypatch.setattr(
        console, "CONSOLE", Console(file=screen, force_terminal=terminal, width=160, soft_wrap=True)
    )
    progress = console.TrainingProgress("small", 0, 100, shows=True)
    progress.advance(48)
    progress.report(6, 48, {"loss": 1.5, "samples_per_second": 12.0, "mfu": 0.41, "other": 1.0})
    progress.close()
    shown = screen.getvalue()
    assert ("48/100 samples" in shown) == terminal
    assert ("step 6  samples 48" in shown) == (not terminal)
    assert "loss 1.5000  12.0/s  mfu 41.0%" in re.sub(r"\x1b\[[\d;?]*\w", "", shown)
