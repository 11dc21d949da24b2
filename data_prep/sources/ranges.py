"""Images inside a file of a bucket that are near each other, and so are read together."""

from collections.abc import Iterator, Sequence

from data_prep.sources.sample import Place

MAX_GAP = 1 << 20
"""Bytes between two images that are read for nothing rather than with another request: 20 ms at 50 MB/s."""
MAX_JOINED = 32 << 20
"""Bytes of one request for several images."""


def near_runs(places: Sequence[Place]) -> Iterator[list[int]]:
    """Yield the indexes of places that are read together."""
    run: list[int] = []
    for index in sorted(range(len(places)), key=lambda index: places[index]):
        if run:
            whole = span_of(places, [*run, index])
            before = span_of(places, run)
            gap = places[index].offset - before.offset - before.length
            if gap > MAX_GAP or whole.length > MAX_JOINED:
                yield run
                run = []
        run.append(index)
    if run:
        yield run


def span_of(places: Sequence[Place], run: Sequence[int]) -> Place:
    """Return the range from the first to the last byte of some places, the first of which begins first."""
    start = places[run[0]].offset
    return Place(start, max(places[index].offset + places[index].length for index in run) - start)
