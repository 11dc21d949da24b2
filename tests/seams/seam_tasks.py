"""What the ranks of the seams' tests run; importing it registers the toys on each of them."""

import logging

import torch

from model import functional
from pipeline.runtime.distributed import Distributed
from pipeline.runtime.run_log import read_reports
from pipeline.runtime.stopping import Stop
from pipeline.training.callbacks import Callback
from pipeline.training.trainer import Trainer
from tests.helpers import fake_snapshot, trainer_tasks
from tests.seams import toys  # noqa: F401

FRAMES = 3
STEPS = 6
PLAIN = {"samples": 8 * STEPS, "log__validate_every_samples": 0, "data__validation_parts": 0}


def train(store, runs, stop_at, settings):
    """Exit code and reports of a small stage with further settings."""
    torch._dynamo.reset()
    real = torch.compile
    torch.compile = lambda function, **options: real(function, **{**options, "backend": "eager"})
    try:
        return trainer_tasks.train(store, runs, stop_at, {**PLAIN, **settings})
    finally:
        torch.compile = real


class Watch(Callback):
    """Notes the steps, and adds a quantity."""

    def __init__(self):
        self.steps = []

    def quantities(self):
        return ["toy_quantity"]

    def before_step(self, trainer, batch):
        self.steps.append(trainer.state.step)

    def after_micro_batch(self, trainer, batch, losses, timesteps):
        trainer.sums.add("toy_quantity", losses)


def watched(store, runs):
    """Steps that a callback has seen, and names of what was reported."""
    logging.disable(logging.INFO)
    watch = Watch()
    config = trainer_tasks.stage(store, runs, **PLAIN)
    assert Trainer(config, Distributed.from_environment(), Stop(), callbacks=[watch]).run() == 0
    return watch.steps, list(read_reports(config.run)[-1])


def make_clips(folder):
    """A store whose latents have a time axis."""
    latents = fake_snapshot.LATENTS
    clips = type(latents)(latents.name, latents.kind, latents.identity, {**latents.info, "frames": FRAMES})
    images = fake_snapshot.latents_row

    def clips_row(id, bucket):
        row = images(id, bucket)
        return {name: value if name == "id" else value * FRAMES for name, value in row.items()}

    fake_snapshot.latents_row = clips_row
    try:
        families = [clips, *fake_snapshot.TEXTS.values()]
        fake_snapshot.make(folder / "store", {"32x32": [20, 12]}, folder, families=families)
    finally:
        fake_snapshot.latents_row = images
    return str(folder / "store")


def resume_old(folder):
    """Exit code and reports of the run in `tests/fixtures/before_the_house`, resumed in a copy of it."""
    logging.disable(logging.INFO)
    # the kernels that the expected numbers were made with, on any CPU
    functional.CPU_HAS_BF16 = True
    config = trainer_tasks.stage(
        f"{folder}/store",
        f"{folder}/runs",
        model__depth=1,
        model__width=16,
        model__heads=2,
        fusion__refiner_blocks=1,
        ema=[0.9],
        log__validate_every_samples=0,
        data__validation_parts=0,
        samples=8 * 8,
        checkpoint__every_samples=8 * 100,
    )
    code = Trainer(config, Distributed.from_environment(), Stop()).run()
    return code, read_reports(config.run)
