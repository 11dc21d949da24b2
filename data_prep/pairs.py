"""Pairs: the planned samples as images of their bucket's size with captions, part by part.

A part is `pairs.tar` (WebDataset: `<id>.jpg` and `<id>.json` a sample), `pairs.parquet` (a row a sample) and, where images
turned out to be bad at full decode, `dropped.parquet`. Peak memory: the encoded images of one part, and in every worker a chunk
of 16 encoded originals and one decoded image.
"""

import io
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.accounts import account, dropped_count, written_count
from data_prep.config import DatasetConfig
from data_prep.images import Crop, ImageError, encode_image, fit_bucket
from data_prep.manifest import read_manifest
from data_prep.parts import Share, commit_part, committed_parts, read_plan
from data_prep.plan import check_settings, source_files
from data_prep.progress import Progress
from data_prep.sample import Place
from data_prep.scan import CAPTIONS, CRASHED
from data_prep.schema import PAIRS, TABLE, Bucket, Commit, Part
from data_prep.sources import OpenSources
from data_prep.store import Store, StoreError
from data_prep.workers import Workers

TAR, DROPPED_TABLE = "pairs.tar", "dropped.parquet"
CHUNK_ROWS = 16
GONE = "source: gone since the plan"
CHANGED = "source: changed since the plan"
CROP = ("left", "top", "right", "bottom")

COLUMNS = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("captions", CAPTIONS),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("original_height", pa.int32()),
        ("original_width", pa.int32()),
        ("crop", pa.list_(pa.float32(), 4)),
        ("member", pa.string()),
        ("bytes", pa.int32()),
    ]
)
"""Columns of `pairs.parquet`; `crop` is left, top, right, bottom in pixels of the upright original."""
DROPPED = pa.schema([("id", pa.int64()), ("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True)
class Pair:
    """One image with its captions."""

    id: int
    key: str
    image: bytes
    """The file (JPEG, PNG or WebP) of the bucket's size."""
    captions: list[tuple[str, str]]
    """Kind and text."""
    height: int
    width: int


def read_pairs(dataset: Store, commit: Commit) -> list[Pair]:
    """The pairs of one committed part, in order, verified against the commit's hashes.

    Raises:
        StoreError: a payload file is missing or damaged.
    """
    if not commit.rows:
        return []
    kinds = read_plan(dataset).caption_kinds
    with tempfile.TemporaryDirectory(prefix="li-dit-") as folder:
        paths = {}
        for file in commit.files:
            name = file.key.rpartition("/")[2]
            paths[name] = Path(folder) / name
            if name in (TAR, TABLE):
                dataset.fetch(file, paths[name])
        table = pq.read_table(paths[TABLE]).to_pylist()
        with tarfile.open(paths[TAR], "r:") as tar:
            images = {member.name: _read_member(tar, member) for member in tar if not member.name.endswith(".json")}
    if len(table) != commit.rows or set(images) != {row["member"] for row in table}:
        raise StoreError(f"{dataset.uri}: pairs {commit.part}: table, tar and commit name different samples: delete its commit")
    return [
        Pair(
            row["id"],
            row["key"],
            images[row["member"]],
            [(kinds[caption["kind"]], caption["text"]) for caption in row["captions"]],
            row["height"],
            row["width"],
        )
        for row in table
    ]


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, f"{member.name} is no file, though we wrote it"
    return file.read()


def run_pairs(config: DatasetConfig, dataset: Store, share: Share) -> None:
    """Make the missing parts of this share.

    Raises:
        UserError: there is no plan, it was made with other settings, or the counts do not add up.
    """
    check_settings(config, dataset)
    mine = share.owns(read_plan(dataset).parts)
    done = committed_parts(dataset, PAIRS)
    maker = PartMaker(config, dataset)
    with maker, Progress("pairs", sum(len(read_manifest(dataset, part)) for part in mine)) as progress:
        for part in mine:
            rows = read_manifest(dataset, part)
            if part in done:
                progress.advance(len(rows), "there before")
                continue
            for outcome, count in maker.make(part, rows).items():
                progress.advance(count, outcome)
    account(dataset)


class Task(NamedTuple):
    """One image to make."""

    row: int
    file: int
    place: Place
    hash: int


class Made(NamedTuple):
    """What became of it: an encoded image, or the reason for none."""

    row: int
    image: bytes = b""
    crop: Crop | None = None
    reason: str = ""
    detail: str = ""


@dataclass
class Recipe:
    """What a worker needs to make images; sent once."""

    sources: OpenSources
    image_format: str
    quality: int


def make_images(context: Recipe, chunk: Sequence[tuple[Task, Bucket]]) -> list[Made]:
    """Read, decode, resize and encode the images of a chunk; all are of one source file."""
    source, name = context.sources.of(chunk[0][0].file)
    made: dict[int, Made] = {}
    for position, data in source.fetch(name, [task.place for task, _ in chunk]):
        task, bucket = chunk[position]
        made[position] = _make_image(context, task, bucket, data)
    return [made.get(position, Made(task.row, reason=GONE)) for position, (task, _) in enumerate(chunk)]


def _make_image(context: Recipe, task: Task, bucket: Bucket, data: bytes | None) -> Made:
    if data is None:
        return Made(task.row, reason=GONE)
    if xxhash.xxh3_64_intdigest(data) != task.hash:
        return Made(task.row, reason=CHANGED)
    try:
        image, crop = fit_bucket(data, bucket)
    except ImageError as error:
        return Made(task.row, reason=error.reason, detail=error.detail)
    return Made(task.row, encode_image(image, context.image_format, context.quality), crop)


class PartMaker:
    """Makes parts of one dataset in worker processes."""

    def __init__(self, config: DatasetConfig, dataset: Store) -> None:
        self._config = config
        self._dataset = dataset
        recipe = Recipe(OpenSources(config, source_files(dataset)), config.image_format, config.image_quality)
        self._workers = Workers(make_images, recipe, lambda item: Made(item[0].row, reason=CRASHED), config.workers)

    def __enter__(self) -> "PartMaker":
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.__exit__(*error)

    def make(self, part: Part, planned: pa.Table) -> dict[str, int]:
        """Make and commit one part; counts by outcome (`written` or a reason)."""
        rows = planned.to_pylist()
        bucket = Bucket.parse(part.bucket)
        made: list[Made | None] = [None] * len(rows)
        for _, results in self._workers.map(_chunks(rows, bucket)):
            for result in results:
                if made[result.row] is not None:
                    raise RuntimeError(f"pairs {part}: row {result.row} came twice")
                made[result.row] = result
        kept = [(row, result) for row, result in zip(rows, made, strict=True) if result and not result.reason]
        dropped = [(row, result) for row, result in zip(rows, made, strict=True) if result and result.reason]
        if len(kept) + len(dropped) != len(rows):
            raise RuntimeError(f"pairs {part}: {len(rows)} rows planned, {len(kept)} made and {len(dropped)} dropped")
        counts = Counter({"written": len(kept)})
        counts.update(result.reason for _, result in dropped)
        with tempfile.TemporaryDirectory(prefix="li-dit-") as folder:
            files = self._write(Path(folder), bucket, kept, dropped)
            commit_part(
                self._dataset,
                PAIRS,
                part,
                files,
                [row["id"] for row, _ in kept],
                {
                    "planned": len(rows),
                    "image_bytes": sum(len(result.image) for _, result in kept),
                    **{written_count(number): count for number, count in _by_file(kept).items()},
                    **{dropped_count(number): count for number, count in _by_file(dropped).items()},
                    **{f"dropped {reason}": count for reason, count in counts.items() if reason != "written"},
                },
            )
        return dict(counts)

    def _write(
        self, folder: Path, bucket: Bucket, kept: list[tuple[dict[str, Any], Made]], dropped: list[tuple[dict[str, Any], Made]]
    ) -> dict[str, Path]:
        files = {}
        if kept:
            files = {TAR: folder / TAR, TABLE: folder / TABLE}
            records = [self._record(bucket, row, made) for row, made in kept]
            pq.write_table(pa.Table.from_pylist(records, COLUMNS), files[TABLE], compression="zstd")
            with tarfile.open(files[TAR], "w", format=tarfile.USTAR_FORMAT) as tar:
                for record, (row, made) in zip(records, kept, strict=True):
                    _add_member(tar, record["member"], made.image)
                    captions: dict[str, list[str]] = {}
                    for caption in row["captions"]:
                        captions.setdefault(self._config.caption_kinds[caption["kind"]], []).append(caption["text"])
                    document = json.dumps({"key": row["key"], **captions}, ensure_ascii=False).encode()
                    _add_member(tar, f"{record['member'].partition('.')[0]}.json", document)
        if dropped:
            files[DROPPED_TABLE] = folder / DROPPED_TABLE
            records = [
                {"id": row["id"], "key": row["key"], "reason": made.reason, "detail": _printable(made.detail)}
                for row, made in dropped
            ]
            pq.write_table(pa.Table.from_pylist(records, DROPPED), files[DROPPED_TABLE], compression="zstd")
        return files

    def _record(self, bucket: Bucket, row: dict[str, Any], made: Made) -> dict[str, Any]:
        assert made.crop is not None, "a made image has a crop"
        suffix = {"jpeg": "jpg"}.get(self._config.image_format, self._config.image_format)
        return {
            "id": row["id"],
            "key": row["key"],
            "captions": row["captions"],
            "height": bucket.height,
            "width": bucket.width,
            "original_height": row["height"],
            "original_width": row["width"],
            "crop": [made.crop.left, made.crop.top, made.crop.right, made.crop.bottom],
            "member": f"{row['id']:019d}.{suffix}",
            "bytes": len(made.image),
        }


def _by_file(rows: list[tuple[dict[str, Any], Made]]) -> Counter[int]:
    return Counter(row["id"] >> 32 for row, _ in rows)


def _chunks(rows: list[dict[str, Any]], bucket: Bucket) -> Iterator[list[tuple[Task, Bucket]]]:
    """Chunks of rows of one source file, in its order, so that reads are near one another."""
    tasks = [
        Task(number, row["id"] >> 32, Place(row["offset"], row["length"], row["path"]), row["hash"])
        for number, row in enumerate(rows)
    ]
    chunk: list[tuple[Task, Bucket]] = []
    for task in sorted(tasks, key=lambda task: (task.file, task.place)):
        if chunk and (chunk[-1][0].file != task.file or len(chunk) == CHUNK_ROWS):
            yield chunk
            chunk = []
        chunk.append((task, bucket))
    if chunk:
        yield chunk


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
