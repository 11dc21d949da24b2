"""What the ranks of the tests of users run."""

import logging

import torch

from pipeline.data.loader import TrainingData
from pipeline.runtime.distributed import Distributed
from pipeline.runtime.run_log import read_reports
from pipeline.runtime.stopping import Stop
from pipeline.stage.corpus import resolve
from pipeline.training.trainer import Trainer
from pipeline.training.users import GatheredRows, dispersion, gather_ids
from tests.helpers.engine_tasks import gathered
from tests.helpers.trainer_tasks import StopAt, stage

USERS = 6
SETTINGS = {
    "freeze": "base",
    "users__count": USERS + 1,
    "users__tokens": 2,
    "users__width": 16,
    "users__heads": 2,
    "users__blocks": 1,
    "users__rank": 4,
    "samples": 8 * 6,
    "log__validate_every_samples": 0,
}
"""Row `USERS` of the table is nobody's."""


def trainer_of(store, runs, settings, stop=None):
    logging.disable(logging.INFO)
    torch.manual_seed(Distributed.from_environment().rank)
    config = stage(store, runs, **{**SETTINGS, **settings})
    return Trainer(config, Distributed.from_environment(), stop or Stop())


def train(store, runs, settings, stop_at=None):
    """Train; returns the exit code, the reports, and the layout's names of trained parameters."""
    stop = None if stop_at is None else StopAt(stop_at, rank=Distributed.from_environment().world - 1)
    trainer = trainer_of(store, runs, settings, stop)
    code = trainer.run()
    state = trainer.engine.state()
    return code, read_reports(trainer.stage.run), sorted(state.layout.shapes), sorted(state.replicated)


def table_after_each_step(store, runs, settings, steps):
    """Return of each step the users of the global batch, and the rows of the table that changed."""
    trainer = trainer_of(store, runs, settings)
    trainer._resume()
    for callback in trainer.callbacks:
        callback.on_train_start(trainer)
    engine, name = trainer.engine, "adapters.users.table.weight"
    kinds = ("master", "exp_avg")
    found, batches = [], trainer.data.batches()
    before = {kind: gathered(engine, kind)[name] for kind in kinds}
    for _ in range(steps):
        batch, _ = next(batches)
        trainer._train_step(batch)
        rows = {kind: gathered(engine, kind)[name] for kind in kinds}
        changed = {kind: (rows[kind] != before[kind]).any(1).nonzero().flatten().tolist() for kind in kinds}
        found.append((sorted(set(gather_ids(batch.users).tolist())), changed))
        before = rows
    trainer.data.close()
    trainer.log.close()
    return found


def dispersed(seed, count, width):
    """Return the dispersion of this rank's share of random rows, and the gradient of the row's source,
    averaged over the ranks as ZeRO does."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    ids = torch.randint(-1, 4, (count,), generator=generator)
    weight = torch.randn(width, width, generator=generator).requires_grad_()
    ranks = Distributed.from_environment()
    own = slice(ranks.rank * count // ranks.world, (ranks.rank + 1) * count // ranks.world)
    loss = dispersion(GatheredRows.apply(rows[own] @ weight), gather_ids(ids[own]))
    loss.backward()
    gradient = weight.grad
    if ranks.world > 1:
        torch.distributed.all_reduce(gradient)
    return float(loss.detach()), gradient / ranks.world


def read_users(store, cache, drop):
    """Return (id, user) of all samples of an epoch on this rank."""
    settings = {**SETTINGS, "start_from": "not read", "users__drop": drop}
    config, corpus = resolve(stage(store, cache, **settings))
    ranks = Distributed.from_environment()
    data = TrainingData(config, corpus, ranks.rank, ranks.world, torch.device("cpu"))
    found = []
    for batch, position in data.batches():
        found += zip(batch.ids.tolist(), batch.users.tolist(), strict=True)
        if position.epoch:
            break
    held_out = [
        pair
        for batch in data.validation()
        for pair in zip(batch.ids.tolist(), batch.users.tolist(), strict=True)
    ]
    data.close()
    return found, held_out
