"""The weights that a stage starts from."""

from pathlib import Path
from typing import Any

from model.adapter import adapter_names, is_adapter
from model.config import DiTConfig
from pipeline.checkpoint.base import open_base, save_base
from pipeline.checkpoint.checkpoints import Checkpoints, load_weights
from pipeline.engine.engine import Engine
from pipeline.engine.network import starting_weights
from pipeline.runtime.distributed import all_reduce_min
from pipeline.stage.config import StageConfig
from pipeline.stage.forgotten import add_forgotten, forgotten_at_start


def start_network(stage: StageConfig, sizes: DiTConfig, engine: Engine) -> None:
    """Start the network from the weights of another stage. Collective.

    With `freeze: base` the run gets a copy of the weights that stay as they are; adapters that the other
    stage has too go on from there, and users that were deleted there stay so.

    Raises:
        UserError: if there are no weights, or they do not fit.
    """
    weights = load_weights(stage.start_from, stage.start_weights)
    if stage.freeze == "none":
        engine.load_full(starting_weights(stage, sizes, weights), engine.module.new_branches)
        return

    engine.load_full(weights, list(adapter_names(engine.module)))
    if engine.rank == 0:
        names = [name for name in weights if not is_adapter(name)]
        save_base(stage.run, weights, names)
        if stage.users.count:
            add_forgotten(stage.run, forgotten_at_start(stage.start_from))
    all_reduce_min(1)  # no rank trains before the copy is complete


def resume_network(checkpoints: Checkpoints, engine: Engine, path: Path) -> dict[str, Any]:
    """Restore the network from a checkpoint, and frozen weights from the run's copy; return the trainer's
    state. Collective.

    Raises:
        UserError: if one of them does not fit the stage, or the copy is damaged.
    """
    record = checkpoints.load(engine, path)
    if not engine.keeps_frozen:
        engine.load_base(open_base(engine.stage.run, check=engine.rank == 0))
    return record
