"""WebDataset tars, also img2dataset's, with captions in `.json`: consecutive members with one key are a row.

Nothing is ever extracted: names are only keys, and images are read by their offset.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from data_prep.config import SourceConfig
from data_prep.images.images import MAX_FILE_BYTES, TOO_LARGE
from data_prep.sources.files import SourceFiles
from data_prep.sources.sample import CUT_SHORT, NO_IMAGE, UNREADABLE, Place, Sample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "avif", "bmp")
MAX_FIELD_BYTES = 16 << 20
LINK = "source: link or device in a tar"
UNSAFE = "source: unsafe name in a tar"
TWICE = "source: key twice in a tar"
BAD_JSON = "source: damaged JSON"
END_OF_TAR = bytes(512)


class WebDatasetSource:
    """Tars, local or in a bucket."""

    def __init__(self, source: SourceConfig) -> None:
        self._files = SourceFiles(source.path, (".tar",))

    def files(self) -> list[str]:
        """Return the names of the tars."""
        return self._files.names()

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield all samples; the unreadable rest of a damaged or cut tar is one row with that reason."""
        with self._files.open(name) as file:
            yield from read_tar(file)

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Yield images by ranged reads."""
        yield from self._files.fetch(
            places, lambda place: self._files.read_range(name, place.offset, place.length)
        )


def read_tar(file: BinaryIO) -> Iterator[Sample]:
    """Yield the samples of one tar, in order."""
    try:
        # `r:` refuses compressed tars, in which images have no offsets.
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield Sample("", reason=UNREADABLE, detail=str(error)[:200])
        return

    seen: set[str] = set()
    group = _Group("")
    problem = ""
    while True:
        try:
            member = tar.next()
            if member is None:
                problem = _end_problem(file, tar.offset)
                break
            vars(tar)["members"].clear()  # otherwise tarfile keeps every header in memory
            if member.isdir():
                continue

            key, suffix = _split_name(member.name)
            # A repeated suffix starts another sample, which `finish` reports as a key that comes twice.
            if key != group.key or suffix in group.suffixes:
                yield from group.finish(seen)
                group = _Group(key)
            group.add(member, suffix, file)
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
            problem = str(error)[:200] or type(error).__name__
            break

    # The samples before a fault are good; the rest of the tar becomes one row.
    yield from group.finish(seen)
    if problem:
        yield Sample("", reason=CUT_SHORT, detail=problem)


class _Group:
    """The members of one sample, collected one by one."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.suffixes: set[str] = set()
        self._sample = Sample(key)
        self._texts: dict[str, bytes] = {}

    def add(self, member: tarfile.TarInfo, suffix: str, file: BinaryIO) -> None:
        """Add one member."""
        self.suffixes.add(suffix)
        if member.name.startswith("/") or ".." in member.name.split("/"):
            self._sample.reason, self._sample.detail = UNSAFE, member.name[:200]
        elif not member.isreg() or member.issparse():  # a sparse member's bytes are not contiguous
            self._sample.reason, self._sample.detail = LINK, member.name[:200]
        elif suffix in IMAGE_SUFFIXES:
            # Checked before reading, because a header can announce any size.
            if member.size > MAX_FILE_BYTES:
                self._sample.reason, self._sample.detail = TOO_LARGE, f"{member.size} bytes"
                return

            self._sample.image = _content(file, member)
            self._sample.place = Place(member.offset_data, member.size)
        elif suffix in ("json", "txt", "caption") and member.size <= MAX_FIELD_BYTES:
            self._texts["txt" if suffix == "caption" else suffix] = _content(file, member)

    def finish(self, seen: set[str]) -> Iterator[Sample]:
        """Yield the sample, if there was a member.

        Args:
            seen: keys of earlier samples of the tar; this sample's key is added.
        """
        if not self.suffixes:
            return

        sample = self._sample
        if self.key in seen:
            sample.reason = sample.reason or TWICE
        seen.add(self.key)

        try:
            sample.record = parse_fields(self._texts.get("json"), self._texts.get("txt"))
        except ValueError as error:
            sample.reason, sample.detail = sample.reason or BAD_JSON, str(error)[:200]
        if sample.image is None:
            sample.reason = sample.reason or NO_IMAGE
        yield sample


def parse_fields(document: bytes | None, text: bytes | None) -> dict[str, Any]:
    """Return the fields of a sample from its `.json` and `.txt`.

    The text is field `txt`, and also field `caption` if the JSON has none.

    Raises:
        ValueError: if the JSON is not an object.
    """
    record: dict[str, Any] = {}
    if document is not None:
        try:
            record = json.loads(document)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(record, dict):
            raise ValueError("not an object")

    if text is not None:
        # Invalid UTF-8 becomes surrogates, which `clean_caption` refuses.
        record["txt"] = text.decode("utf-8", "surrogateescape")
        record.setdefault("caption", record["txt"])
    return record


def _split_name(name: str) -> tuple[str, str]:
    """Split a name into key and suffix by WebDataset's rule: at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise EOFError(f"cut inside {member.name!r}"[:200])
    return data


def _end_problem(file: BinaryIO, offset: int) -> str:
    """Describe what is wrong with the end of a tar; empty if it ends with zero blocks, as it should.

    tarfile itself accepts any end of the file, and even a damaged header, as the end of the tar.
    """
    file.seek(offset)
    complete = file.read(len(END_OF_TAR)) == END_OF_TAR
    return "" if complete else f"no end-of-archive mark at byte {offset}"
