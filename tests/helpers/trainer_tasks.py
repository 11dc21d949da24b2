"""What the ranks of the trainer's tests run."""

import logging
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from model.common.errors import UserError
from pipeline import train as train_command
from pipeline.checkpoint import room
from pipeline.runtime.distributed import Distributed
from pipeline.runtime.run_log import read_reports
from pipeline.runtime.stopping import Stop
from pipeline.training import previews as grid
from pipeline.training.callbacks import Callback
from pipeline.training.trainer import Trainer
from tests.helpers import fake_snapshot
from tests.helpers.tiny_sampler import LetterLLM


class StopAt(Stop):
    """Asks one rank to stop before a step."""

    def __init__(self, step, rank):
        super().__init__()
        self.left, self.asked = step, rank == Distributed.from_environment().rank

    def requested(self):
        self.left -= 1
        return self.asked and self.left < 0


def stage(store, runs, **settings):
    """A small stage on the fake snapshot; dotted settings as `optim__lr=...`."""
    config = fake_snapshot.stage(store, f"{runs}/cache", global_batch=8, canonical_nodes=2, shuffle_parts=2)
    config.name, config.runs, config.samples = "small", str(runs), 8 * 12
    config.model.depth, config.model.width, config.model.heads, config.model.patch = 2, 32, 2, 2
    config.optim.lr, config.optim.warmup_samples = 1e-2, 16
    config.engine.reduce_bucket = config.engine.prefetch_bucket = 100_000
    config.engine.persistence_threshold, config.engine.overlap_comm = 100, False
    config.checkpoint.every_samples = 8 * 4
    config.ema, config.log.every_steps, config.log.tensorboard = [0.9, 0.5], 1, False
    config.log.validate_every_samples, config.data.validation_parts = 8 * 9, 1
    for name, value in settings.items():
        target, *path = config, *name.split("__")
        for part in path[:-1]:
            target = getattr(target, part)
        assert hasattr(target, path[-1])
        setattr(target, path[-1], value)
    return config


def train(store, runs, stop_at=None, settings=None):
    """Train on this rank; returns the exit code and the reports so far."""
    logging.disable(logging.INFO)
    torch.manual_seed(
        Distributed.from_environment().rank
    )  # the trainer must not depend on what was drawn before
    config = stage(store, runs, **(settings or {}))
    stop = Stop() if stop_at is None else StopAt(stop_at, rank=Distributed.from_environment().world - 1)
    code = Trainer(config, Distributed.from_environment(), stop).run()
    return code, read_reports(config.run)


class SpoiledNoise(Callback):
    """Multiplies the noise of some steps on the last rank."""

    def __init__(self, factor, steps):
        self.factor, self.steps = factor, steps

    def before_step(self, trainer, batch):
        if trainer.state.step in self.steps and trainer.ranks.rank == trainer.ranks.world - 1:
            batch.noise.mul_(self.factor)


def train_spoiled(store, runs, factor, steps, settings, stop_at=None):
    """Exit code of such a run, or the line that it ends with."""
    logging.disable(logging.INFO)
    config = stage(store, runs, **settings)
    ranks = Distributed.from_environment()
    stop = Stop() if stop_at is None else StopAt(stop_at, rank=ranks.world - 1)
    trainer = Trainer(config, ranks, stop, callbacks=[SpoiledNoise(factor, steps)])
    try:
        return trainer.run()
    except UserError as error:
        return str(error)


def train_on_a_small_disk(store, runs, free, stop_at, settings):
    """`train` on a disk with `free` bytes; what was looked at, and the lines about it."""
    looked, lines = [], []
    room.shutil = SimpleNamespace(
        disk_usage=lambda path: (looked.append(path), SimpleNamespace(free=free))[1]
    )
    room.log_line = lines.append
    train(store, runs, stop_at, settings)
    return looked, lines


def start_next_stage(store, runs, settings):
    """Save before the first step; what was warned of."""
    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("pipeline.engine.engine").addHandler(handler)
    try:
        code, _ = train(store, runs, 0, settings)
    finally:
        logging.getLogger("pipeline.engine.engine").removeHandler(handler)
    return code, warned


def command(folder, path, factor=1.0, steps=()):
    """`python -m pipeline.train`, with stderr in a file as on a cluster."""
    sys.stderr = (Path(folder) / f"rank_{Distributed.from_environment().rank:05d}.txt").open("w", buffering=1)
    train_command.Trainer = partial(Trainer, callbacks=[SpoiledNoise(factor, steps)])
    train_command.STOP.install()
    sys.argv = ["train", path]
    train_command.main()


class FakeVAE:
    """Shows latents of two channels as pixels."""

    def decode(self, latents):
        colours = latents[:, [0, 1, 0]].tanh()
        return colours.repeat_interleave(fake_snapshot.DOWN, 2).repeat_interleave(fake_snapshot.DOWN, 3)


def train_and_draw(store, runs, settings):
    """`train` with a grid now and then; the LLMs that were loaded on this rank besides."""
    loaded = []

    def load_llm(family, device):
        loaded.append(family.name)
        return LetterLLM(family.info["width"], longest=400)

    real = grid.load_llm, grid.load_vae
    grid.load_llm, grid.load_vae = load_llm, lambda stage, latents, device: FakeVAE()
    try:
        return *train(store, runs, None, settings), loaded
    finally:
        grid.load_llm, grid.load_vae = real


class Compilations:
    """A backend of `torch.compile` that runs graphs as they are, and counts those of forward and of backward
    passes."""

    def __init__(self):
        self.forward = self.backward = 0
        self.compile = partial(
            torch.compile, backend=aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)
        )

    def _forward(self, graph, inputs):
        self.forward += 1
        return make_boxed_func(graph.forward)

    def _backward(self, graph, inputs):
        self.backward += 1
        return make_boxed_func(graph.forward)


class WatchedWarmUp(Trainer):
    """Warms up or not, and checks that this changes nothing that training could see."""

    warms, compilations, after = True, None, None

    def warm_up(self):
        def state():
            owned = [tensor for tensors in self.engine.state().tensors.values() for tensor in tensors]
            gradients = [parameter.grad for parameter in self.engine.module.parameters()]
            return [tensor.clone() for tensor in (*owned, torch.get_rng_state())] + gradients

        before = state()
        if self.warms:
            super().warm_up()
        assert all(
            one is other or torch.equal(one, other) for one, other in zip(before, state(), strict=True)
        )
        self.after = self.compilations.forward, self.compilations.backward


def train_compiled(store, runs, settings, warms):
    """`train` with compiled blocks: reports, graphs (forward, backward) after the warm-up and at the end,
    graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logging.disable(logging.INFO)
    ranks = Distributed.from_environment()
    config = stage(store, runs, model__compile=True, log__validate_every_samples=0, **settings)
    compilations, real = Compilations(), torch.compile
    torch.compile = compilations.compile
    try:
        trainer = WatchedWarmUp(config, ranks, Stop())
        trainer.warms, trainer.compilations = warms, compilations
        assert trainer.run() == 0
    finally:
        torch.compile = real
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return read_reports(config.run), trainer.after, (compilations.forward, compilations.backward), breaks
