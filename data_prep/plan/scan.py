"""Scanning one source file: every row's size, hash, captions and place, or the reason why it is left out.

The result is a table, committed per source file, that holds all the plan needs; images are decoded no further than their
header (and, for near duplicates, a scaled thumbnail).
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import xxhash

from data_prep.config import DatasetConfig
from data_prep.images.buckets import assign, make_buckets
from data_prep.images.images import ImageError, decode_image, image_size
from data_prep.plan.captions import gather_captions
from data_prep.plan.dedupe import HASH_SIDE, perceptual_hash
from data_prep.plan.filters import Filters, Row
from data_prep.sources.sample import Sample, in_chunks, printable
from data_prep.sources.source import Source, SourceFile
from data_prep.workers import Workers

CHUNK_ROWS = 32
CRASHED = "image: crashed the decoder"
MAX_TEXT = 512
"""Characters kept of a foreign key or detail."""

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
"""A row a source row. `reason` is empty for rows that stay; `refused` has a reason for every caption left out; `height` and
`width` are the upright original's; the last three are the image's `Place`."""


@dataclass(frozen=True)
class Look:
    """What a worker finds out about an image."""

    height: int = 0
    width: int = 0
    hash: int = 0
    phash: int | None = None
    reason: str = ""
    detail: str = ""


def look_at(near: bool, images: Sequence[bytes | None]) -> list[Look]:
    """Size, hash and, for near duplicates, perceptual hash of each image."""
    return [Look() if image is None else _look(image, near) for image in images]


def _look(image: bytes, near: bool) -> Look:
    try:
        height, width = image_size(image)
        phash = None
        if near:
            scale = max(1.0, HASH_SIDE / min(height, width))
            small = decode_image(image, at_least=(min(height, int(HASH_SIDE * scale)), min(width, int(HASH_SIDE * scale))))
            phash = perceptual_hash(small)
        return Look(height, width, xxhash.xxh3_64_intdigest(image), phash)
    except ImageError as error:
        return Look(hash=xxhash.xxh3_64_intdigest(image), reason=error.reason, detail=error.detail)


class Scanner:
    """Scans source files with the dataset's filters and buckets."""

    def __init__(self, config: DatasetConfig) -> None:
        self._config = config
        self._filters = Filters(config.filters)
        self._buckets = make_buckets(config.buckets)
        self._kinds = {kind: number for number, kind in enumerate(config.caption_kinds)}
        self._workers = Workers(look_at, config.dedupe.near is not None, lambda _: Look(reason=CRASHED), config.workers)

    def __enter__(self) -> "Scanner":
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.__exit__(*error)

    def scan(self, source: Source, file: SourceFile) -> Iterator[pa.RecordBatch]:
        """Batches of the file's scan table, in the order of rows."""
        settings = self._config.sources[file.source]
        columns = [*settings.captions.values(), *self._filters.columns]
        samples = itertools.islice(source.read(file.name, columns), settings.limit)
        waiting: deque[list[Sample]] = deque()

        def images() -> Iterator[list[bytes | None]]:
            for chunk in in_chunks(samples, CHUNK_ROWS):
                waiting.append([replace(sample, image=None) for sample in chunk])
                yield [None if sample.reason else sample.image for sample in chunk]

        row = 0
        for _, looks in self._workers.map(images()):
            chunk = waiting.popleft()
            yield self._batch(file, row, chunk, looks, settings.captions)
            row += len(chunk)

    def _batch(
        self, file: SourceFile, start: int, samples: list[Sample], looks: list[Look], fields: dict[str, str]
    ) -> pa.RecordBatch:
        rows = []
        for sample, look in zip(samples, looks, strict=True):
            captions, refused = gather_captions(sample.record, fields)
            reason = sample.reason or look.reason or ("" if captions else refused[0])
            # a row that its source cannot offer has no captions to judge
            rows.append(Row(sample.record, captions, look.height, look.width, reason, [] if sample.reason else refused))
        self._filters.apply(rows)
        records = [
            self._record(file, start + number, sample, look, row)
            for number, (sample, look, row) in enumerate(zip(samples, looks, rows, strict=True))
        ]
        return pa.RecordBatch.from_pylist(records, SCAN)

    def _record(self, file: SourceFile, number: int, sample: Sample, look: Look, row: Row) -> dict[str, Any]:
        bucket = ""
        if not row.reason:
            settings = self._config.buckets
            found = assign(self._buckets, look.height, look.width, settings.max_upscale, settings.max_crop)
            if isinstance(found, str):
                row.reason = found
            else:
                bucket = found.name
        return {
            "id": file.number << 32 | number,
            "key": printable(sample.key)[:MAX_TEXT],
            "reason": row.reason,
            "detail": printable(sample.detail or look.detail)[:MAX_TEXT],
            "captions": [{"kind": self._kinds[caption.kind], "text": caption.text} for caption in row.captions],
            "refused": row.refused,
            "height": look.height,
            "width": look.width,
            "hash": look.hash,
            "phash": look.phash,
            "bucket": bucket,
            "offset": sample.place.offset,
            "length": sample.place.length,
            "path": sample.place.path,
        }
