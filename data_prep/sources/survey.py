"""A survey of data whose form is unknown: its kind, its captions and its image sizes.

All file names are listed; of the content only a sample is read, of at most `MAX_ROWS` rows.
"""

import itertools
import json
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.config import DatasetConfig, SourceConfig
from data_prep.images.images import ImageError, image_size
from data_prep.sources.files import SourceFiles, raise_unless_content
from data_prep.sources.folder import IMAGE_ENDINGS, READERS
from data_prep.sources.mds import IMAGES as MDS_IMAGES
from data_prep.sources.parquet import WEB_ADDRESS
from data_prep.sources.sample import Inventory, RefusedError, Sample, printable
from data_prep.sources.source import open_source
from data_prep.sources.text_columns import TextColumns
from data_prep.sources.webdataset import SEVERAL
from model.common.errors import UserError

MAX_ROWS = 512
"""Rows of a sample."""
# Each tar or table that is opened costs megabytes over a network.
MAX_FILES = 16
MAX_LISTED = 6
"""Suffixes that a message names."""
PROBED_ROWS = 4
"""Rows that show whether a column of a table holds images."""
WORDS = {"folder": "image", "webdataset": "tar", "parquet": "parquet table", "mds": "MDS shard"}
"""Kind of source -> the files that reveal it."""
MDS = re.compile(r"\.mds(\.\w+)?$")
MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WebP", b"GIF8": "GIF", b"BM": "BMP"}
"""First bytes -> format of an image."""


@dataclass
class Survey:
    """Facts about the data at a path."""

    source: SourceConfig
    """Kind, path and image column; the captions are not chosen yet."""
    files: int
    """Files in the path's reach."""
    suffixes: Counter[str]
    units: int
    """Tars, tables, shards, or folders with images."""
    sampled_units: int = 0
    rows: int = 0
    """Rows that were read."""
    complete: bool = True
    """True if that is all of them."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows whose image cannot be used, by reason."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Height and width of each usable image that was read."""
    formats: Counter[str] = field(default_factory=Counter)
    texts: TextColumns = field(default_factory=TextColumns)

    @property
    def unit(self) -> str:
        """Name of one of the units."""
        return "folder" if self.source.kind == "folder" else WORDS[self.source.kind]

    def add(self, sample: Sample) -> None:
        """Add one row."""
        self.rows += 1
        reason = sample.reason
        if not reason and isinstance(sample.image, bytes):
            try:
                self.sizes.append(image_size(sample.image))
                self.formats[_format(sample.image)] += 1
            except ImageError as error:
                reason = error.reason
        if reason:
            self.reasons[reason] += 1
        else:
            self.texts.add(sample.record)


def survey(path: str, image: str = "") -> Survey:
    """Look at what is stored at a path.

    Args:
        path: a folder, a glob, a tar or a table, local or `s3://`.
        image: column or suffix of the images; empty = look for it.

    Raises:
        UserError: if the path does not exist, or has no images, or several kinds of sources.
    """
    if "://" not in path:
        # The dataset's YAML may be used in another working directory.
        path = str(Path(path).expanduser().absolute())
    files = SourceFiles(path, (".tar", ".parquet"))
    names, inventory = files.inventory()
    suffixes = Inventory()
    suffixes.ignore(names)

    source = SourceConfig(kind="folder", path=path, image=image or SourceConfig().image)
    kinds = _kinds(names)
    if {*kinds} == {"folder", "parquet"} and _names_images(files, source, kinds["parquet"][0]):
        del kinds["folder"]
    if not kinds:
        hidden = f", and {sum(inventory.ignored.values()):,} that cannot be read" if inventory.ignored else ""
        raise UserError(
            f"{path}: nothing to make a dataset of (there are: {listed(suffixes.ignored) or 'no files'}"
            f"{hidden}): give a folder of images with captions, or of WebDataset tars, parquet or MDS"
        )
    if len(kinds) > 1:
        found = " and ".join(count(len(found), WORDS[kind]) for kind, found in kinds.items())
        raise UserError(
            f"{path}: several kinds of sources, {found}: give one of them, as a folder or as a glob such as "
            f"{path.rstrip('/')}/*.tar, and add the other to `sources` of the YAML"
        )

    ((kind, found),) = kinds.items()
    source = replace(source, kind=kind)
    if not image and kind in ("parquet", "mds"):
        look = _parquet_image if kind == "parquet" else _mds_image
        source = replace(source, image=look(files, source, found[0]))
    return _read_sample(files, source, inventory.found, suffixes.ignored, found[0])


def count(number: int, thing: str) -> str:
    """Return a number of things in words."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def listed(counts: Counter[str]) -> str:
    """Return counts as text, the largest first."""
    most = counts.most_common(MAX_LISTED)
    more = sum(counts.values()) - sum(count for _, count in most)
    named = [f"{count:,} {name}" for name, count in most]
    return ", ".join([*named, f"{more:,} others"] if more else named)


def _kinds(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the kinds of sources that the names of files show, with the files that show them."""
    found: dict[str, list[str]] = {kind: [] for kind in WORDS}
    described: list[str] = []
    for name in names:
        lower = name.lower()
        if posixpath.basename(name) in READERS:
            described.append(name)
        elif lower.endswith(IMAGE_ENDINGS):
            found["folder"].append(name)
        elif lower.endswith(".tar"):
            found["webdataset"].append(name)
        elif lower.endswith(".parquet"):
            found["parquet"].append(name)
        elif MDS.search(lower):
            found["mds"].append(name)

    # img2dataset writes a table of what it downloaded next to each tar.
    tars = {posixpath.splitext(name)[0] for name in found["webdataset"]}
    found["parquet"] = [name for name in found["parquet"] if posixpath.splitext(name)[0] not in tars]
    # A metadata file describes images; without any, it is a table like others.
    if not any(found.values()):
        found["parquet"] = [name for name in described if name.endswith(".parquet")]
    return {kind: names for kind, names in found.items() if names}


def _read_sample(
    files: SourceFiles, source: SourceConfig, found: int, suffixes: Counter[str], first: str
) -> Survey:
    """Read a sample of the source's rows.

    Args:
        files: the files in the source's path.
        source: its settings.
        found: number of files.
        suffixes: files by suffix.
        first: one of the source's files.
    """
    columns = _columns(files, source, first)
    opened = open_source(DatasetConfig(), source)
    names = opened.inventory().names
    result = Survey(source, found, suffixes, units=len(names))

    # Evenly over the units, since neighbors are alike.
    most = min(len(names), MAX_ROWS if source.kind == "folder" else MAX_FILES)
    chosen = [names[number * len(names) // most] for number in range(most)]
    result.complete = most == len(names)
    several = ""
    for place, name in enumerate(chosen):
        rows = opened.read(name, columns)
        # What short units leave is for the units after them.
        for sample in itertools.islice(rows, (MAX_ROWS - result.rows) // (most - place)):
            result.add(sample)
            if sample.reason == SEVERAL:
                several = sample.detail.partition(":")[0]
        result.complete &= next(rows, None) is None
        result.sampled_units += 1

    if several and not result.sizes:
        raise UserError(
            f"{source.path}: each row has several images ({printable(several)}): choose one with --image"
        )
    if not result.sizes:
        raise UserError(
            f"{source.path}: none of the {result.rows:,} rows that were read has a usable image "
            f"({listed(result.reasons)}): see `sources` in data_prep/datasets/example.yaml for what is read"
        )
    return result


def _columns(files: SourceFiles, source: SourceConfig, first: str) -> list[str]:
    """Return the columns that may hold captions; a folder and a tar give all of theirs."""
    if source.kind == "parquet":
        schema = _schema(files, source, first)
        return [name for name, kind in zip(schema.names, schema.types, strict=True) if _has_text(kind)]
    if source.kind == "mds":
        return [name for name, encoding in _encodings(files, first).items() if encoding in ("str", "json")]
    return []


def _has_text(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_has_text(kind.field(number).type) for number in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _has_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)


def _schema(files: SourceFiles, source: SourceConfig, name: str) -> pa.Schema:
    """Return the columns of a table.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with files.open(name) as file:
            return pq.ParquetFile(file, pre_buffer=False).schema_arrow
    except (pa.ArrowException, OSError, ValueError, RefusedError) as error:
        raise_unless_content(error)
        raise UserError(
            f"{source.path}: {printable(name)[:200]} is no parquet file: remove it, or write it again"
        ) from error


def _parquet_image(files: SourceFiles, source: SourceConfig, first: str) -> str:
    """Return the column of a table that holds images, as bytes or as paths.

    Raises:
        UserError: if there is none.
    """
    schema = _schema(files, source, first)
    texts, binaries = [], []
    for name, kind in zip(schema.names, schema.types, strict=True):
        holds_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if holds_bytes or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            binaries.append(name)
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            texts.append(name)

    # Bytes first: a column of paths next to them says where they came from. Of several, `image` is first.
    for column in [*_image_first(binaries), *_image_first(_path_columns(source, first, texts))]:
        if _holds_images(replace(source, kind="parquet", image=column), first):
            return column
    raise UserError(
        f"{source.path}: {printable(first)[:200]} has no column of images (its columns are "
        f"{', '.join(map(printable, schema.names[:20]))}): store them as bytes, or as paths below the table; "
        "URLs have to be downloaded first, for example by img2dataset"
    )


def _names_images(files: SourceFiles, source: SourceConfig, table: str) -> bool:
    """True if the images of a folder are those that a table names by their paths."""
    schema = _schema(files, source, table)
    texts = [name for name, kind in zip(schema.names, schema.types, strict=True) if pa.types.is_string(kind)]
    columns = _path_columns(source, table, texts)
    return any(_holds_images(replace(source, kind="parquet", image=column), table) for column in columns)


def _path_columns(source: SourceConfig, table: str, texts: Sequence[str]) -> list[str]:
    """Return the columns whose first rows are paths of images."""
    # No column has that name, so that the rows come as they are, without images.
    opened = open_source(DatasetConfig(), replace(source, kind="parquet", image="\0"))
    records = [sample.record for sample in itertools.islice(opened.read(table, texts), PROBED_ROWS)]
    columns = []
    for name in texts:
        values = [str(record.get(name, "")).lower() for record in records]
        if any(value.endswith(IMAGE_ENDINGS) and not WEB_ADDRESS.match(value) for value in values):
            columns.append(name)
    return columns


def _holds_images(source: SourceConfig, table: str) -> bool:
    """True if the first rows of a table have an image in the source's image column."""
    for sample in itertools.islice(open_source(DatasetConfig(), source).read(table, []), PROBED_ROWS):
        try:
            if isinstance(sample.image, bytes) and image_size(sample.image):
                return True
        except ImageError:
            continue
    return False


def _image_first(columns: Sequence[str]) -> list[str]:
    """Return columns in the order in which they are likely to hold the images."""
    likely = ("image", "img", "jpg", "jpeg", "png", "picture", "bytes")

    def rank(name: str) -> int:
        lower = name.lower()
        exact = likely.index(lower) if lower in likely else len(likely)
        return exact if exact < len(likely) or not any(word in lower for word in likely) else exact - 1

    return sorted(columns, key=rank)


def _encodings(files: SourceFiles, shard: str) -> dict[str, str]:
    """Return the columns of an MDS shard, from the index in its folder."""
    index = posixpath.join(posixpath.dirname(shard), "index.json")
    try:
        shards: list[dict[str, Any]] = json.loads(files.read(index))["shards"]
        return dict(zip(shards[0]["column_names"], shards[0]["column_encodings"], strict=True))
    # The source itself explains what is wrong with the index.
    except (ValueError, LookupError, TypeError, FileNotFoundError, RefusedError):
        return {}


def _mds_image(files: SourceFiles, source: SourceConfig, first: str) -> str:
    """Return the column of MDS shards that holds images."""
    columns = [name for name, encoding in _encodings(files, first).items() if encoding in MDS_IMAGES]
    return next(iter(_image_first(columns)), source.image)


def _format(image: bytes) -> str:
    """Return the format of an image by its first bytes."""
    return next((name for magic, name in MAGIC.items() if image.startswith(magic)), "other")
