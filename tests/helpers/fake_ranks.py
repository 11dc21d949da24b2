"""Batches that simulated worlds of ranks read."""

import itertools

import torch

from pipeline.data.loader import TrainingData
from pipeline.stage.corpus import resolve

CPU = torch.device("cpu")


def open_data(stage, rank=0, world=1, device=CPU):
    """The stage's data, resolved as a trainer does it once."""
    return TrainingData(*resolve(stage), rank, world, device)


def summary(batch):
    """All that a step depends on."""
    texts = {
        name: (tuple(packed.counts), packed.values.tolist(), packed.scales.tolist())
        for name, packed in batch.texts.items()
    }
    tensors = (
        batch.sources,
        batch.passes,
        batch.mean,
        batch.std,
        batch.posterior_noise,
        batch.noise,
        batch.u,
    )
    return (
        batch.bucket,
        batch.epoch,
        batch.index,
        batch.ids.tolist(),
        [tensor.float().tolist() for tensor in tensors],
        texts,
    )


def read(stage, count, position=None, rank=0, world=1):
    data = open_data(stage, rank, world)
    taken = list(itertools.islice(data.batches(position), count))
    data.close()
    return [summary(batch) for batch, _ in taken], [after for _, after in taken]


def joined(ranks):
    """Batches of all ranks of a world -> global batches: (bucket, epoch, index, samples)."""
    steps = []
    for step in zip(*ranks, strict=True):
        assert len({piece[:3] for piece in step}) == 1, "all ranks have the same bucket"
        steps.append(
            (
                *step[0][:3],
                [id for piece in step for id in piece[3]],
                [row for piece in step for row in zip(*piece[4], strict=True)],
            )
        )
    return steps


def world_of(stage, world, count, position=None):
    return joined([read(stage, count, position, rank, world)[0] for rank in range(world)])
