"""Deletion of rows of a table from checkpoints: the values become zero in weights, moments and averages."""

from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from model.common.errors import UserError
from model.common.files import atomic_path, write_atomic
from model.common.records import seal
from pipeline.checkpoint.files import rank_file, write_tensors
from pipeline.checkpoint.manifest import MANIFEST, read_manifest
from pipeline.engine.layout import Extent, Layout


def forget_row(folder: Path, name: str, row: int) -> None:
    """Set a row of the parameter `name` to zero in every tensor of a checkpoint.

    Files are replaced one by one, and the manifest last. A kill in between leaves a checkpoint that readers
    pass over as damaged; the same call again completes it.

    Raises:
        UserError: if the checkpoint has no such parameter or row.
    """
    manifest: dict[str, Any] | None = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} is no checkpoint: name one of a run's")
    layout = Layout.from_json(manifest["layout"])
    shape = layout.shapes.get(name)
    if shape is None or not 0 <= row < shape[0]:
        known = "none" if shape is None else f"0 to {shape[0] - 1}"
        raise UserError(f"{folder}: no row {row} of {name}, it has {known}: correct the number")

    size = prod(shape[1:])
    of_rank: dict[int, list[Extent]] = {}
    for extent in layout.extents(name, row * size, (row + 1) * size):
        of_rank.setdefault(extent.rank, []).append(extent)
    for rank, extents in of_rank.items():
        path = folder / rank_file(rank)
        # Copies, since the file that they are mapped from is replaced.
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        for key, tensor in tensors.items():
            for extent in extents:
                # A moment that the group does not have is an empty tensor.
                if key.rpartition(".")[2] == str(extent.group) and tensor.numel():
                    tensor[extent.offset : extent.offset + extent.length] = 0.0

        with atomic_path(path) as temporary:
            written = write_tensors(temporary, tensors)
        manifest["files"][rank_file(rank)] = {"bytes": written.bytes, "xxh64": written.xxh64}
    write_atomic(folder / MANIFEST, seal(manifest, allow_nan=True), durable=True)
