"""A folder of images, with `metadata.jsonl` or `metadata.csv` (column `file_name`) or a `.txt` per image.

This is Hugging Face's imagefolder convention. A "file" of this source is a folder. A folder with a metadata
file includes everything below it, any other only the images directly in it. Images that no metadata row names
are rows too, after the others.
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
        """Return the folders that are units of their own; `.` is the root."""
        names = self._files.names()
        with_metadata = {_folder_of(name) for name in names if posixpath.basename(name) in METADATA}
        # Metadata below another metadata file belongs to the outer folder, so that no image is listed twice.
        folders = set(_outermost(with_metadata))
        for name in names:
            folder = _folder_of(name)
            if name.lower().endswith(IMAGE_ENDINGS) and not any(_is_below(folder, root) for root in folders):
                folders.add(folder)
        return sorted(folders)

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield the rows of the folder's metadata, then the images that no row named."""
        paths = [path for path in self._files.names() if _is_below(_folder_of(path), name)]
        metadata = [path for path in paths if posixpath.basename(path) in METADATA]
        if not metadata:
            paths = [path for path in paths if _folder_of(path) == name]
        images = {path for path in paths if path.lower().endswith(IMAGE_ENDINGS)}
        texts = {path for path in paths if path.endswith(".txt")}

        named: set[str] = set()
        for path in metadata:
            for sample in self._metadata_rows(path):
                named.add(sample.place.path)
                yield sample

        # After all metadata, since any row of it may name an image.
        for path in sorted(images - named):
            text_path = f"{posixpath.splitext(path)[0]}.txt"
            text = self._files.read(text_path) if text_path in texts else None
            yield self._with_image(path, parse_fields(None, text))

    def _metadata_rows(self, path: str) -> Iterator[Sample]:
        folder = posixpath.dirname(path)
        try:
            read_rows = _jsonl if path.endswith(".jsonl") else _csv
            rows = read_rows(self._files.read(path))
            for number, row in enumerate(rows):
                key = f"{path}:{number}"
                if row is None:
                    yield Sample(key, reason=BAD_LINE)
                    continue
                file_name = row.get("file_name")
                if not isinstance(file_name, str) or not file_name:
                    yield Sample(key, record=row, reason=NO_IMAGE, detail="no file_name")
                    continue

                name = self._files.resolve(posixpath.join(folder, file_name))
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
        # Any other error is a fault of the disk or the network, which must stop the scan and not cost rows.
        except (FileNotFoundError, IsADirectoryError):
            return Sample(name, None, record, Place(path=name), NO_IMAGE)

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Yield images by their path."""
        yield from self._files.fetch(places, lambda place: self._files.read(place.path))


def _jsonl(data: bytes) -> Iterator[dict[str, Any] | None]:
    """Yield a row per line; None for a line that is not a JSON object."""
    for line in data.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield row if isinstance(row, dict) else None


def _csv(data: bytes) -> Iterator[dict[str, Any] | None]:
    # Invalid UTF-8 becomes surrogates, which `clean_caption` refuses.
    text = io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline="")
    for row in csv.DictReader(text):
        # Cells beyond the header's columns have the key None.
        yield {name: value for name, value in row.items() if isinstance(name, str)}


def _folder_of(path: str) -> str:
    return posixpath.dirname(path) or "."


def _is_below(folder: str, root: str) -> bool:
    return root == "." or folder == root or folder.startswith(f"{root}/")


def _outermost(folders: set[str]) -> list[str]:
    """Return the folders that are not below another one."""
    outermost = []
    for folder in folders:
        if not any(folder != other and _is_below(folder, other) for other in folders):
            outermost.append(folder)
    return outermost
