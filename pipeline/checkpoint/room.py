"""A look at the free space of a run's disk before training, in bytes of the checkpoints that it will keep."""

import shutil
from typing import TYPE_CHECKING

from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.checkpoint.manifest import read_manifest
from pipeline.engine.master_weights import RankState
from pipeline.runtime.console import log_line

if TYPE_CHECKING:  # sampling reads checkpoints without DeepSpeed
    from pipeline.engine.engine import Engine


def warn_of_little_room(checkpoints: Checkpoints, engine: "Engine", done: int, total: int) -> None:
    """Log one line on rank 0 if the disk has no room for the checkpoints of the rest of the run. Collective.

    It is no error: old checkpoints may be removed meanwhile, and a save that fails costs one checkpoint only.

    Args:
        checkpoints: those of the run.
        engine: the engine whose state they store.
        done: samples of the run so far.
        total: samples of the whole run.
    """
    size = checkpoint_bytes(engine.state(), checkpoints.world)
    if checkpoints.rank:
        return

    # The folder itself comes with the first checkpoint.
    free = shutil.disk_usage(checkpoints.folder.parent).free
    count = checkpoints_to_come(checkpoints, done, total)
    if count * size > free:
        log_line(
            f"{checkpoints.folder}: {free / 1e9:.3g} GB are free, and {count} more checkpoints need "
            f"{count * size / 1e9:.3g} GB: make room there, or keep fewer (checkpoint.keep_last, "
            "checkpoint.keep_every_samples)"
        )


def checkpoint_bytes(state: RankState, world: int) -> int:
    """Return the bytes of the tensors in one checkpoint: fp32 masters, moments and averages of all ranks."""
    # ZeRO pads every rank's tensors to the same length.
    of_rank = [tensor for tensors in state.tensors.values() for tensor in tensors]
    bytes_of_rank = sum(tensor.numel() * tensor.element_size() for tensor in of_rank)
    replicated = sum(tensor.numel() * tensor.element_size() for tensor in state.replicated.values())
    return world * bytes_of_rank + replicated


def checkpoints_to_come(checkpoints: Checkpoints, done: int, total: int) -> int:
    """Return the number of checkpoints that the disk needs room for, beside those that it has.

    Args:
        checkpoints: those of the run.
        done: samples of the run so far.
        total: samples of the whole run.
    """
    config = checkpoints.config
    saves = -((done - total) // config.every_samples)
    forever = config.keep_every_samples
    permanent = total // forever - done // forever if forever else 0

    manifests = map(read_manifest, checkpoints.folder.glob("step_*"))
    replaced = sum(manifest is not None and not manifest["permanent"] for manifest in manifests)
    # One more than is kept: a checkpoint is removed after the next one is written.
    return max(0, min(saves, max(1, config.keep_last + 1 - replaced) + permanent))
