"""Sources of image-caption pairs: a source has files, a file has rows, a row has an image and fields.

A sample's id is `file_number << 32 | row`: the file's number in the dataset's sorted list, and the row's
number in the file.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from data_prep.clips.large_file import Media
from data_prep.config import DatasetConfig, SourceConfig
from data_prep.images.buckets import make_buckets
from data_prep.sources.files import READERS
from data_prep.sources.folder import FolderSource
from data_prep.sources.mds import MDSSource
from data_prep.sources.moving_scenes import MovingScenesSource
from data_prep.sources.openmoji import OpenMojiSource
from data_prep.sources.parquet import ParquetSource
from data_prep.sources.sample import Inventory, Place, Sample
from data_prep.sources.scenes import ScenesSource
from data_prep.sources.webdataset import WebDatasetSource
from model.common.errors import UserError


class Source(Protocol):
    """One entry of `sources` in a dataset's YAML."""

    def inventory(self) -> Inventory:
        """Return the files of the source: those with rows, by name, and those that it ignores.

        Raises:
            UserError: if there are none.
        """
        ...

    def version(self, name: str) -> str:
        """Return a text that is another one after a file has changed; empty if nothing shows that."""
        ...

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield all rows of a file in order; bad content never raises, but gives a row with a reason.

        Args:
            name: one of the inventory's.
            columns: fields that the caller reads; others may be missing.

        Raises:
            FileNotFoundError: if the file no longer exists.
        """
        ...

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, Media | None]]:
        """Yield the images at `places` as (position in `places`, bytes), in any order.

        The bytes are None if the image no longer exists.
        """
        ...


@runtime_checkable
class Divisible(Source, Protocol):
    """A source whose files can be read in pieces of rows."""

    def cuts(self, name: str, rows: int) -> list[int]:
        """Return the row behind each piece of about `rows` rows, ascending, so the last is the file's number
        of rows; empty if the file is one piece.

        Raises:
            FileNotFoundError: if the file no longer exists.
        """
        ...

    def fingerprint(self, name: str) -> str:
        """Return a text that is another one if `cuts` may be others."""
        ...

    def read_rows(self, name: str, columns: Sequence[str], start: int, end: int | None) -> Iterator[Sample]:
        """Yield rows `start` to `end` (None = all that come) of what `read` yields."""
        ...


def open_source(config: DatasetConfig, source: SourceConfig) -> Source:
    """Open the source that the settings describe.

    Raises:
        UserError: if its path does not exist.
    """
    if source.kind == "openmoji":
        return OpenMojiSource(config.buckets.resolution)
    if source.kind == "moving_scenes":
        assert source.scenes is not None, "the settings were checked"
        assert config.clips is not None, "the settings were checked"
        clips = [bucket for bucket in make_buckets(config.buckets, config.clip_frames) if bucket.frames > 1]
        return MovingScenesSource(source.scenes, clips, config.clips.fps)
    if source.scenes is not None:
        return ScenesSource(source.scenes, make_buckets(config.buckets))
    kinds = {
        "webdataset": WebDatasetSource,
        "parquet": ParquetSource,
        "folder": FolderSource,
        "mds": MDSSource,
    }
    return kinds[source.kind](source, videos=config.clips is not None)


def needs_sequential_reads(config: DatasetConfig) -> bool:
    """True if some images can only be read together with all data before them (bytes in parquet).

    Parts then hold neighboring rows, and are made for all buckets together.
    """
    # By kind alone: only reading the files would show whether they contain paths instead.
    return any(source.kind == "parquet" for source in config.sources)


def may_be_cut(source: SourceConfig) -> bool:
    """True if a source may be `Divisible`, without opening it."""
    return source.kind in ("parquet", "folder")


@dataclass(frozen=True)
class SourceFile:
    """One file of the dataset's frozen list."""

    number: int
    source: int
    """Index of the source in the dataset's YAML."""
    name: str
    version: str = ""
    """Its size and time of change (or ETag) when it was listed. Lists of earlier versions have none."""

    @property
    def label(self) -> str:
        """Name of the file in reports and tables."""
        return f"{self.source}:{self.name}"


@dataclass
class OpenSources:
    """The dataset's sources, opened on first use; cheap to send to a worker process."""

    config: DatasetConfig
    files: list[SourceFile]
    _opened: dict[int, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens its own files and connections.
        return {"config": self.config, "files": self.files, "_opened": {}}

    def open(self, number: int) -> tuple[Source, str]:
        """Return the opened source and the name of file `number`."""
        file = self.files[number]
        if file.source >= len(self.config.sources):
            count = len(self.config.sources)
            raise UserError(f"source file {file.label}: there are {count} sources: scan them again")
        # Opened when the first file is needed: a task's share may be in few of the sources.
        if file.source not in self._opened:
            self._opened[file.source] = open_source(self.config, self.config.sources[file.source])
        return self._opened[file.source], file.name

    def changed(self, numbers: Iterable[int]) -> list[str]:
        """Return the labels of the files among `numbers` that have changed since they were listed."""
        files = [self.files[number] for number in sorted(numbers) if self.files[number].version]
        # Opened before the threads start, which would open a source several times.
        sources = [self.open(file.number)[0] for file in files]

        with ThreadPoolExecutor(READERS) as pool:
            versions = pool.map(lambda source, file: source.version(file.name), sources, files)
            now = dict(zip(files, versions, strict=True))

        # A file that no longer exists is counted elsewhere, by its rows.
        return [file.label for file in files if now[file] not in ("", file.version)]


def list_files(config: DatasetConfig) -> tuple[list[SourceFile], list[Inventory]]:
    """List all source files, numbered in the order of the YAML's sources and sorted within each source.

    Returns:
        The files, and the inventory of each source.

    Raises:
        UserError: if a source has no files.
    """
    files: list[SourceFile] = []
    inventories: list[Inventory] = []
    # The numbers are part of every sample's id, so the order must be the same on every machine.
    for number, settings in enumerate(config.sources):
        source = open_source(config, settings)
        inventory = source.inventory()
        inventory.check(settings.path)
        inventories.append(inventory)

        with ThreadPoolExecutor(READERS) as pool:
            versions = pool.map(source.version, inventory.names)
            for name, version in zip(inventory.names, versions, strict=True):
                files.append(SourceFile(len(files), number, name, version))
    return files, inventories
