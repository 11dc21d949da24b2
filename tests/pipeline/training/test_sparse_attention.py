"""Block-sparse attention in training: it runs under ZeRO-3, and small buckets are refused at the start."""

import pytest

from model.attention_config import AttentionConfig
from tests.helpers import fake_snapshot, trainer_tasks
from tests.helpers.distributed import on_ranks

SPARSE = {
    "model__attention": AttentionConfig("block_sparse", keep=0.2),
    "model__patch": 1,
    "global_batch": 4,
    "log__validate_every_samples": 0,
    "data__validation_parts": 0,
    "samples": 4 * 2,
}


def test_it_trains(tmp_path):
    fake_snapshot.make(tmp_path / "store", {"256x256": [8]}, tmp_path)
    settings = {**SPARSE, "model__checkpoint_every": 1}
    ((code, reports),) = on_ranks(
        1, trainer_tasks.train, str(tmp_path / "store"), str(tmp_path), None, settings
    )
    assert code == 0
    assert len(reports) == 2


def test_buckets_of_few_patches_are_refused_at_the_start(tmp_path):
    fake_snapshot.make(tmp_path / "store", {"32x32": [8]}, tmp_path)
    with pytest.raises(AssertionError, match="4 x 4 are 16 patches, and below 1,024 dense attention costs"):
        on_ranks(1, trainer_tasks.train, str(tmp_path / "store"), str(tmp_path), None, SPARSE)
