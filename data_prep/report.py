"""The report of a dataset: one HTML page with what was read, what was left out and why, and what the pairs look like."""

import base64
import io
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq
from PIL import Image

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import committed, read_plan, read_plan_record
from data_prep.dataset.schema import PAIRS, TABLE, Commit, Manifest, Part
from data_prep.dataset.snapshot_reader import read_families
from data_prep.families.text_report import SAVINGS, text_reports
from data_prep.images.images import ImageError, decode_image
from data_prep.pairs.pairs import DROPPED_TABLE, Pair, read_pairs
from data_prep.plan.accounts import FileAccount, account
from data_prep.plan.plan import dropped_key, source_files
from data_prep.sources.sample import Place
from data_prep.sources.source import OpenSources
from data_prep.store.store import Store

SAMPLES = 24
DROPPED_SAMPLES = 8
PARTS_LOOKED_AT = 64
FILES_LOOKED_AT = 32
FILES_LISTED = 100
THUMBNAIL = 160
BINS = 16


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram; `share` of the highest bar, in percent."""

    label: str
    count: int
    share: float


@dataclass(frozen=True)
class Tile:
    """A picture, or what stands for it, with the words under it."""

    source: str
    words: str
    title: str = ""


def write_report(config: DatasetConfig, dataset: Store, path: Path) -> None:
    """Write the page to `path`.

    Raises:
        UserError: there is no plan yet, or the counts do not add up.
    """
    manifest = read_plan(dataset)
    accounts = account(dataset)
    commits = committed(dataset, PAIRS)
    record = read_plan_record(dataset)
    tables = _looked_at(dataset, commits)
    page = (
        jinja2.Environment(loader=jinja2.PackageLoader("data_prep", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .get_template("report.html")
        .render(
            name=config.name,
            store=dataset.uri,
            totals=_totals(accounts),
            captions=record["captions"],
            steps=_steps(accounts, record, commits),
            buckets=_buckets(manifest, commits),
            histograms=_histograms(config, tables),
            looked_at=len(tables),
            parts=len(manifest.parts),
            committed_parts=len(commits),
            kinds=_kinds(dataset, commits),
            texts=text_reports(dataset),
            savings=SAVINGS,
            samples=_samples(dataset, commits, manifest.caption_kinds),
            dropped=_dropped_samples(config, dataset, commits),
            files=accounts[:FILES_LISTED],
            more_files=max(0, len(accounts) - FILES_LISTED),
            near=config.dedupe.near,
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(f"report: {path}")


def _totals(accounts: list[FileAccount]) -> dict[str, int]:
    names = ("read", "dropped_by_plan", "planned", "written", "dropped_in_parts", "pending")
    return {name: sum(getattr(one, name) for one in accounts) for name in names}


def _steps(accounts: list[FileAccount], record: dict[str, Any], commits: dict[Part, Commit]) -> list[dict[str, Any]]:
    """From rows read to rows committed: what each reason took, and what was left."""
    reasons: Counter[str] = Counter()
    for file in record["files"]:
        reasons.update(file["dropped"])
    in_parts: Counter[str] = Counter()
    for commit in commits.values():
        in_parts.update(
            {name.removeprefix("dropped "): int(n) for name, n in commit.counts.items() if name.startswith("dropped ")}
        )
    left = total = sum(one.read for one in accounts)
    steps = [{"name": "rows read", "taken": None, "left": left}]
    for where, taken in (("plan", reasons), ("at full decode", in_parts)):
        for reason, count in sorted(taken.items(), key=lambda item: (_stage(item[0]), -item[1])):
            left -= count
            steps.append({"name": reason if where == "plan" else f"{reason} ({where})", "taken": count, "left": left})
    pending = sum(one.pending for one in accounts)
    if pending:
        left -= pending
        steps.append({"name": "in parts that are not made yet", "taken": pending, "left": left})
    steps.append({"name": "committed", "taken": None, "left": left})
    return [{**step, "share": 100 * step["left"] / max(1, total)} for step in steps]


def _stage(reason: str) -> int:
    """The order in which a row meets its judges."""
    order = ("source", "image", "caption:", "caption_", "bucket", "dedupe: same", "dedupe")
    found = next((number for number, start in enumerate(order) if reason.startswith(start)), None)
    return 3 if found is None else found


def _buckets(manifest: Manifest, commits: dict[Part, Commit]) -> list[dict[str, Any]]:
    found = []
    for name, rows in sorted(manifest.buckets.items(), key=lambda item: -sum(item[1])):
        there = [commit for part, commit in commits.items() if part.bucket == name]
        found.append(
            {
                "name": name,
                "planned": sum(rows),
                "parts": len(rows),
                "committed_parts": len(there),
                "rows": sum(commit.rows for commit in there),
                "bytes": sum(file.bytes for commit in there for file in commit.files),
            }
        )
    return found


def _kinds(dataset: Store, commits: dict[Part, Commit]) -> list[dict[str, Any]]:
    """Bytes of the pairs and of every family."""
    found = []
    for kind in [PAIRS, *read_families(dataset)]:
        there = commits if kind == PAIRS else committed(dataset, kind)
        rows = sum(commit.rows for commit in there.values())
        size = sum(file.bytes for commit in there.values() for file in commit.files)
        found.append({"name": kind, "parts": len(there), "rows": rows, "bytes": size, "each": size / max(1, rows)})
    return found


def _looked_at(dataset: Store, commits: dict[Part, Commit]) -> list[list[dict[str, Any]]]:
    """The tables of evenly spaced parts, for the histograms."""
    there = [commit for commit in commits.values() if commit.rows]
    tables = []
    for commit in there[:: max(1, -(-len(there) // PARTS_LOOKED_AT))]:
        key = next(file.key for file in commit.files if posixpath.basename(file.key) == TABLE)
        columns = ["captions", "original_height", "original_width", "crop"]
        tables.append(pq.read_table(io.BytesIO(dataset.read(key)), columns=columns).to_pylist())
    return tables


def _histograms(config: DatasetConfig, tables: list[list[dict[str, Any]]]) -> list[tuple[str, list[Bar]]]:
    rows = [row for table in tables for row in table]
    if not rows:
        return []
    found = [
        ("Shorter side of the original, pixels", _bars([min(row["original_height"], row["original_width"]) for row in rows])),
        ("Aspect ratio of the original, width / height", _bars([row["original_width"] / row["original_height"] for row in rows])),
        ("Share of the area kept by the crop", _bars([_kept(row) for row in rows])),
    ]
    for number, kind in enumerate(config.caption_kinds):
        lengths = [len(caption["text"]) for row in rows for caption in row["captions"] if caption["kind"] == number]
        if lengths:
            found.append((f"Length of captions, kind {kind}, letters", _bars(lengths)))
    found.append(("Captions an image", _bars([len(row["captions"]) for row in rows])))
    return found


def _kept(row: dict[str, Any]) -> float:
    left, top, right, bottom = row["crop"]
    return (right - left) * (bottom - top) / (row["original_height"] * row["original_width"])


def _bars(values: Sequence[float]) -> list[Bar]:
    """A histogram of at most `BINS` bins; the last one takes the highest 1 %."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[max(0, int(len(ordered) * 0.99) - 1)]
    whole = all(isinstance(value, int) for value in values)
    width = max((high - low) / BINS, 1 if whole else 1e-9)
    width = -(-width // 1) if whole else width
    counts = Counter(min(BINS - 1, int((value - low) / width)) for value in values)
    last = max(counts)
    highest = max(counts.values())
    labels = [f"{low + number * width:.0f}" if whole else f"{low + number * width:.2f}" for number in range(last + 1)]
    return [Bar(label, counts[number], 100 * counts[number] / highest) for number, label in enumerate(labels)]


def _samples(dataset: Store, commits: dict[Part, Commit], kinds: list[str]) -> list[tuple[str, list[Tile]]]:
    """Pairs of the first part of every bucket."""
    first: dict[str, Commit] = {}
    for part, commit in sorted(commits.items()):
        if commit.rows:
            first.setdefault(part.bucket, commit)
    return [(bucket, [_tile(pair) for pair in read_pairs(dataset, commit, kinds)[:SAMPLES]]) for bucket, commit in first.items()]


def _tile(pair: Pair) -> Tile:
    words = " / ".join(text for _, text in pair.captions[:2])
    return Tile(_thumbnail(pair.image), words[:200], f"{pair.key} ({len(pair.captions)} captions)")


def _thumbnail(data: bytes) -> str:
    """The image as a small data URI; empty if it cannot be decoded."""
    try:
        image = decode_image(data, at_least=(THUMBNAIL, THUMBNAIL))
    except ImageError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _dropped_samples(config: DatasetConfig, dataset: Store, commits: dict[Part, Commit]) -> list[tuple[str, list[Tile]]]:
    """For every reason, some of the samples left out, by the plan or while their part was made; the plan's that have an image
    are fetched from the source."""
    files = source_files(dataset)
    sources = OpenSources(config, files)
    found: dict[str, list[Tile]] = {}
    for file in files[:: max(1, -(-len(files) // FILES_LOOKED_AT))]:
        wanted: list[tuple[str, dict[str, Any]]] = []
        for row in pq.read_table(io.BytesIO(dataset.read(dropped_key(file.number)))).to_pylist():
            tiles = found.setdefault(row["reason"], [])
            if len(tiles) + sum(reason == row["reason"] for reason, _ in wanted) < DROPPED_SAMPLES:
                wanted.append((row["reason"], row))
        source, name = sources.of(file.number)
        placed = [(reason, row) for reason, row in wanted if row["length"] or row["path"] or row["offset"]]
        places = [Place(row["offset"], row["length"], row["path"]) for _, row in placed]
        images = {id(placed[position][1]): data for position, data in source.fetch(name, places)} if places else {}
        for reason, row in wanted:
            data = images.get(id(row))
            found[reason].append(Tile(_thumbnail(data) if data else "", row["detail"] or row["key"], row["key"]))
    tables = [file.key for commit in commits.values() for file in commit.files if posixpath.basename(file.key) == DROPPED_TABLE]
    for key in tables[:PARTS_LOOKED_AT]:
        for row in pq.read_table(io.BytesIO(dataset.read(key))).to_pylist():
            if len(tiles := found.setdefault(row["reason"], [])) < DROPPED_SAMPLES:
                tiles.append(Tile("", row["detail"] or row["key"], row["key"]))
    return sorted(found.items(), key=lambda item: (_stage(item[0]), item[0]))
