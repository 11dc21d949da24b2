"""What the ranks of the tests of elastic training run."""

import logging

import torch

from pipeline.runtime.distributed import Distributed
from pipeline.runtime.run_log import read_reports
from pipeline.runtime.stopping import Stop
from pipeline.training.callbacks import Callback
from pipeline.training.trainer import Trainer
from tests.helpers import trainer_tasks
from tests.helpers.engine_tasks import gathered


class Moved(Callback):
    """Notes the part of each step, and which parameters moved."""

    def __init__(self):
        self.parts, self.moved, self.before = [], [], {}

    def before_step(self, trainer, batch):
        self.parts.append(trainer.passes.part(batch))
        self.before = gathered(trainer.engine, "master")

    def after_step(self, trainer, batch):
        after = gathered(trainer.engine, "master")
        self.moved.append({name for name in after if not torch.equal(after[name], self.before[name])})


class Ran(Callback):
    """Notes the parts that the network has run in each step."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer):
        module, route = trainer.engine.module, trainer.engine.module.route

        def noting(part):
            self.steps[-1].append(str(part))
            return route(part)

        module.route = noting

    def before_step(self, trainer, batch):
        self.steps.append([])


def train_and_note(store, runs, stop_at, settings):
    """Parts that this rank's network has run in each step of this start, and the losses of all reports."""
    logging.disable(logging.INFO)
    ranks, ran = Distributed.from_environment(), Ran()
    config = trainer_tasks.stage(store, runs, **settings)
    stop = Stop() if stop_at is None else trainer_tasks.StopAt(stop_at, rank=ranks.world - 1)
    Trainer(config, ranks, stop, callbacks=[ran]).run()
    return [list(dict.fromkeys(step)) for step in ran.steps], [
        report["loss"] for report in read_reports(config.run)
    ]


def train_and_watch(store, runs, settings):
    """Parts of the steps, names of the parameters that moved in each, and the reports."""
    logging.disable(logging.INFO)
    watch = Moved()
    config = trainer_tasks.stage(store, runs, **settings)
    assert Trainer(config, Distributed.from_environment(), Stop(), callbacks=[watch]).run() == 0
    return watch.parts, watch.moved, read_reports(config.run)
