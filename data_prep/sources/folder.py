"""A folder of images with `metadata.jsonl` or `metadata.csv` (column `file_name`), or a `.txt` beside each image.

Hugging Face's imagefolder convention. A "file" of this source is a folder: one with a metadata file stands for everything
below it; the others for the images directly in them. Images that no metadata row names are rows too, behind the others.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.config import SourceConfig
from data_prep.sources.files import SourceFiles
from data_prep.sources.sample import NO_IMAGE, OUTSIDE, UNREADABLE, Place, Sample
from data_prep.sources.webdataset import IMAGE_SUFFIXES, parse_fields

METADATA = ("metadata.jsonl", "metadata.csv")
UNUSABLE = "source: unusable file name"
BAD_LINE = "source: damaged metadata line"
IMAGE_ENDINGS = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)


class FolderSource:
    """Image files, local or in a bucket."""

    def __init__(self, source: SourceConfig) -> None:
        self._files = SourceFiles(source.path)

    def files(self) -> list[str]:
        """Folders that are units of their own; `.` is the root."""
        names = self._files.names()
        described = {posixpath.dirname(name) or "." for name in names if posixpath.basename(name) in METADATA}
        found = set(_outermost(described))
        for name in names:
            folder = posixpath.dirname(name) or "."
            if name.lower().endswith(IMAGE_ENDINGS) and not any(_below(folder, root) for root in found):
                found.add(folder)
        return sorted(found)

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Rows of the folder's metadata, then the images that no row named."""
        names = [path for path in self._files.names() if _below(posixpath.dirname(path) or ".", name)]
        metadata = [path for path in names if posixpath.basename(path) in METADATA]
        if not metadata:
            names = [path for path in names if (posixpath.dirname(path) or ".") == name]
        images = {path for path in names if path.lower().endswith(IMAGE_ENDINGS)}
        texts = {path for path in names if path.endswith(".txt")}
        named: set[str] = set()
        for path in metadata:
            for sample in self._metadata_rows(path):
                named.add(sample.place.path)
                yield sample
        for path in sorted(images - named):
            stem = posixpath.splitext(path)[0]
            text = self._files.read(f"{stem}.txt") if f"{stem}.txt" in texts else None
            yield self._with_image(path, parse_fields(None, text))

    def _metadata_rows(self, path: str) -> Iterator[Sample]:
        folder = posixpath.dirname(path)
        try:
            rows = _jsonl(self._files.read(path)) if path.endswith(".jsonl") else _csv(self._files.read(path))
            for number, row in enumerate(rows):
                key = f"{path}:{number}"
                if row is None:
                    yield Sample(key, reason=BAD_LINE)
                    continue
                file_name = row.get("file_name")
                if not isinstance(file_name, str) or not file_name:
                    yield Sample(key, record=row, reason=NO_IMAGE, detail="no file_name")
                    continue
                name = self._files.inside(posixpath.join(folder, file_name))
                if name is None:
                    yield Sample(key, record=row, reason=OUTSIDE, detail=file_name[:200])
                else:
                    yield self._with_image(name, row)
        except csv.Error as error:
            yield Sample(path, reason=UNREADABLE, detail=str(error)[:200])

    def _with_image(self, name: str, record: dict[str, Any]) -> Sample:
        if not self._files.usable(name):
            return Sample(name, None, record, reason=UNUSABLE)
        try:
            return Sample(name, self._files.read(name), record, Place(path=name))
        except (FileNotFoundError, IsADirectoryError):
            return Sample(name, None, record, Place(path=name), NO_IMAGE)

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Images by their path."""
        yield from self._files.fetch(places, lambda place: self._files.read(place.path))


def _jsonl(data: bytes) -> Iterator[dict[str, Any] | None]:
    for line in data.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield row if isinstance(row, dict) else None


def _csv(data: bytes) -> Iterator[dict[str, Any] | None]:
    text = io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline="")
    for row in csv.DictReader(text):
        yield {name: value for name, value in row.items() if isinstance(name, str)}


def _below(folder: str, root: str) -> bool:
    return root == "." or folder == root or folder.startswith(f"{root}/")


def _outermost(folders: set[str]) -> list[str]:
    return [folder for folder in folders if not any(folder != other and _below(folder, other) for other in folders)]
