"""Pairs: the planned samples as images of their bucket's size with captions, part by part.

A part is `pairs.tar` (WebDataset: `<id>.jpg` and `<id>.json` a sample), `pairs.parquet` (a row a sample) and, where images
turned out to be bad at full decode, `dropped.parquet`.

Finished images wait for the rest of their part in a temporary file, so memory holds only what is in flight: in every worker a
chunk of 16 encoded originals (at most 32 MB, unless one alone is larger) and one decoded image, and here a few chunks and the
planned rows of the open parts (one, or one a bucket where the source is read along).
"""

import io
import json
import shutil
import tarfile
import tempfile
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import commit_part, committed_parts, read_plan
from data_prep.dataset.schema import PAIRS, TABLE, Bucket, Commit, Part
from data_prep.pairs.make_images import Made, Recipe, chunks_of, make_images, tasks_in_order
from data_prep.plan.accounts import account, dropped_count, written_count
from data_prep.plan.manifest import read_manifest
from data_prep.plan.plan import check_settings, file_order, source_files
from data_prep.plan.scan import CAPTIONS, CRASHED
from data_prep.sources.source import OpenSources, reads_along
from data_prep.store.store import Store, StoreError
from data_prep.workers import Workers
from model.common.files import naming_full_disk
from model.common.progress import Progress
from model.common.share import Share

TAR, DROPPED_TABLE = "pairs.tar", "dropped.parquet"
COMMITS_BEHIND = 2
"""Finished parts that may wait for their upload while the next ones are made."""

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


def read_pairs(dataset: Store, commit: Commit, caption_kinds: list[str]) -> list[Pair]:
    """The pairs of one committed part, in order, verified against the commit's hashes; `caption_kinds` is the plan's.

    Raises:
        StoreError: a payload file is missing or damaged.
    """
    if not commit.rows:
        return []
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
            [(caption_kinds[caption["kind"]], caption["text"]) for caption in row["captions"]],
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
        UserError: there is no plan, it was made with other settings, the disk is full, or the counts do not add up.
    """
    check_settings(config, dataset)
    manifest = read_plan(dataset)
    mine = share.owns(manifest.parts)
    done = committed_parts(dataset, PAIRS)
    rows = {part: manifest.buckets[part.bucket][part.number] for part in mine}
    with Progress("pairs", sum(rows.values())) as progress:
        progress.advance(sum(rows[part] for part in mine if part in done), "there before")
        make_parts(config, dataset, [part for part in mine if part not in done], progress)
    account(dataset)


def make_parts(config: DatasetConfig, dataset: Store, parts: Sequence[Part], progress: Progress) -> None:
    """Make and commit `parts`; those of one bucket stand in the order of their numbers."""
    files = source_files(dataset)
    ranks = [0] * len(files)
    for rank, number in enumerate(file_order(config, files)):
        ranks[number] = rank
    open_parts: dict[Part, _OpenPart] = {}
    commits: deque[Future[Counter[str]]] = deque()
    recipe = Recipe(OpenSources(config, files), config.image_format, config.image_quality)
    with (
        tempfile.TemporaryDirectory(prefix="li-dit-") as folder,
        Workers(make_images, recipe, lambda task: Made(task.part, task.row, reason=CRASHED), config.workers) as workers,
        ThreadPoolExecutor(1) as committer,
    ):

        def planned(part: Part) -> list[dict[str, Any]]:
            open_parts[part] = _OpenPart(part, read_manifest(dataset, part).to_pylist(), Path(folder) / str(part))
            return open_parts[part].rows

        tasks = tasks_in_order(parts, planned, ranks, reads_along(config))
        for _, results in workers.map(chunks_of(tasks, OpenSources(config, files))):
            for made in results:
                if not open_parts[made.part].add(made):
                    continue
                commits.append(committer.submit(open_parts.pop(made.part).commit, config, dataset))
                while len(commits) > COMMITS_BEHIND:
                    _count(commits.popleft(), progress)
        while commits:
            _count(commits.popleft(), progress)
    if open_parts:
        raise RuntimeError(f"pairs {next(iter(open_parts))}: planned, but not all of its rows were made")


def _count(commit: "Future[Counter[str]]", progress: Progress) -> None:
    for outcome, count in commit.result().items():
        progress.advance(count, outcome)


class _OpenPart:
    """A part whose images come in, in any order."""

    def __init__(self, part: Part, rows: list[dict[str, Any]], folder: Path) -> None:
        self.rows = rows
        self._part = part
        self._folder = folder
        self._made: dict[int, tuple[Made, int, int]] = {}
        """By row: what was made, without the image; where that begins in the file of images; its bytes."""
        self._size = 0
        folder.mkdir(parents=True)

    def add(self, made: Made) -> bool:
        """Take in one row; True = it was the last.

        Raises:
            UserError: the disk is full.
        """
        if made.row in self._made:
            raise RuntimeError(f"pairs {self._part}: row {made.row} came twice")
        images = self._folder / "images"
        with naming_full_disk(images), images.open("ab") as file:
            file.write(made.image)
        self._made[made.row] = made._replace(image=b""), self._size, len(made.image)
        self._size += len(made.image)
        return len(self._made) == len(self.rows)

    def commit(self, config: DatasetConfig, dataset: Store) -> Counter[str]:
        """Write and commit the part; counts by outcome (`written` or a reason).

        Raises:
            UserError: the disk is full, or another task committed other samples.
        """
        outcomes = [(row, *self._made[number]) for number, row in enumerate(self.rows)]
        kept = [outcome for outcome in outcomes if not outcome[1].reason]
        dropped = [(row, made) for row, made, _, _ in outcomes if made.reason]
        counts = Counter({"written": len(kept)})
        counts.update(made.reason for _, made in dropped)
        with naming_full_disk(self._folder):
            files = {**self._write_kept(config, kept), **self._write_dropped(dropped)}
        commit_part(
            dataset,
            PAIRS,
            self._part,
            files,
            [row["id"] for row, *_ in kept],
            {
                "planned": len(self.rows),
                "image_bytes": self._size,
                **{written_count(number): count for number, count in Counter(row["id"] >> 32 for row, *_ in kept).items()},
                **{dropped_count(number): count for number, count in Counter(row["id"] >> 32 for row, _ in dropped).items()},
                **{f"dropped {reason}": count for reason, count in counts.items() if reason != "written"},
            },
        )
        shutil.rmtree(self._folder)
        return counts

    def _write_kept(self, config: DatasetConfig, kept: list[tuple[dict[str, Any], Made, int, int]]) -> dict[str, Path]:
        if not kept:
            return {}
        files = {TAR: self._folder / TAR, TABLE: self._folder / TABLE}
        records = [self._record(config, row, made, size) for row, made, _, size in kept]
        pq.write_table(pa.Table.from_pylist(records, COLUMNS), files[TABLE], compression="zstd")
        images = self._folder / "images"
        with images.open("rb") as source, tarfile.open(files[TAR], "w", format=tarfile.USTAR_FORMAT) as tar:
            for record, (row, _, start, size) in zip(records, kept, strict=True):
                source.seek(start)
                _add_member(tar, record["member"], source.read(size))
                captions: dict[str, list[str]] = {}
                for caption in row["captions"]:
                    captions.setdefault(config.caption_kinds[caption["kind"]], []).append(caption["text"])
                document = json.dumps({"key": row["key"], **captions}, ensure_ascii=False).encode()
                _add_member(tar, f"{record['member'].partition('.')[0]}.json", document)
        return files

    def _write_dropped(self, dropped: list[tuple[dict[str, Any], Made]]) -> dict[str, Path]:
        if not dropped:
            return {}
        records = [
            {"id": row["id"], "key": row["key"], "reason": made.reason, "detail": _printable(made.detail)}
            for row, made in dropped
        ]
        path = self._folder / DROPPED_TABLE
        pq.write_table(pa.Table.from_pylist(records, DROPPED), path, compression="zstd")
        return {DROPPED_TABLE: path}

    def _record(self, config: DatasetConfig, row: dict[str, Any], made: Made, size: int) -> dict[str, Any]:
        assert made.crop is not None, "a made image has a crop"
        bucket = Bucket.parse(self._part.bucket)
        suffix = {"jpeg": "jpg"}.get(config.image_format, config.image_format)
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
            "bytes": size,
        }


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
