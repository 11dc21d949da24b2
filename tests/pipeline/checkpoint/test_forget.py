"""Deletion of a user: no name and no row is left, in the store and in a run's checkpoints."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from data_prep.dataset.users import UserIndex, find_user, forget_user, read_names, write_names
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.records import seal
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.checkpoint.files import rank_file, write_tensors
from pipeline.checkpoint.forget import forget_row
from pipeline.checkpoint.manifest import FORMAT, MANIFEST, REPLICATED
from pipeline.checkpoint.weights import CheckpointWeights
from pipeline.engine.layout import Layout
from pipeline.forget_user import TABLE
from pipeline.stage.config import CheckpointConfig

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema_0")
SHAPES = {TABLE: (5, 7), "adapters.users.norm.weight": (3,)}


def write_checkpoint(folder, partition, world=2):
    """A checkpoint with random values in every tensor, as `Checkpoints` lays it out."""
    folder.mkdir(parents=True)
    numel = 38
    pieces = {"parameter": -(-35 // world) + -(-3 // world), "flat": -(-numel // world)}
    lengths = [pieces[partition]]
    layout = Layout(world, partition, [list(SHAPES.items())], lengths)
    files, generator = {}, torch.Generator().manual_seed(1)
    for rank in range(world):
        tensors = {f"{kind}.0": torch.rand(lengths[0], generator=generator) + 1 for kind in KINDS}
        files[rank_file(rank)] = asdict(write_tensors(folder / rank_file(rank), tensors))
    files[REPLICATED] = asdict(write_tensors(folder / REPLICATED, {}))
    manifest = {
        "format": FORMAT, "step": 3, "samples": 24, "permanent": False, "layout": layout.to_json(),
        "optimizer": {"step": 3, "groups": [{"name": "no_decay"}], "moments": ["exp_avg", "exp_avg_sq"]},
        "ema": [0.9], "trainer": {}, "stage_xxh64": "", "files": files,
    }  # fmt: skip
    (folder / MANIFEST).write_bytes(seal(manifest, allow_nan=True))


def whole(folder):
    found = {}
    for kind in KINDS:
        weights = CheckpointWeights(folder, "raw")
        weights._kind = kind
        found[kind] = {name: weights[name] for name in SHAPES}
    return found


@pytest.mark.parametrize("partition", ["parameter", "flat"])
@pytest.mark.parametrize("row", [0, 2, 4])
def test_a_deleted_row_is_zero_everywhere_and_nothing_else_changes(tmp_path, partition, row):
    folder = tmp_path / "checkpoints" / "step_000000003"
    write_checkpoint(folder, partition)
    before = whole(folder)
    forget_row(folder, TABLE, row)
    after = whole(folder)
    for kind in KINDS:
        expected = before[kind][TABLE].clone()
        assert expected[row].all()
        expected[row] = 0.0
        assert torch.equal(after[kind][TABLE], expected)
        other = "adapters.users.norm.weight"
        assert torch.equal(after[kind][other], before[kind][other])
    # The manifest vouches for the new files, so readers do not pass the checkpoint over.
    assert Checkpoints(folder.parent, CheckpointConfig()).newest() == folder


def test_a_row_that_is_not_there_is_named(tmp_path):
    folder = tmp_path / "checkpoints" / "step_000000003"
    write_checkpoint(folder, "flat")
    with pytest.raises(UserError, match=r"no row 5 .* 0 to 4"):
        forget_row(folder, TABLE, 5)
    with pytest.raises(UserError, match="no row 0 of other"):
        forget_row(folder, "other", 0)


def test_deletion_leaves_no_name_and_no_entry_in_the_store(tmp_path):
    dataset = open_store(str(tmp_path / "store"), create=True).sub("ds")
    write_names(dataset, ["anna", "berta", "carla"])
    UserIndex(np.arange(6), np.array([0, 1, 2, 0, 1, 2], dtype=np.int32)).write(dataset)
    assert forget_user(dataset, "berta") == 1
    assert not [
        path for path in (tmp_path / "store").rglob("*") if path.is_file() and b"berta" in path.read_bytes()
    ]
    assert read_names(dataset) == ["anna", None, "carla"]
    index = UserIndex.read(dataset)
    assert index.users_of(np.arange(6)).tolist() == [0, -1, 2, 0, -1, 2]
    assert find_user(dataset, "carla") == 2
    with pytest.raises(UserError, match="no user `berta`"):
        forget_user(dataset, "berta")
    record = json.loads((tmp_path / "store/ds/users/names.json").read_text())
    assert record["names"] == ["anna", None, "carla"]
