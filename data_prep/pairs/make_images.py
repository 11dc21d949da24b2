"""Turn planned rows into encoded images and clips: the order in which the sources are read, and the work of a
worker process.

Images with random access (tars, folders, MDS, paths) are fetched by the workers, part by part. Bytes inside
parquet have none, so there the rows of all parts are read in the order of the source: this process reads
every row group once, a few rows at a time, for all buckets together, and sends the bytes to the workers.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from data_prep.clips.clips import FittedClip, fit_clip
from data_prep.clips.large_file import Media, media_hash
from data_prep.clips.media import encode_clip
from data_prep.config import ClipsConfig
from data_prep.dataset.schema import Bucket, Part
from data_prep.images.images import TOO_LARGE, Crop, ImageError, encode_image, fit_bucket
from data_prep.sources.parquet import ParquetSource
from data_prep.sources.sample import Place, in_chunks
from data_prep.sources.source import OpenSources, Source

CHUNK_ROWS = 16
GONE = "source: gone since the plan"
CHANGED = "source: changed since the plan"


class ImageTask(NamedTuple):
    """One image to encode."""

    part: Part
    row: int
    """Its row in the part."""
    file: int
    """Number of its source file."""
    place: Place
    hash: int
    """Hash of the source's bytes when the plan was made."""
    image: Media | None = None
    """The source's bytes, if the worker cannot fetch them itself."""


class EncodedImage(NamedTuple):
    """The result of a task: an encoded image or clip, or the reason why there is none."""

    part: Part
    row: int
    image: bytes = b""
    crop: Crop | None = None
    reason: str = ""
    detail: str = ""
    columns: dict[str, Any] | None = None
    """Columns that only clips have (`CLIP_COLUMNS`)."""


@dataclass
class EncodingContext:
    """Everything that a worker needs besides its tasks; sent once."""

    sources: OpenSources
    image_format: str
    quality: int
    clips: ClipsConfig | None = None
    seed: int = 0


def order_tasks(
    parts: Sequence[Part],
    read_rows: Callable[[Part], list[dict[str, Any]]],
    file_ranks: Sequence[int],
    along_source: bool,
) -> Iterator[ImageTask]:
    """Return the tasks of all parts: part by part, or in the order of the source.

    Args:
        parts: the parts; those of one bucket ordered by number.
        read_rows: returns a part's planned rows (`MANIFEST`); called when the part is reached.
        file_ranks: rank of each source file in the order in which the plan used them.
        along_source: merge the parts of all buckets in the order of the source. This needs a plan whose
            shuffle window is one part: only then do the parts of a bucket follow each other along the source.
    """
    groups = [list(parts)]
    if along_source:
        by_bucket = itertools.groupby(sorted(parts), key=lambda part: part.bucket)
        groups = [list(group) for _, group in by_bucket]

    # A single group passes through as it is. Of several, one part each is in memory.
    for _, task in heapq.merge(*[_positioned_tasks(group, read_rows, file_ranks) for group in groups]):
        yield task


def _positioned_tasks(
    parts: Iterable[Part], read_rows: Callable[[Part], list[dict[str, Any]]], file_ranks: Sequence[int]
) -> Iterator[tuple[tuple[int, int], ImageTask]]:
    """Return the tasks of some parts, each with its position (rank of the file, row in the file) in the
    sources."""
    for part in parts:
        tasks = []
        for number, row in enumerate(read_rows(part)):
            file, row_in_file = divmod(row["id"], 1 << 32)
            place = Place(row["offset"], row["length"], row["path"])
            task = ImageTask(part, number, file, place, row["hash"])
            tasks.append(((file_ranks[file], row_in_file), task))

        # positions are unique, so tasks are never compared
        yield from sorted(tasks)


def chunk_tasks(tasks: Iterable[ImageTask], sources: OpenSources) -> Iterator[list[ImageTask]]:
    """Return chunks of tasks of one source file, bounded in rows and bytes, with the images that workers
    cannot fetch."""
    # A worker fetches all images of a chunk from one file.
    for (file, has_path), group in itertools.groupby(tasks, lambda task: (task.file, bool(task.place.path))):
        source, name = sources.open(file)
        if _needs_walk(source, has_path):
            # one copy of the tasks is ahead by the rows that the source reads at once
            group, ahead = itertools.tee(group)
            images = source.walk(name, (task.place for task in ahead))
            group = (task._replace(image=image) for task, image in zip(group, images, strict=False))
        yield from in_chunks(group, CHUNK_ROWS)


def _needs_walk(source: Source, has_path: bool) -> TypeGuard[ParquetSource]:
    """True if the images are bytes inside parquet, which have no random access."""
    return isinstance(source, ParquetSource) and not has_path


def encode_images(context: EncodingContext, chunk: Sequence[ImageTask]) -> list[EncodedImage]:
    """Read, decode, resize and encode the images of a chunk; all are from one source file."""
    source, name = context.sources.open(chunk[0].file)
    if _needs_walk(source, bool(chunk[0].place.path)):
        return [_encode_image(context, task, task.image) for task in chunk]

    # images arrive in any order
    encoded: dict[int, EncodedImage] = {}
    for number, image in source.fetch(name, [task.place for task in chunk]):
        encoded[number] = _encode_image(context, chunk[number], image)
    return [encoded[number] for number in range(len(chunk))]


def _encode_image(context: EncodingContext, task: ImageTask, data: Media | None) -> EncodedImage:
    if data is None:
        return EncodedImage(task.part, task.row, reason=GONE)
    # The plan judged other bytes: its filters, bucket and search for duplicates say nothing about these.
    if media_hash(data) != task.hash:
        return EncodedImage(task.part, task.row, reason=CHANGED)

    bucket = Bucket.parse(task.part.bucket)
    try:
        if bucket.frames > 1:
            return _encode_clip(context, task, data, bucket)
        if not isinstance(data, bytes):
            raise ImageError(TOO_LARGE, f"{len(data)} bytes")
        image, crop = fit_bucket(data, bucket)
    except ImageError as error:
        return EncodedImage(task.part, task.row, reason=error.reason, detail=error.detail)
    return EncodedImage(task.part, task.row, encode_image(image, context.image_format, context.quality), crop)


def _encode_clip(context: EncodingContext, task: ImageTask, data: Media, bucket: Bucket) -> EncodedImage:
    """Encode the clip of a video.

    Raises:
        ImageError: if the video cannot be used.
    """
    clips = context.clips
    assert clips is not None, "a plan with clips was made with their settings"
    # The hash and not the id: a video gives the same clip wherever it is in the list of files.
    clip = fit_clip(data, bucket, clips, (context.seed, task.hash))
    encoded = encode_clip(clip.frames, clip.choice.fps, clips.format, clips.crf)
    return EncodedImage(task.part, task.row, encoded, clip.crop, columns=_clip_columns(clip))


def _clip_columns(clip: FittedClip) -> dict[str, Any]:
    return {
        "frames": len(clip.frames),
        "fps": clip.choice.fps,
        "stride": clip.choice.stride,
        "start": clip.choice.start,
        "motion": clip.motion,
        "jump": clip.jump,
    }
