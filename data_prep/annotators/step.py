"""The annotation of scanned rows, in units of a source file: one pass over the images for all annotators."""

import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from PIL import Image

from data_prep.annotators.annotator import Annotator, open_annotator
from data_prep.config import DatasetConfig
from data_prep.dataset.schema import Manifest
from data_prep.engines import Do, Outcome, Step, run
from data_prep.images.images import ImageError, decode_image
from data_prep.plan.annotations import (
    annotation_folder,
    annotation_key,
    annotation_schema,
    missing_annotations,
)
from data_prep.plan.listing import source_files
from data_prep.plan.plan import check_settings
from data_prep.plan.scan_tables import exact_hashes, read_scan, scan_key
from data_prep.sources.source import OpenSources, SourceFile
from data_prep.store.store import Store
from data_prep.workers import Workers
from model.common.errors import UserError
from model.common.files import naming_full_disk
from model.common.records import canonical_json
from model.common.share import Share

SIDE = 512
"""Annotators get images whose shorter side has at least this many pixels, or the image's own; JPEG decoders
scale while they decode."""
Pixels = np.ndarray | None
"""uint8 [H, W, 3]; None if the image cannot be decoded."""


class _Kept(NamedTuple):
    """A row that the scan kept."""

    id: int
    hash: int
    captions: list[str]


def decode_images(_: None, images: Sequence[bytes]) -> list[Pixels]:
    """Decode image files; runs in a worker process."""
    return [_decode(data) for data in images]


def _decode(data: bytes) -> Pixels:
    try:
        return np.asarray(decode_image(data, at_least=(SIDE, SIDE)))
    except ImageError:
        return None


class AnnotationStep(Step):
    """The annotations of a dataset's source files; the units are the files' numbers."""

    title = "annotate"
    noun = "rows"
    gpus = 1

    def __init__(
        self, config: DatasetConfig, dataset: Store, files: Sequence[SourceFile], allow_functions: bool
    ) -> None:
        """Load nothing yet.

        Args:
            config: the dataset's settings.
            dataset: the dataset's store.
            files: all source files.
            allow_functions: True if functions that the settings name may run.
        """
        self.units = [str(file.number) for file in files]
        self.cpus = max(1, config.workers)
        self._config = config
        self._dataset = dataset
        self._files = list(files)
        self._allow_functions = allow_functions
        self._batch = min(annotator.batch for annotator in config.annotations)

    def total(self, units: Collection[str]) -> int | None:
        """None: the rows are counted as they come."""
        return None

    def missing(self) -> set[str]:
        """Return the files that are not annotated."""
        return {str(number) for number in missing_annotations(self._config, self._dataset, self._files)}

    def exists(self, unit: str) -> bool:
        """True if a file is annotated."""
        return self._dataset.exists(annotation_key(self._config, int(unit)))

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Load the models, and compare them with those of the other tasks.

        Raises:
            UserError: if a model is missing, or another one than another task has.
        """
        annotators = [open_annotator(entry, self._allow_functions) for entry in self._config.annotations]
        identity = canonical_json([annotator.identity for annotator in annotators])
        key = f"{annotation_folder(self._config)}/annotators.json"
        if not self._dataset.put_new(key, identity) and self._dataset.read(key, 1 << 20) != identity:
            raise UserError(
                f"{self._dataset.uri}/{key}: another task has other weights or packages for `annotations`: "
                "use the same everywhere, or delete that folder to begin again"
            )
        yield lambda units: self._do(annotators, units)

    def _do(self, annotators: Sequence[Annotator], units: Sequence[str]) -> Iterator[Outcome]:
        """Annotate some files; those that are not scanned yet are notes."""
        widths: dict[str, int] = {}
        for annotator in annotators:
            widths |= annotator.widths
        schema = annotation_schema(self._config, widths)
        for unit in units:
            if self._dataset.exists(scan_key(int(unit))):
                yield Outcome(Counter(annotated=self._annotate(annotators, schema, int(unit))))
            else:
                yield Outcome(notes=[unit])

    def _annotate(self, annotators: Sequence[Annotator], schema: pa.Schema, number: int) -> int:
        """Annotate the rows of one file that the scan kept, and commit their table.

        Returns:
            Number of rows.

        Raises:
            UserError: if the disk is full.
        """
        file = self._files[number]
        rows = 0
        with TemporaryDirectory(prefix="li-dit-") as folder:
            path = Path(folder) / "annotations.parquet"
            with (
                naming_full_disk(path),
                pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer,
                Workers(decode_images, None, lambda _: None, self._config.workers) as workers,
            ):
                for kept, pixels in self._decoded(file, workers):
                    writer.write_batch(_batch_of(annotators, schema, kept, pixels))
                    rows += len(kept)
            self._dataset.put_new(annotation_key(self._config, number), path.read_bytes())
        return rows

    def _decoded(
        self, file: SourceFile, workers: Workers[None, bytes, Pixels]
    ) -> Iterator[tuple[list[_Kept], list[Pixels]]]:
        """Yield batches of kept rows with their images."""
        waiting: deque[list[_Kept]] = deque()

        def batches() -> Iterator[list[bytes]]:
            rows = self._kept_rows(file)
            while chunk := list(itertools.islice(rows, self._batch)):
                waiting.append([kept for kept, _ in chunk])
                yield [image for _, image in chunk]

        for _, pixels in workers.map(batches()):
            yield waiting.popleft(), pixels

    def _kept_rows(self, file: SourceFile) -> Iterator[tuple[_Kept, bytes]]:
        """Yield the rows that the scan kept, with their image files; an image that has changed is empty."""
        source, name = OpenSources(self._config, self._files).open(file.number)
        samples = itertools.islice(source.read(name, []), self._config.sources[file.source].limit)
        for table in read_scan(
            self._dataset, scan_key(file.number), columns=["id", "reason", "hash", "captions"]
        ):
            hashes = exact_hashes(table["hash"]).tolist()
            columns = (table[name].to_pylist() for name in ("id", "reason", "captions"))
            for id, reason, captions, hash in zip(*columns, hashes, strict=True):
                sample = next(samples, None)
                if reason:
                    continue
                image = sample.image if sample is not None else None
                if not isinstance(image, bytes) or xxhash.xxh3_64_intdigest(image) != hash:
                    image = b""
                yield _Kept(id, hash, [caption["text"] for caption in captions]), image


def _batch_of(
    annotators: Sequence[Annotator], schema: pa.Schema, kept: Sequence[_Kept], pixels: Sequence[Pixels]
) -> pa.RecordBatch:
    """Return the table's rows; those without an image have no values."""
    places = [place for place, image in enumerate(pixels) if image is not None]
    images = [Image.fromarray(image) for image in pixels if image is not None]
    columns: dict[str, list[Any]] = {name: [None] * len(kept) for name in schema.names}
    columns["id"], columns["hash"] = [row.id for row in kept], [row.hash for row in kept]
    for annotator in annotators if images else ():
        found = annotator.annotate(images, [kept[place].captions for place in places])
        for name, values in found.items():
            for place, value in zip(places, values, strict=True):
                columns[name][place] = value
    return pa.RecordBatch.from_pydict(columns, schema=schema)


def run_annotations(config: DatasetConfig, dataset: Store, share: Share, allow_functions: bool) -> None:
    """Annotate a share's source files; running it again does only what is missing.

    Raises:
        UserError: if the settings have no annotations, a model is missing, functions are not allowed, or
            files of the share are not scanned yet (all others are annotated before).
    """
    check_settings(config, dataset)
    if not config.annotations:
        raise UserError("annotations is empty: name at least one annotator in the dataset's YAML")
    if dataset.exists(Manifest.KEY):
        print("annotate: the plan is complete, so annotations change nothing any more")
        return

    files = source_files(dataset)
    step = AnnotationStep(config, dataset, files, allow_functions)
    left = run(step, share).notes
    if left:
        raise UserError(
            f"{dataset.uri}: {len(left)} of {len(share.owns(step.units))} source files of this task are not "
            "scanned yet: finish `python -m data_prep plan`, then run this again"
        )
    print("annotate: the source files of this task are annotated: run `plan` again")
