"""A small snapshot that mosaicml-streaming reads."""

from pipeline.data.streaming import SnapshotLoader
from tests.helpers.loader_process import streaming_line

BUCKETS = {"64x64": [9, 8], "48x80": [7, 6]}
EPOCH = 7
"""Batches of 4 in an epoch of these."""


def loader(dataset, workers=0, context="fork", collate=list, **options):
    context = context if workers else None
    return SnapshotLoader(
        dataset, num_workers=workers, collate_fn=collate, multiprocessing_context=context, **options
    )


def read(dataset, workers=0, **options):
    """The next epoch, or what is left of one."""
    return [streaming_line(rows) for rows in loader(dataset, workers, **options)]


def place(state):
    return state["epoch"], state["batch"]
