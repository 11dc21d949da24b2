"""Tasks of the checkpoints' tests; each function runs on every rank."""

import resource
import signal
import time
from pathlib import Path

import torch

from model.common.errors import UserError
from model.layers import ZeroLinear
from pipeline.checkpoint.checkpoints import Checkpoints, load_weights
from pipeline.stage.config import CheckpointConfig
from tests.helpers.engine_tasks import full_weights, gathered, make_engine, same, tiny_dit, train
from tests.helpers.small_network import GLOBAL_BATCH, Network, stage


def everything(engine):
    """Return every kind of tensor that a checkpoint contains, whole, on rank 0."""
    state = engine.state()
    whole = {("replicated", name): value for name, value in state.replicated.items()}
    for kind in state.tensors:
        whole |= {(kind, name): value for name, value in gathered(engine, kind).items()}
    return whole | {"step": torch.tensor(state.optimizer_step)} if engine.rank == 0 else {}


def train_and_save(folder, settings):
    """Save after 3 steps; return the whole state, trained and averaged weights, and the next loss."""
    engine = make_engine(**settings)
    checkpoints = Checkpoints(Path(folder), CheckpointConfig())
    for step in range(3):
        train(engine, step)
    state = everything(engine)
    checkpoints.save(engine, {"position": [1, 2]}, 3 * GLOBAL_BATCH, 3, wait=False)
    weights = full_weights(engine, "master"), full_weights(engine, "ema_1")
    loss = train(engine, 3)[0]  # while the save is being written
    checkpoints.close()
    return state, weights, loss


def resume(folder, settings):
    """Return the trainer's state, the whole state, the next loss, and the settings of the groups."""
    engine = make_engine(seed=99, **settings)
    checkpoints = Checkpoints(Path(folder), CheckpointConfig())
    newest = checkpoints.newest()
    trainer = checkpoints.load(engine, newest)
    state = everything(engine)
    groups = [{key: value for key, value in group.items() if key != "lr"} for group in engine.state().groups]
    return trainer, state, train(engine, 3)[0], groups


def load_other_network(folder):
    """Return the error message for a checkpoint of another network."""
    engine = make_engine(network=tiny_dit)
    try:
        Checkpoints(Path(folder), CheckpointConfig()).load(engine, next(Path(folder).glob("step_*")))
    except UserError as error:
        return str(error)
    return ""


def start_next_stage(folder):
    """Start a stage with another LLM from a stage; return the new parameters, and the error without them."""
    first = make_engine(seed=1, network=tiny_dit)
    Checkpoints(Path(folder) / "checkpoints", CheckpointConfig()).save(first, {}, 0, 0, wait=True)
    weights_before = full_weights(first, "master")
    engine = make_engine(seed=2, network=three_llms)
    fresh = full_weights(engine, "master")
    weights = load_weights(folder, "ema")
    try:
        engine.load_full(weights)
        refused = ""
    except UserError as error:
        refused = str(error)
    new = engine.load_full(weights, new_branches=["fusion"])
    loaded, average = full_weights(engine, "master"), full_weights(engine, "ema_0")
    if engine.rank == 0:
        assert same({name: loaded[name] for name in weights_before}, weights_before)
        assert same({name: loaded[name] for name in new}, {name: fresh[name] for name in new})
        assert set(loaded) == set(weights_before) | set(new)
        assert same(average, loaded)
    return new, refused


class WithToyBranch(Network):
    """The small network and a module that starts as the identity."""

    def __init__(self):
        super().__init__()
        self.toy = ZeroLinear(5, 5)

    def forward(self, latents, timesteps, texts):
        return super().forward(latents, timesteps, texts) + self.toy(latents)


def start_with_a_toy_branch():
    """Start a network with a new branch from the small one; return new parameters and both next losses."""
    first = make_engine(seed=1)
    train(first, 0)
    weights = full_weights(first, "master")
    engine = make_engine(seed=2, network=WithToyBranch)
    new = engine.load_full(weights, ["toy"])
    return new, train(engine, 1)[0], train(first, 1)[0]


def three_llms():
    return tiny_dit(llms=3)


def fill_the_disk(folder):
    """Save with a full disk on one rank: training goes on, the last save raises."""
    engine = make_engine()
    checkpoints = Checkpoints(Path(folder), CheckpointConfig())
    checkpoints.save(engine, {}, GLOBAL_BATCH, 1, wait=True)
    good = sorted(path.name for path in Path(folder).iterdir())
    if engine.rank == 1:  # like on a full disk, writing beyond the limit raises OSError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(engine, {}, 2 * GLOBAL_BATCH, 2, wait=False)
        train(engine, 1)
        checkpoints.wait()
        failures = checkpoints.failures
        left = sorted(path.name for path in Path(folder).iterdir())
        try:
            checkpoints.save(engine, {}, 3 * GLOBAL_BATCH, 3, wait=True)
            message = ""
        except UserError as error:
            message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    newest = checkpoints.newest()
    checkpoints.save(engine, {}, 4 * GLOBAL_BATCH, 4, wait=True)
    return good, left, failures, message, newest, checkpoints.newest()


def crashing_run(folder, steps, every):
    """Train, save every few steps, resume; return the losses, the sum of the final weights, and the start."""
    config = stage(precision="bf16")
    engine = make_engine(config=config)
    checkpoints = Checkpoints(Path(folder), CheckpointConfig(keep_last=2))
    newest = checkpoints.newest()
    losses = checkpoints.load(engine, newest)["losses"] if newest is not None else []
    while len(losses) < steps:
        checkpoints.poll()
        losses.append(train(engine, len(losses))[0])
        if len(losses) % every == 0:
            checkpoints.save(engine, {"losses": losses}, GLOBAL_BATCH * len(losses), len(losses), wait=False)
        time.sleep(0.01)
    checkpoints.close()
    total = sum(float(value.double().sum()) for value in full_weights(engine, "ema_0").values())
    return losses, total, newest.name if newest is not None else ""
