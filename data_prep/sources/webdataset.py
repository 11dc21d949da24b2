"""WebDataset tars, also img2dataset's, with captions in `.json`: consecutive members with one key are a row.

A key ends at the first dot of a member's name, and the rest is its suffix. Of a suffix with several parts,
such as `input.png`, the last part says what the member is. Nothing is ever extracted: names are only keys,
and images are read by their offset.
"""

import functools
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from data_prep.clips.large_file import MAX_VIDEO_BYTES, LargeFile, Media
from data_prep.config import SourceConfig
from data_prep.images.images import MAX_FILE_BYTES
from data_prep.images.images import TOO_LARGE as IMAGE_TOO_LARGE
from data_prep.sources.files import SourceFiles, raise_unless_content
from data_prep.sources.media import open_large
from data_prep.sources.sample import (
    CUT_SHORT,
    IMAGE_SUFFIXES,
    MAX_FIELD_BYTES,
    NO_IMAGE,
    UNREADABLE,
    VIDEO_SUFFIXES,
    Inventory,
    Place,
    RefusedError,
    Sample,
    media_suffixes,
)

LINK = "source: link or device in a tar"
UNSAFE = "source: unsafe name in a tar"
TWICE = "source: key twice in a tar"
APART = "source: members of one key are apart in a tar"
SEVERAL = "source: several images with one key in a tar"
BAD_JSON = "source: damaged JSON"
TEXT_SUFFIXES = ("json", "txt", "caption")
END_OF_TAR = bytes(512)
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2"}
"""First bytes of compressed files, whatever their name."""
MAX_HEADER_BYTES = 1 << 20
"""Bytes of a member's extended header: long names, and PAX's fields."""
FAULTS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, LookupError)
"""Exceptions of tarfile for the headers of a damaged or hostile tar."""
MAX_TEXTS = 100
"""Texts of one key that are read."""


class WebDatasetSource:
    """Tars, local or in a bucket."""

    def __init__(self, source: SourceConfig, videos: bool = False) -> None:
        self._files = SourceFiles(source.path, (".tar",))
        self._image = source.image.lower()
        self._suffixes = media_suffixes(videos)

    def inventory(self) -> Inventory:
        """Return the tars.

        Raises:
            UserError: if there are none.
        """
        return self._files.one_by_one()

    def version(self, name: str) -> str:
        """Return a text that is another one after the tar has changed."""
        return self._files.version(name)

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield all samples; the unreadable rest of a damaged or cut tar is one row with that reason."""
        try:
            with self._files.open(name) as file:
                large = functools.partial(open_large, self._files, name)
                yield from read_tar(file, self._image, self._suffixes, large)
        except RefusedError as error:
            yield Sample("", reason=error.reason, detail=error.detail)

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, Media | None]]:
        """Yield images by ranged reads, and large videos as what reads them so."""
        large, whole = [], []
        for position, place in enumerate(places):
            (large if place.length > MAX_FILE_BYTES else whole).append(position)

        for index, data in self._files.fetch_ranges(name, [places[position] for position in whole]):
            yield whole[index], data

        def open_video(place: Place) -> LargeFile:
            return open_large(self._files, name, place.offset, place.length)

        for index, video in self._files.fetch([places[position] for position in large], open_video):
            yield large[index], video


OpenRange = Callable[[int, int], LargeFile]
"""Returns a range of a tar, from its first byte and length."""


def read_tar(
    file: BinaryIO,
    image: str = "image",
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    large: OpenRange | None = None,
) -> Iterator[Sample]:
    """Yield the samples of one tar, in order.

    Args:
        file: the tar.
        image: suffix of the members that are the images, if a key has several, such as `input.png`.
        suffixes: last parts of the suffixes that images, or images and videos, have.
        large: opens videos that are too large for memory; None = they are left out.
    """
    try:
        # `r:` refuses compressed tars, in which images have no offsets.
        tar = tarfile.open(fileobj=_HeaderReader(file), mode="r:")  # noqa: SIM115
    except FAULTS as error:
        raise_unless_content(error)
        file.seek(0)
        start = file.read(max(map(len, MAGIC)))
        codec = next((MAGIC[magic] for magic in MAGIC if start.startswith(magic)), "")
        detail = f"compressed with {codec}: decompress it" if codec else str(error)[:200]
        yield Sample("", reason=UNREADABLE, detail=detail)
        return

    samples = _Samples(file, image, suffixes, large)
    problem = ""
    last = -1
    while True:
        try:
            member = tar.next()
            if member is None:
                problem = _end_problem(file, tar.offset)
                break
            # A negative size would lead back, and the tar would never end.
            if member.offset <= last or member.size < 0:
                raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes"[:200])
            last = member.offset
            vars(tar)["members"].clear()  # otherwise tarfile keeps every header in memory
            yield from samples.add(member)
        except FAULTS as error:
            raise_unless_content(error)
            problem = str(error)[:200] or type(error).__name__
            break

    # The samples before a fault are good; the rest of the tar becomes one row.
    yield from samples.finish()
    if problem:
        yield Sample("", reason=CUT_SHORT, detail=problem)


class _HeaderReader(io.RawIOBase):
    """A tar for tarfile, which reads only headers from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        # tarfile reads an extended header of any size that the tar announces.
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _Samples:
    """Joins consecutive members with one key to samples."""

    def __init__(self, file: BinaryIO, image: str, suffixes: Sequence[str], large: OpenRange | None) -> None:
        self._file = file
        self._large = large
        self._image = image
        self._suffixes = suffixes
        self._seen: set[str] = set()
        """Keys of the samples so far."""
        self._group = _Group("", self._suffixes, self._large)
        self._aside: _Group | None = None
        """Members behind the group's that are neither image nor text, with a key of their own."""

    def add(self, member: tarfile.TarInfo) -> Iterator[Sample]:
        """Add a member, and yield the samples that it completes."""
        # A folder or a hidden file, which is no data, never parts the members of a sample.
        if member.isdir() or any(part.startswith(".") and part != "." for part in _names(member.name)):
            return

        key, suffix = _split_name(member.name)
        is_part = self._is_part(suffix)
        if key == self._group.key and suffix not in self._group.suffixes:
            yield from self._finish_aside()
        elif self._aside and key == self._aside.key and suffix not in self._aside.suffixes:
            if not is_part:
                self._aside.add(member, suffix, self._file, self._image)
                return
            yield from self._finish_group()
            self._group, self._aside = self._aside, None
        elif is_part:
            # A repeated suffix starts another sample, which is then a key that comes twice.
            yield from self._finish_group()
            yield from self._finish_aside()
            self._group = _Group(key, self._suffixes, self._large)
        else:
            # Perhaps a note between the members of one sample: wait for the next member.
            yield from self._finish_aside()
            self._aside = _Group(key, self._suffixes, self._large)
            self._aside.add(member, suffix, self._file, self._image)
            return
        self._group.add(member, suffix, self._file, self._image)

    def finish(self) -> Iterator[Sample]:
        """Yield the last samples."""
        yield from self._finish_group()
        yield from self._finish_aside()

    def _is_part(self, suffix: str) -> bool:
        return suffix == self._image or _kind(suffix) in (*self._suffixes, *TEXT_SUFFIXES)

    def _finish_group(self) -> Iterator[Sample]:
        yield from self._group.finish(self._seen)
        self._group = _Group("", self._suffixes, self._large)

    def _finish_aside(self) -> Iterator[Sample]:
        if self._aside:
            yield from self._aside.finish(self._seen)
        self._aside = None


class _Group:
    """The members of one sample, collected one by one."""

    def __init__(self, key: str, media: Sequence[str], large: OpenRange | None) -> None:
        self.key = key
        self._large = large
        self.suffixes: set[str] = set()
        self._media = media
        self._sample = Sample(key)
        self._texts: dict[str, bytes] = {}
        """By suffix."""
        self._rank = 0
        """Certainty that the image is the sample's: 0 = no image yet, 3 = named in the settings."""
        self._rivals: list[str] = []
        """Suffixes of images of the same rank."""

    def add(self, member: tarfile.TarInfo, suffix: str, file: BinaryIO, image: str) -> None:
        """Add one member.

        Args:
            member: its header.
            suffix: its suffix.
            file: the tar.
            image: suffix of the image, if there are several.
        """
        self.suffixes.add(suffix)
        if member.name.startswith("/") or ".." in member.name.split("/"):
            self._sample.reason, self._sample.detail = UNSAFE, member.name[:200]
        elif not member.isreg() or member.issparse():  # a sparse member's bytes are not contiguous
            self._sample.reason, self._sample.detail = LINK, member.name[:200]
        elif suffix == image or _kind(suffix) in self._media:
            self._add_image(member, 3 if suffix == image else 2 if "." not in suffix else 1, file)
        # The number of texts bounds the memory of a key with thousands of members.
        elif (
            _kind(suffix) in TEXT_SUFFIXES and member.size <= MAX_FIELD_BYTES and len(self._texts) < MAX_TEXTS
        ):
            self._texts[suffix] = _content(file, member)

    def _add_image(self, member: tarfile.TarInfo, rank: int, file: BinaryIO) -> None:
        if rank < self._rank:
            return
        # Of several plain suffixes, such as `jpg` and `png`, the last one counts.
        self._rivals = [*self._rivals, member.name] if rank == self._rank == 1 else []
        self._rank = rank
        if self._rivals:
            return

        # Checked before reading, because a header can announce any size.

        is_large = member.size > MAX_FILE_BYTES
        reads = self._large if _kind(member.name.lower()) in VIDEO_SUFFIXES else None
        if is_large and (reads is None or member.size > MAX_VIDEO_BYTES):
            self._sample.reason, self._sample.detail = IMAGE_TOO_LARGE, f"{member.size} bytes"
            return
        if is_large and reads is not None:
            _check_end(file, member)
            self._sample.image = reads(member.offset_data, member.size)
        else:
            self._sample.image = _content(file, member)
        self._sample.place = Place(member.offset_data, member.size)

    def finish(self, seen: set[str]) -> Iterator[Sample]:
        """Yield the sample, if there was a member.

        Args:
            seen: keys of earlier samples of the tar; this sample's key is added.
        """
        if not self.suffixes:
            return

        sample = self._sample
        if self.key in seen and not sample.reason:
            sample.reason = TWICE if sample.image is not None else APART
            sample.detail = "sort the tar by name, and give each sample one key"
        seen.add(self.key)

        try:
            sample.record = self._fields()
        except ValueError as error:
            if not sample.reason:
                sample.reason, sample.detail = BAD_JSON, str(error)[:200]
        found = ", ".join(sorted(self.suffixes)[:8])
        if sample.image is None and not sample.reason:
            sample.reason, sample.detail = NO_IMAGE, f"members: {found}"[:200]
        if self._rivals and not sample.reason:
            sample.reason = SEVERAL
            sample.detail = f"{found}: name one in `sources.image`, or write dots only before suffixes"[:200]
        yield sample

        # Each of them may be the image of a sample whose name has a dot: none is lost without being counted.
        for name in self._rivals:
            yield Sample(name, reason=sample.reason, detail=sample.detail)

    def _fields(self) -> dict[str, Any]:
        """Return the fields of the sample's texts.

        Raises:
            ValueError: if a JSON is damaged.
        """
        document = self._only("json")
        # Of `txt` and `caption`, the last one counts.
        plain = [data for suffix, data in self._texts.items() if suffix in ("txt", "caption")]
        text = plain[-1] if plain else self._only("txt", "caption")
        record = parse_fields(document, text)
        for suffix, data in self._texts.items():
            if "." in suffix and _kind(suffix) != "json":
                record.setdefault(suffix, decode_text(data))
        return record

    def _only(self, *kinds: str) -> bytes | None:
        """Return the text of a kind: the one whose suffix is the kind alone, or else the only one."""
        texts = {suffix: data for suffix, data in self._texts.items() if _kind(suffix) in kinds}
        plain = next((texts[kind] for kind in kinds if kind in texts), None)
        return next(iter(texts.values())) if plain is None and len(texts) == 1 else plain


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
        record["txt"] = decode_text(text)
        record.setdefault("caption", record["txt"])
    return record


def decode_text(data: bytes) -> str:
    """Return the text of a file, without a mark of its encoding at the start."""
    # Invalid UTF-8 becomes surrogates, which `clean_caption` refuses.
    return data.decode("utf-8-sig", "surrogateescape")


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name != ".."]


def _split_name(name: str) -> tuple[str, str]:
    """Split a name into key and suffix by WebDataset's rule: at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _kind(suffix: str) -> str:
    """Return the last part of a suffix, which says what a member is."""
    return suffix.rpartition(".")[2]


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise EOFError(f"cut inside {member.name!r}"[:200])
    return data


def _check_end(file: BinaryIO, member: tarfile.TarInfo) -> None:
    """Check that a tar has a member's last byte.

    Raises:
        EOFError: if not.
    """
    file.seek(member.offset_data + member.size - 1)
    if not file.read(1):
        raise EOFError(f"cut inside {member.name!r}"[:200])


def _end_problem(file: BinaryIO, offset: int) -> str:
    """Describe what is wrong with the end of a tar; empty if it ends with zero blocks, as it should.

    tarfile itself accepts any end of the file, and even a damaged header, as the end of the tar.
    """
    file.seek(offset)
    complete = file.read(len(END_OF_TAR)) == END_OF_TAR
    return "" if complete else f"no end-of-archive mark at byte {offset}"
