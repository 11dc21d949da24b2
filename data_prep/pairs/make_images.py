"""From planned rows to encoded images: the order in which the sources are read, and what a worker process does.

Images that can be read alone (tars, folders, MDS, paths) are fetched by the workers, part by part. Bytes inside parquet cannot:
there the rows of all parts are taken in the order of the source, so that this process reads every row group once, a few rows at a
time, for all buckets together, and hands the bytes on.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from data_prep.dataset.schema import Bucket, Part
from data_prep.images.images import Crop, ImageError, encode_image, fit_bucket
from data_prep.sources.parquet import ParquetSource
from data_prep.sources.sample import Place, in_chunks
from data_prep.sources.source import OpenSources

CHUNK_ROWS = 16
GONE = "source: gone since the plan"
CHANGED = "source: changed since the plan"


class Task(NamedTuple):
    """One image to make."""

    part: Part
    row: int
    """Its row in the part."""
    file: int
    place: Place
    hash: int
    image: bytes | None = None
    """The file's bytes, where the worker cannot fetch them itself."""


class Made(NamedTuple):
    """What became of it: an encoded image, or the reason for none."""

    part: Part
    row: int
    image: bytes = b""
    crop: Crop | None = None
    reason: str = ""
    detail: str = ""


@dataclass
class Recipe:
    """What a worker needs to make images; sent once."""

    sources: OpenSources
    image_format: str
    quality: int


def tasks_in_order(
    parts: Sequence[Part], rows_of: Callable[[Part], list[dict[str, Any]]], file_ranks: Sequence[int], together: bool
) -> Iterator[Task]:
    """The rows of all parts as tasks: part by part, or, `together`, the parts of all buckets along the source.

    Args:
        parts: which; those of one bucket in the order of their numbers.
        rows_of: a part's planned rows (`MANIFEST`), called when the part is reached.
        file_ranks: place of each source file in the order in which the plan took them.
        together: merge the buckets. Each one's parts follow one another along the source then, by the plan's window of one part.
    """

    def tasks(of: Iterable[Part]) -> Iterator[tuple[tuple[int, int], Task]]:
        for part in of:
            rows = sorted(
                ((file_ranks[row["id"] >> 32], row["id"] & 0xFFFFFFFF), number, row) for number, row in enumerate(rows_of(part))
            )
            for position, number, row in rows:
                place = Place(row["offset"], row["length"], row["path"])
                yield position, Task(part, number, row["id"] >> 32, place, row["hash"])

    if not together:
        return (task for _, task in tasks(parts))
    by_bucket = itertools.groupby(sorted(parts), key=lambda part: part.bucket)
    return (task for _, task in heapq.merge(*[tasks(list(group)) for _, group in by_bucket]))


def chunks_of(tasks: Iterable[Task], sources: OpenSources) -> Iterator[list[Task]]:
    """Chunks of tasks of one source file, bounded in rows and bytes, with the images that workers cannot fetch."""

    for (file, alone), run in itertools.groupby(tasks, lambda task: (task.file, bool(task.place.path))):
        source, name = sources.of(file)
        if isinstance(source, ParquetSource) and not alone:
            run, places = itertools.tee(run)
            images = source.walk(name, (task.place for task in places))
            run = (task._replace(image=image) for task, image in zip(run, images, strict=False))
        yield from in_chunks(run, CHUNK_ROWS)


def make_images(recipe: Recipe, chunk: Sequence[Task]) -> list[Made]:
    """Read, decode, resize and encode the images of a chunk; all are of one source file."""
    source, name = recipe.sources.of(chunk[0].file)
    if isinstance(source, ParquetSource) and not chunk[0].place.path:
        return [_make_image(recipe, task, task.image) for task in chunk]
    made: dict[int, Made] = {}
    for number, image in source.fetch(name, [task.place for task in chunk]):
        made[number] = _make_image(recipe, chunk[number], image)
    return [made[number] for number in range(len(chunk))]


def _make_image(recipe: Recipe, task: Task, data: bytes | None) -> Made:
    if data is None:
        return Made(task.part, task.row, reason=GONE)
    if xxhash.xxh3_64_intdigest(data) != task.hash:
        return Made(task.part, task.row, reason=CHANGED)
    try:
        image, crop = fit_bucket(data, Bucket.parse(task.part.bucket))
    except ImageError as error:
        return Made(task.part, task.row, reason=error.reason, detail=error.detail)
    return Made(task.part, task.row, encode_image(image, recipe.image_format, recipe.quality), crop)
