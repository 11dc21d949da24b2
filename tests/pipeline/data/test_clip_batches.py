"""Batches of clips and of images from one snapshot."""

from dataclasses import replace

import torch

from data_prep.dataset.schema import MEAN_ALONE
from pipeline.data.dataset import latent_shape
from pipeline.data.streaming import SnapshotLoader, StreamingSnapshot
from pipeline.stage.objective import ObjectiveConfig
from tests.helpers import fake_snapshot as fake
from tests.pipeline.data.test_dataset import first_batches

BUCKETS = {"32x32": [12, 9], "32x32x9": [10, 8]}


def test_buckets_have_the_latents_of_their_frames(tmp_path):
    assert latent_shape(fake.CLIPS, "32x48") == (2, 1, 4, 6)
    assert latent_shape(fake.CLIPS, "32x48x9") == (2, 3, 4, 6)
    assert latent_shape(fake.LATENTS, "32x48") == (2, 4, 6)

    fake.make(tmp_path / "store", BUCKETS, tmp_path, families=[fake.CLIPS, *fake.TEXTS.values()])
    # a budget of 64 positions: 4 images of 16, or a clip of 48
    stage = fake.stage(tmp_path / "store", tmp_path, global_batch=4, tokens_per_batch=64)
    shapes = {}
    for batch in first_batches(stage, 12):
        shapes[batch.bucket] = tuple(batch.mean.shape)
        for row, id in enumerate(batch.ids.tolist()):
            stored = fake.latents_row(id, batch.bucket)["mean"]
            assert batch.mean[row].contiguous().view(torch.uint8).numpy().tobytes() == stored
    assert shapes == {"32x32": (4, 2, 1, 4, 4), "32x32x9": (1, 2, 3, 4, 4)}


def test_streaming_reads_clips_and_images_from_the_cache(tmp_path):
    fake.make(tmp_path / "store", BUCKETS, tmp_path, families=[fake.CLIPS, *fake.TEXTS.values()])
    dataset = StreamingSnapshot(fake.stage(tmp_path / "store", tmp_path / "cache", global_batch=4))
    seen = set()
    for rows in SnapshotLoader(dataset, num_workers=0, collate_fn=list):
        (bucket,) = {sorted(BUCKETS)[row["id"] >> 32] for row in rows}
        for row in rows:
            assert row["latents/mean"] == fake.latents_row(row["id"], bucket)["mean"]
        seen.add(bucket)
    assert seen == set(BUCKETS)


def test_a_family_of_means_is_read_without_noise(tmp_path):
    means = replace(fake.CLIPS, identity={**fake.CLIPS.identity, "moments": MEAN_ALONE})
    fake.make(tmp_path / "store", BUCKETS, tmp_path, families=[means, *fake.TEXTS.values()])
    for batch in first_batches(fake.stage(tmp_path / "store", tmp_path, global_batch=4), 4):
        assert not batch.std.any()
        stored = fake.latents_row(int(batch.ids[0]), batch.bucket)["mean"]
        assert batch.mean[0].contiguous().view(torch.uint8).numpy().tobytes() == stored


def test_the_shift_follows_the_positions():
    config = ObjectiveConfig(shift=3.0, shift_positions=256)
    assert config.at_size(256).shift == 3.0
    assert config.at_size(1024).shift == 6.0
    assert ObjectiveConfig(shift=3.0).at_size(1024).shift == 3.0
