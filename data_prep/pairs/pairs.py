"""Make pairs: the planned samples as images of their bucket's size with captions, part by part.

A part has `pairs.tar` (WebDataset: `<id>.jpg`, `<id>.json` and `<id>.txt` per sample) and `pairs.parquet`
(one row per sample). If images turned out to be bad at full decode, it also has `dropped.parquet`.

Finished images wait for the rest of their part in a temporary file, so memory holds only what is in progress:
    in every worker a
chunk of 16 encoded originals (at most 32 MB, unless a single one is larger) and one decoded image, and in
this process a few chunks and the planned rows of the open parts (one part, or one per bucket if a source has
no random access).
"""

import io
import json
import posixpath
import shutil
import tarfile
import tempfile
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.clips.media import decode_clip
from data_prep.config import DatasetConfig
from data_prep.dataset.accounts import check_parts, dropped_count, written_count
from data_prep.dataset.parts import commit_part, committed_parts, read_plan, read_plan_record
from data_prep.dataset.schema import PAIRS, TABLE, Bucket, Commit, Manifest, Part
from data_prep.engines import Do, Outcome, Step, run
from data_prep.images.images import decode_image
from data_prep.pairs.make_images import (
    EncodedImage,
    EncodingContext,
    ImageTask,
    chunk_tasks,
    encode_images,
    order_tasks,
)
from data_prep.plan.finish import file_order
from data_prep.plan.listing import print_changed, source_files
from data_prep.plan.manifest import read_manifest
from data_prep.plan.plan import check_settings
from data_prep.plan.scan import CAPTIONS, CRASHED
from data_prep.sources.sample import printable
from data_prep.sources.source import OpenSources, needs_sequential_reads
from data_prep.store.store import Store, StoreError
from data_prep.workers import Workers
from model.common.files import naming_full_disk
from model.common.share import Share

TAR, DROPPED_TABLE = "pairs.tar", "dropped.parquet"
TEXTS = (".json", ".txt")
"""Endings of the members of a tar that are not images."""
MAX_WAITING_COMMITS = 2
"""Finished parts that may wait for their upload while the next ones are made."""
IMAGES = "images"
"""Temporary file of an open part: its images, one after another."""

CARD_KEY = f"{PAIRS}/README.md"
CARD = f"""---
configs:
- config_name: default
  data_files: "*/*/*/{TAR}"
---
Images with their captions, as WebDataset. `datasets.load_dataset` reads this folder by the lines above.
""".encode()
"""Without it, `datasets` takes the tables next to the tars for the data, and finds no images."""

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
CLIP_COLUMNS = pa.schema(
    [
        *COLUMNS,
        ("frames", pa.int32()),
        ("fps", pa.float32()),
        ("stride", pa.int32()),
        ("start", pa.float64()),
        ("motion", pa.float32()),
        ("jump", pa.float32()),
    ]
)
"""Columns of a part of clips.

Frames, and frames per second, of the stored clip; frame intervals of the video from one of its frames to the
next; seconds of the video before it; mean and largest difference of neighboring frames (`measure_motion`).
"""
DROPPED = pa.schema(
    [("id", pa.int64()), ("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)


@dataclass(frozen=True)
class Pair:
    """One image or clip with its captions."""

    id: int
    key: str
    image: bytes
    """The file of the bucket's size: a JPEG, PNG or WebP; of a clip, an mp4 or an animated WebP."""
    captions: list[tuple[str, str]]
    """Kind and text."""
    height: int
    width: int
    frames: int = 1
    """1 for an image."""
    fps: float = 0.0
    """Frames per second of a clip; 0 for an image."""


def read_clip(pair: Pair) -> np.ndarray:
    """Decode the image or clip of a pair, uint8 [T, H, W, 3]; T is 1 for an image.

    Raises:
        ImageError: if the file is damaged.
        UserError: if it is an mp4 and PyAV is not installed.
    """
    if pair.frames == 1:
        return np.asarray(decode_image(pair.image))[None]
    return decode_clip(pair.image, pair.frames)


def read_pairs(dataset: Store, commit: Commit, caption_kinds: list[str]) -> list[Pair]:
    """Return the pairs of one committed part, in order, verified against the commit's hashes.

    Args:
        dataset: the dataset's store.
        commit: the part's commit.
        caption_kinds: the plan's names of caption kinds.

    Raises:
        StoreError: if a payload file is missing or damaged.
    """
    if not commit.rows:
        return []

    # Fetching to a file checks size and hash.
    with tempfile.TemporaryDirectory(prefix="li-dit-") as folder:
        for file in commit.files:
            name = posixpath.basename(file.key)
            if name in (TAR, TABLE):
                dataset.fetch(file, Path(folder) / name)
        rows = pq.read_table(Path(folder) / TABLE).to_pylist()
        images = _read_images(Path(folder) / TAR)

    if len(rows) != commit.rows or set(images) != {row["member"] for row in rows}:
        raise StoreError(
            f"{dataset.uri}: pairs {commit.part}: table, tar and commit name different samples: "
            "delete its commit"
        )

    pairs = []
    for row in rows:
        captions = [(caption_kinds[caption["kind"]], caption["text"]) for caption in row["captions"]]
        # Only parts of clips have the columns `frames` and `fps`.
        size = row["height"], row["width"], row.get("frames", 1), row.get("fps", 0.0)
        pairs.append(Pair(row["id"], row["key"], images[row["member"]], captions, *size))
    return pairs


def _read_images(path: Path) -> dict[str, bytes]:
    """Return the images of a pairs tar by their member's name."""
    images = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.name.endswith(TEXTS):
                file = tar.extractfile(member)
                assert file is not None, f"{member.name} is no file, though we wrote it"
                images[member.name] = file.read()
    return images


def run_pairs(config: DatasetConfig, dataset: Store, share: Share) -> None:
    """Make the missing parts of this share.

    Raises:
        UserError: if there is no plan, it was made with other settings, the disk is full, or the counts do
            not add up.
    """
    check_settings(config, dataset)
    manifest = read_plan(dataset)
    dataset.put_new(CARD_KEY, CARD)
    step = PairsStep(config, dataset, manifest)
    changed = run(step, share).notes
    print_changed("pairs", sorted(set(changed)))
    check_parts(dataset, manifest, share.owns(manifest.parts), step.made)


class PairsStep(Step):
    """The making of all parts; its units are their names."""

    title = "pairs"
    noun = "rows"
    # Neighboring parts share source files, some of which have no random access.
    batch = 16

    def __init__(self, config: DatasetConfig, dataset: Store, manifest: Manifest) -> None:
        """Make nothing yet.

        Args:
            config: the dataset's settings.
            dataset: the dataset's store.
            manifest: the plan.
        """
        self.cpus = max(1, config.workers)
        self.units = [str(part) for part in manifest.parts]
        self._config = config
        self._dataset = dataset
        self._manifest = manifest
        self.made: list[Commit] = []
        """Commits of the parts that were made in this process, which need not be read for their check."""

    def missing(self) -> set[str]:
        """Return the parts that are not committed."""
        return set(self.units) - {str(part) for part in committed_parts(self._dataset, PAIRS)}

    def exists(self, unit: str) -> bool:
        """True if a part is committed."""
        return self._dataset.exists(Part.parse(unit).commit_key(PAIRS))

    def total(self, units: Collection[str]) -> int:
        """Return the planned rows of some parts."""
        parts = map(Part.parse, units)
        return sum(self._manifest.buckets[part.bucket][part.number] for part in parts)

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Start the processes that encode images."""
        with _PairMaker(self._config, self._dataset, self.made) as maker:
            yield lambda units: maker.make([Part.parse(unit) for unit in units])


class _PairMaker:
    """Makes parts, with processes that encode the images."""

    def __init__(self, config: DatasetConfig, dataset: Store, made: list[Commit]) -> None:
        self._config = config
        self._dataset = dataset
        self._made = made
        # Rank of each source file in the order in which the plan shuffled them.
        files = source_files(dataset)
        self._ranks = [0] * len(files)
        for rank, number in enumerate(file_order(config, files)):
            self._ranks[number] = rank
        self._hashes = read_plan_record(dataset)["manifest"]
        self._sources = OpenSources(config, files)
        context = EncodingContext(
            self._sources, config.image_format, config.image_quality, config.clips, config.seed
        )
        self._workers = Workers(encode_images, context, _crashed, config.workers)

    def __enter__(self) -> "_PairMaker":
        self._workers.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.__exit__(*error)

    def make(self, parts: Sequence[Part]) -> Iterator[Outcome]:
        """Make and commit `parts`; those of one bucket are ordered by number.

        Yields the rows by outcome, part by part, and last the names of source files that have changed.
        """
        read_by_place: set[int] = set()
        """Numbers of the source files with many images, which are read by their place in the file."""
        open_parts: dict[Part, _OpenPart] = {}
        commits: deque[Future[_Made]] = deque()
        with (
            tempfile.TemporaryDirectory(prefix="li-dit-") as folder,
            ThreadPoolExecutor(1) as committer,
        ):
            # A part's rows are read when its first task is due, so only the open parts are in memory.
            def open_part(part: Part) -> list[dict[str, Any]]:
                open_parts[part] = _OpenPart(
                    part,
                    read_manifest(self._dataset, part, self._hashes).to_pylist(),
                    Path(folder) / str(part),
                )
                return open_parts[part].rows

            along_source = needs_sequential_reads(self._config)
            tasks = order_tasks(parts, open_part, self._ranks, along_source)
            for chunk, images in self._workers.map(chunk_tasks(tasks, self._sources)):
                read_by_place.update(task.file for task in chunk if not task.place.path)
                for image in images:
                    open_parts[image.part].add(image)
                    if open_parts[image.part].complete:
                        part = open_parts.pop(image.part)
                        commits.append(committer.submit(part.commit, self._config, self._dataset))
                    # Waiting here bounds the disk: a slow upload delays the parts that come next.
                    while len(commits) > MAX_WAITING_COMMITS:
                        yield self._outcome(commits.popleft().result())

            while commits:
                yield self._outcome(commits.popleft().result())
        if open_parts:
            raise RuntimeError(f"pairs {next(iter(open_parts))}: planned, but not all of its rows were made")
        yield Outcome(notes=self._sources.changed(read_by_place))

    def _outcome(self, part: "_Made") -> Outcome:
        self._made.append(part.commit)
        return Outcome(part.rows)


def _crashed(task: ImageTask) -> EncodedImage:
    return EncodedImage(task.part, task.row, reason=CRASHED)


class _Made(NamedTuple):
    """A part that is committed."""

    commit: Commit
    rows: Counter[str]
    """Number of rows per outcome: `written`, or the reason why a row was dropped."""


class _StoredImage(NamedTuple):
    """A planned row, what became of its image, and the extent of the image in the part's temporary file."""

    row: dict[str, Any]
    result: EncodedImage
    """Without the image's bytes."""
    start: int
    size: int

    @property
    def file(self) -> int:
        """Number of the row's source file."""
        return self.row["id"] >> 32


class _OpenPart:
    """A part in progress: its images arrive in any order."""

    def __init__(self, part: Part, rows: list[dict[str, Any]], folder: Path) -> None:
        self.rows = rows
        self._part = part
        self._folder = folder
        self._stored: dict[int, _StoredImage] = {}
        """By row of the part."""
        self._size = 0
        folder.mkdir(parents=True)

    @property
    def complete(self) -> bool:
        """True if every row has arrived."""
        return len(self._stored) == len(self.rows)

    def add(self, image: EncodedImage) -> None:
        """Store the result of one row.

        Raises:
            UserError: if the disk is full.
        """
        if image.row in self._stored:
            raise RuntimeError(f"pairs {self._part}: row {image.row} came twice")

        # One file for all images of a part, since a file per image would burden the file system.
        path = self._folder / IMAGES
        with naming_full_disk(path), path.open("ab") as file:
            file.write(image.image)
        self._stored[image.row] = _StoredImage(
            self.rows[image.row], image._replace(image=b""), self._size, len(image.image)
        )
        self._size += len(image.image)

    def commit(self, config: DatasetConfig, dataset: Store) -> _Made:
        """Write and commit the part.

        Raises:
            UserError: if the disk is full, or another task committed other samples.
        """
        # In the order of the manifest: every task that makes this part has to commit the same ids.
        ordered = [self._stored[number] for number in range(len(self.rows))]
        written = [stored for stored in ordered if not stored.result.reason]
        dropped = [stored for stored in ordered if stored.result.reason]
        # A part that lost all rows is committed too, without files, so that it counts as done.
        with naming_full_disk(self._folder):
            files = {**self._write_pairs(config, written), **self._write_dropped(dropped)}

        reasons = Counter(stored.result.reason for stored in dropped)
        counts: dict[str, float] = {"planned": len(self.rows), "image_bytes": self._size}
        for number, count in Counter(stored.file for stored in written).items():
            counts[written_count(number)] = count
        for number, count in Counter(stored.file for stored in dropped).items():
            counts[dropped_count(number)] = count
        for reason, count in reasons.items():
            counts[f"dropped {reason}"] = count

        ids = [stored.row["id"] for stored in written]
        commit = commit_part(dataset, PAIRS, self._part, files, ids, counts)
        shutil.rmtree(self._folder)
        return _Made(commit, Counter({"written": len(written), **reasons}))

    def _write_pairs(self, config: DatasetConfig, written: list[_StoredImage]) -> dict[str, Path]:
        """Write the table and the tar; neither if no row is left."""
        if not written:
            return {}
        files = {TAR: self._folder / TAR, TABLE: self._folder / TABLE}
        records = [self._record(config, stored) for stored in written]
        columns = CLIP_COLUMNS if Bucket.parse(self._part.bucket).frames > 1 else COLUMNS
        pq.write_table(pa.Table.from_pylist(records, columns), files[TABLE], compression="zstd")

        # The tar has the table's order, whereas the images were stored as they arrived.
        images = self._folder / IMAGES
        with images.open("rb") as source, tarfile.open(files[TAR], "w", format=tarfile.USTAR_FORMAT) as tar:
            for record, stored in zip(records, written, strict=True):
                source.seek(stored.start)
                _add_member(tar, record["member"], source.read(stored.size))
                name = record["member"].partition(".")[0]
                _add_member(tar, f"{name}.json", _caption_document(config, stored.row))
                # Most readers of WebDataset expect the caption in a text of its own.
                _add_member(tar, f"{name}.txt", stored.row["captions"][0]["text"].encode())
        return files

    def _write_dropped(self, dropped: list[_StoredImage]) -> dict[str, Path]:
        """Write the table of dropped rows, if there are any."""
        if not dropped:
            return {}
        records = [
            {
                "id": row["id"],
                "key": row["key"],
                "reason": result.reason,
                "detail": printable(result.detail),
            }
            for row, result, _, _ in dropped
        ]
        path = self._folder / DROPPED_TABLE
        pq.write_table(pa.Table.from_pylist(records, DROPPED), path, compression="zstd")
        return {DROPPED_TABLE: path}

    def _record(self, config: DatasetConfig, stored: _StoredImage) -> dict[str, Any]:
        """Return the row of the pairs table."""
        row, crop = stored.row, stored.result.crop
        assert crop is not None, "an encoded image has a crop"
        bucket = Bucket.parse(self._part.bucket)
        clips = config.clips if bucket.frames > 1 else None
        # By convention, WebDataset names JPEGs `.jpg`.
        suffix = clips.format if clips else {"jpeg": "jpg"}.get(config.image_format, config.image_format)
        return {
            "id": row["id"],
            "key": row["key"],
            "captions": row["captions"],
            "height": bucket.height,
            "width": bucket.width,
            "original_height": row["height"],
            "original_width": row["width"],
            "crop": [crop.left, crop.top, crop.right, crop.bottom],
            # 19 digits, as many as an int64 can have, so that names sort by id.
            "member": f"{row['id']:019d}.{suffix}",
            "bytes": stored.size,
            **(stored.result.columns or {}),
        }


def _caption_document(config: DatasetConfig, row: dict[str, Any]) -> bytes:
    """Return a sample's JSON file in the tar: its key, and its captions by kind."""
    captions: dict[str, list[str]] = {}
    for caption in row["captions"]:
        captions.setdefault(config.caption_kinds[caption["kind"]], []).append(caption["text"])
    return json.dumps({"key": row["key"], **captions}, ensure_ascii=False).encode()


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # A bare header has no time and no owner, so that equal pairs give equal tars.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
