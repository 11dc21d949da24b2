"""Scan one source file: every row's size, hash, captions and place, or the reason why it is left out.

The result is a table, committed per source file, with everything that the plan needs. Of an image only the
header is decoded (and, for near duplicates, a scaled thumbnail).
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from data_prep.clips.clips import is_clip, probe_clip
from data_prep.clips.large_file import Media, media_hash
from data_prep.config import ClipsConfig, DatasetConfig
from data_prep.dataset.schema import Bucket
from data_prep.images.buckets import TOO_SHORT, assign, make_buckets, with_frames
from data_prep.images.images import TOO_LARGE, ImageError, decode_image, image_size
from data_prep.plan.captions import gather_captions
from data_prep.plan.dedupe import HASH_SIDE, clip_hash, perceptual_hash
from data_prep.plan.filters import Filters, Row, split_filters
from data_prep.sources.sample import NO_IMAGE, Sample, in_chunks, printable
from data_prep.sources.source import Divisible, Source, SourceFile
from data_prep.workers import Workers

CHUNK_ROWS = 32
CRASHED = "image: crashed the decoder"
MAX_TEXT = 512
"""Characters stored of a foreign key or detail."""

CAPTIONS = pa.list_(pa.struct([("kind", pa.uint8()), ("text", pa.string())]))
SCAN = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("captions", CAPTIONS),
        ("refused", pa.list_(pa.string())),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("hash", pa.uint64()),
        ("phash", pa.uint64()),
        ("bucket", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("path", pa.string()),
    ]
)
"""Columns of a scan table, with one row per source row.

`reason` is empty for rows that are kept; `refused` has a reason for every dropped caption; `height` and
`width` are those of the upright original; the last three columns are the image's `Place`.
"""


EVALUATION = pa.schema([(name, SCAN.field(name).type) for name in ("id", "reason", "hash", "phash")])
"""Columns of the table of an evaluation set's file, with one row per source row.

The hashes are null if there are none; `reason` then says why.
"""


@dataclass(frozen=True)
class ImageFacts:
    """Result of a worker for one image or video."""

    height: int = 0
    width: int = 0
    hash: int = 0
    phash: int | None = None
    reason: str = ""
    detail: str = ""
    frames: int = 1
    """Frames of the longest clip of a video; 1 for an image."""
    fps: float = 0.0
    """Rate of that clip; 0 for an image."""

    @property
    def columns(self) -> dict[str, Any]:
        """Columns of a video for filters, besides its size."""
        return {"frames": self.frames, "fps": self.fps} if self.fps else {}


@dataclass(frozen=True)
class Inspection:
    """Everything that a worker needs besides the images; sent once."""

    near: bool
    """True if near duplicates are looked for."""
    clips: ClipsConfig | None
    """Settings of clips; None = animations are images, and videos are not read."""
    seed: int


def inspect_images(inspection: Inspection, images: Sequence[Media | None]) -> list[ImageFacts]:
    """Return size, hash and, if wanted, perceptual hash of each image or video."""
    # A row without an image keeps its place in the chunk, so that results match the samples.
    return [ImageFacts() if image is None else _inspect(image, inspection) for image in images]


def _inspect(image: Media, inspection: Inspection) -> ImageFacts:
    # Before decoding, so that a damaged image has a hash as well.
    hash = media_hash(image)
    try:
        if inspection.clips is not None and is_clip(image):
            return _inspect_clip(image, hash, inspection.clips, inspection)
        if not isinstance(image, bytes):
            raise ImageError(TOO_LARGE, f"{len(image)} bytes")
        height, width = image_size(image)
        phash = None
        if inspection.near:
            # JPEG decoders scale while decoding, so a small image is much cheaper than the full one.
            scale = max(1.0, HASH_SIDE / min(height, width))
            side = int(HASH_SIDE * scale)
            phash = perceptual_hash(decode_image(image, at_least=(min(height, side), min(width, side))))
        return ImageFacts(height, width, hash, phash)
    except ImageError as error:
        return ImageFacts(hash=hash, reason=error.reason, detail=error.detail)


def _inspect_clip(data: Media, hash: int, clips: ClipsConfig, inspection: Inspection) -> ImageFacts:
    """Return the facts of a video.

    Raises:
        ImageError: if it cannot be used.
    """
    side = HASH_SIDE if inspection.near else 0
    facts = probe_clip(data, clips, (inspection.seed, hash), side)
    phash = clip_hash(facts.ends) if facts.ends else None
    return ImageFacts(facts.height, facts.width, hash, phash, frames=facts.frames, fps=facts.fps)


class Scanner:
    """Scanner of source files, with the dataset's filters and buckets, over worker processes."""

    def __init__(self, config: DatasetConfig) -> None:
        self._config = config
        self._filters = Filters(split_filters(config)[0])
        self._buckets = make_buckets(config.buckets)
        self._kinds = {kind: number for number, kind in enumerate(config.caption_kinds)}
        inspection = Inspection(config.dedupe.near is not None, config.clips, config.seed)
        self._workers = Workers(
            inspect_images, inspection, lambda _: ImageFacts(reason=CRASHED), config.workers
        )

    def __enter__(self) -> "Scanner":
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.__exit__(*error)

    def scan(
        self, source: Source, file: SourceFile, span: tuple[int, int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield the file's scan table in batches, in the order of rows.

        Args:
            source: the file's source.
            file: the file.
            span: first row, and row behind the last; None = all rows.
        """
        settings = self._config.sources[file.source]
        columns = [*settings.captions.values(), *self._filters.columns]
        samples = _samples(source, file.name, columns, span, settings.limit)
        row = span[0] if span else 0
        for chunk, facts in self._inspected(samples, lambda sample: None if sample.reason else sample.image):
            yield self._batch(file, row, chunk, facts, settings.captions)
            row += len(chunk)

    def hash_images(
        self, source: Source, file: SourceFile, limit: int | None, span: tuple[int, int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield the table (`EVALUATION`) of a file of an evaluation set in batches, in the order of rows.

        Args:
            source: the evaluation set.
            file: its file.
            limit: number of rows to read; None = all.
            span: first row, and row behind the last; None = all rows.
        """
        samples = _samples(source, file.name, [], span, limit)
        row = span[0] if span else 0
        # An image counts whatever is wrong with its record: a pair may have it with another one.
        for chunk, facts in self._inspected(samples, lambda sample: sample.image):
            records = []
            for number, (sample, image) in enumerate(zip(chunk, facts, strict=True), row):
                records.append(
                    {
                        "id": file.number << 32 | number,
                        "reason": image.reason or ("" if image.hash else sample.reason or NO_IMAGE),
                        "hash": image.hash or None,
                        "phash": image.phash,
                    }
                )
            yield pa.RecordBatch.from_pylist(records, EVALUATION)
            row += len(chunk)

    def _inspected(
        self, samples: Iterator[Sample], image_of: Callable[[Sample], Media | None]
    ) -> Iterator[tuple[list[Sample], list[ImageFacts]]]:
        """Yield chunks of samples, without their images, and what the workers found."""
        waiting: deque[list[Sample]] = deque()

        def images() -> Iterator[list[Media | None]]:
            for chunk in in_chunks(samples, CHUNK_ROWS):
                # The workers get the bytes; what waits for their results is only the rest of a sample.
                waiting.append([replace(sample, image=None) for sample in chunk])
                yield [image_of(sample) for sample in chunk]

        # Results come in the order of the chunks, so the oldest waiting chunk is theirs.
        for _, facts in self._workers.map(images()):
            yield waiting.popleft(), facts

    def _batch(
        self,
        file: SourceFile,
        start: int,
        samples: list[Sample],
        facts: list[ImageFacts],
        fields: dict[str, str],
    ) -> pa.RecordBatch:
        """Judge samples `start`, `start` + 1, ... of a file, and return their rows of the scan table."""
        rows = []
        for sample, image in zip(samples, facts, strict=True):
            captions, refused = gather_captions(sample.record, fields)
            # The first fault counts: the source's, the image's, then that of the first refused caption.
            reason = sample.reason or image.reason or ("" if captions else refused[0])
            if sample.reason:
                refused = []  # captions of a row that its source cannot deliver are not judged
            record = {**sample.record, **image.columns}
            rows.append(Row(record, captions, image.height, image.width, reason, refused))
        self._filters.apply(rows)

        records = []
        for number, (sample, image, row) in enumerate(zip(samples, facts, rows, strict=True), start):
            records.append(self._record(file, number, sample, image, row))
        return pa.RecordBatch.from_pylist(records, SCAN)

    def _record(
        self, file: SourceFile, number: int, sample: Sample, image: ImageFacts, row: Row
    ) -> dict[str, Any]:
        bucket = ""
        # The bucket is last: a row that a filter dropped keeps the filter's reason.
        if not row.reason:
            settings = self._config.buckets
            assigned = assign(
                self._buckets, image.height, image.width, settings.max_upscale, settings.max_crop
            )
            if image.fps and isinstance(assigned, Bucket):
                assigned = with_frames(assigned, self._config.clip_frames, image.frames)
            if isinstance(assigned, str):
                row.reason = assigned
            else:
                bucket = assigned.name

        captions = [{"kind": self._kinds[caption.kind], "text": caption.text} for caption in row.captions]
        return {
            "id": file.number << 32 | number,
            "key": printable(sample.key)[:MAX_TEXT],
            "reason": row.reason,
            "detail": printable(sample.detail or image.detail or _length(row, image))[:MAX_TEXT],
            "captions": captions,
            "refused": row.refused,
            "height": image.height,
            "width": image.width,
            "hash": image.hash,
            "phash": image.phash,
            "bucket": bucket,
            "offset": sample.place.offset,
            "length": sample.place.length,
            "path": sample.place.path,
        }


def _samples(
    source: Source, name: str, columns: Sequence[str], span: tuple[int, int] | None, limit: int | None
) -> Iterator[Sample]:
    """Return some or all rows of a file."""
    if span is None:
        return itertools.islice(source.read(name, columns), limit)
    assert isinstance(source, Divisible), "only files of such sources are cut"
    return source.read_rows(name, columns, *span)


def _length(row: Row, image: ImageFacts) -> str:
    """Return the length of a video that is left out for it, as the detail of its row."""
    return f"{image.frames} frames at {image.fps:.3g} per second" if row.reason == TOO_SHORT else ""
