"""The report of a dataset: one HTML page with counts of rows read, dropped and committed, and sample
pairs."""

import base64
import io
import itertools
import math
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import pyarrow
from PIL import Image

from data_prep.clips.clips import first_frame, is_clip
from data_prep.clips.large_file import Media
from data_prep.config import DatasetConfig
from data_prep.dataset.accounts import FileAccount, Totals, account, without_counts
from data_prep.dataset.parts import committed, read_plan, read_plan_record
from data_prep.dataset.records import hashed, parse_table, read_object
from data_prep.dataset.schema import PAIRS, TABLE, Bucket, Commit, Manifest, Part, PlanRecord
from data_prep.dataset.snapshot_reader import VERIFY, read_families
from data_prep.families.captions_report import captions_reports
from data_prep.families.latents_report import missing_noise
from data_prep.families.text_report import SAVINGS, payload_bytes, text_reports
from data_prep.images.images import ImageError, decode_image
from data_prep.pairs.pairs import DROPPED as DROPPED_IN_PARTS
from data_prep.pairs.pairs import DROPPED_TABLE, Pair, read_clip, read_pairs
from data_prep.plan.dedupe import EXACT, NEAR
from data_prep.plan.listing import source_files
from data_prep.plan.rows import DROPPED as DROPPED_BY_PLAN
from data_prep.plan.rows import dropped_key
from data_prep.plan.verdicts import LISTED_REASON
from data_prep.sources.sample import Place
from data_prep.sources.source import OpenSources
from data_prep.store.store import Store
from model.common.errors import UserError

MAX_SAMPLES = 24
"""Pairs shown per bucket."""
MAX_DROPPED_SAMPLES = 8
"""Dropped samples shown per reason."""
MAX_PARTS_READ = 64
MAX_FILES_READ = 32
MAX_FILES_LISTED = 100
MAX_CAPTION = 200
"""Characters shown of a pair's captions."""
THUMBNAIL = 160
"""Longer side of a thumbnail, in pixels."""
SHEET_FRAMES = 4
"""Frames shown of a clip."""
MAX_BINS = 16
REASON_ORDER = (
    "source",
    "image",
    "clip",
    "caption:",
    "caption_",
    "bucket",
    f"{EXACT} as in",
    EXACT,
    f"{NEAR} as in",
    NEAR,
    LISTED_REASON,
    "dedupe",
)
"""Starts of the reasons, in the order in which rows are dropped for them."""
FILTER_POSITION = REASON_ORDER.index("caption_")
"""Position of all other reasons: those of the filters, such as `min_side: ...`."""


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram."""

    label: str
    count: int
    share: float
    """Percentage of the highest bar."""


@dataclass(frozen=True)
class Tile:
    """An image with its caption; a placeholder if there is no image."""

    source: str
    """Data URI; empty if there is no image."""
    caption: str
    title: str = ""


def write_report(config: DatasetConfig, dataset: Store, path: Path) -> None:
    """Write the page to `path`.

    Raises:
        UserError: if there is no plan yet, or the counts do not add up.
    """
    manifest = read_plan(dataset)
    # Raises if the counts do not add up: a page with wrong counts would look right.
    # Of a million parts, the counts by source file take gigabytes, and only their sums are shown.
    totals = Totals()
    commits = committed(dataset, PAIRS, totals.take)
    accounts = account(dataset, commits, totals)
    record = read_plan_record(dataset)
    tables = _sample_tables(dataset, commits)

    # Captions and keys are foreign text: unescaped, they could put a script on the page.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("data_prep", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        name=config.name,
        store=dataset.uri,
        totals=_totals(accounts),
        captions=record["captions"],
        steps=_steps(accounts, record, totals),
        buckets=_buckets(manifest, commits),
        histograms=_histograms(config, tables),
        tables=len(tables),
        parts=len(manifest.parts),
        committed_parts=len(commits),
        kinds=_kinds(dataset, commits),
        noise=missing_noise(dataset),
        texts=text_reports(dataset),
        savings=SAVINGS,
        generated=captions_reports(dataset),
        samples=_samples(dataset, commits, manifest.caption_kinds),
        dropped=_dropped_samples(config, dataset, commits),
        sources=_sources(config, record),
        files=accounts[:MAX_FILES_LISTED],
        more_files=max(0, len(accounts) - MAX_FILES_LISTED),
        near=config.dedupe.near,
        against=record.get("against", []),
        drop=record.get("drop"),
    )

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(f"report: {path}")


def _totals(accounts: list[FileAccount]) -> dict[str, int]:
    names = ("read", "dropped_by_plan", "planned", "written", "dropped_in_parts", "pending")
    totals: dict[str, int] = dict.fromkeys(names, 0)
    for counts in accounts:
        for name in names:
            totals[name] += getattr(counts, name)
    return totals


def _steps(accounts: list[FileAccount], record: PlanRecord, totals: Totals) -> list[dict[str, Any]]:
    """Return the steps from rows read to rows committed: the rows that each reason dropped, and those
    left."""
    in_plan: Counter[str] = Counter()
    for file in record["files"]:
        in_plan.update(file["dropped"])
    in_parts: dict[str, int] = {}
    # In the order of their names, since reasons that drop as many rows are shown in this order.
    for name, count in sorted(totals.counts.items()):
        if name.startswith("dropped "):
            in_parts[name.removeprefix("dropped ")] = count

    # Reasons follow in the order in which rows meet them, so `left` counts down to the committed rows.
    left = total = sum(account.read for account in accounts)
    steps: list[dict[str, Any]] = [{"name": "rows read", "dropped": None, "left": left}]
    for counts, suffix in ((in_plan, ""), (in_parts, " (at full decode)")):
        for reason, count in sorted(counts.items(), key=lambda entry: (_position(entry[0]), -entry[1])):
            left -= count
            steps.append({"name": f"{reason}{suffix}", "dropped": count, "left": left})

    pending = sum(account.pending for account in accounts)
    if pending:
        left -= pending
        steps.append({"name": "in parts that are not made yet", "dropped": pending, "left": left})
    steps.append({"name": "committed", "dropped": None, "left": left})

    for step in steps:
        step["share"] = 100 * step["left"] / max(1, total)
    return steps


def _sources(config: DatasetConfig, record: PlanRecord) -> list[dict[str, Any]]:
    """Return a row of the table per source that has files: all of them, and those ignored by kind."""
    table = []
    # Plans of earlier versions have no such counts.
    for source, counts in zip(config.sources, record.get("sources", []), strict=False):
        if counts["files"]:
            ignored = sorted(counts["ignored"].items(), key=lambda entry: (-entry[1], entry[0]))
            table.append({"path": source.path, "files": counts["files"], "ignored": ignored})
    return table


def _position(reason: str) -> int:
    """Return the position of a reason in `REASON_ORDER`."""
    # The first match counts, so a long start comes before a shorter one that it begins with.
    for position, start in enumerate(REASON_ORDER):
        if reason.startswith(start):
            return position
    return FILTER_POSITION


def _buckets(manifest: Manifest, commits: dict[Part, Commit]) -> list[dict[str, Any]]:
    """Return a row of the table per bucket, the largest first."""
    table = []
    for name, rows in sorted(manifest.buckets.items(), key=lambda entry: -sum(entry[1])):
        own = [commit for part, commit in commits.items() if part.bucket == name]
        table.append(
            {
                "name": name,
                "planned": sum(rows),
                "parts": len(rows),
                "committed_parts": len(own),
                "rows": sum(commit.rows for commit in own),
                "bytes": payload_bytes(own),
            }
        )
    return table


def _kinds(dataset: Store, commits: dict[Part, Commit]) -> list[dict[str, Any]]:
    """Return a row of the table for the pairs and one per family."""
    table = []
    for kind in [PAIRS, *read_families(dataset)]:
        own = list((commits if kind == PAIRS else committed(dataset, kind, without_counts)).values())
        rows = sum(commit.rows for commit in own)
        size = payload_bytes(own)
        table.append(
            {
                "name": kind,
                "parts": len(own),
                "rows": rows,
                "bytes": size,
                "bytes_per_row": size / max(1, rows),
            }
        )
    return table


def _sample_tables(dataset: Store, commits: dict[Part, Commit]) -> list[list[dict[str, Any]]]:
    """Read the pairs tables of evenly spaced parts, for the histograms."""
    columns = ["captions", "original_height", "original_width", "crop"]
    of_clips = ["frames", "fps", "motion"]
    # A part that lost all of its rows has no table.
    filled = [commit for commit in commits.values() if commit.rows]
    tables = []
    for commit in _evenly_spaced(filled, MAX_PARTS_READ):
        more = of_clips if Bucket.parse(commit.bucket).frames > 1 else []
        file = next(file for file in commit.files if posixpath.basename(file.key) == TABLE)
        data = read_object(dataset, file.key, hashed(file.xxh64), VERIFY)
        tables.append(parse_table(data, columns=columns + more).to_pylist())
    return tables


T = TypeVar("T")


def _evenly_spaced(entries: list[T], limit: int) -> list[T]:
    """Return at most `limit` entries."""
    # The step is rounded up, so that no more than `limit` entries remain.
    return entries[:: max(1, -(-len(entries) // limit))]


def _histograms(config: DatasetConfig, tables: list[list[dict[str, Any]]]) -> list[tuple[str, list[Bar]]]:
    """Return titles and bars."""
    rows = list(itertools.chain.from_iterable(tables))
    if not rows:
        return []

    sides = [min(row["original_height"], row["original_width"]) for row in rows]
    aspects = [row["original_width"] / row["original_height"] for row in rows]
    histograms = [
        ("Shorter side of the original, pixels", _bars(sides)),
        ("Aspect ratio of the original, width / height", _bars(aspects)),
        ("Share of the area kept by the crop", _bars([_crop_share(row) for row in rows])),
    ]

    clips = [row for row in rows if "frames" in row]
    if clips:
        histograms += [
            ("Length of clips, seconds", _bars([row["frames"] / row["fps"] for row in clips])),
            ("Frames per second of clips", _bars([row["fps"] for row in clips])),
            ("Motion of clips, levels per frame", _bars([row["motion"] for row in clips])),
        ]

    captions = list(itertools.chain.from_iterable(row["captions"] for row in rows))
    for number, kind in enumerate(config.caption_kinds):
        lengths = [len(caption["text"]) for caption in captions if caption["kind"] == number]
        if lengths:
            histograms.append((f"Length of captions, kind {kind}, characters", _bars(lengths)))
    histograms.append(("Captions per image", _bars([len(row["captions"]) for row in rows])))
    return histograms


def _crop_share(row: dict[str, Any]) -> float:
    left, top, right, bottom = row["crop"]
    return (right - left) * (bottom - top) / (row["original_height"] * row["original_width"])


def _bars(values: Sequence[float]) -> list[Bar]:
    """Return a histogram of at most `MAX_BINS` bins; the last one includes the highest 1 %."""
    # A few outliers would squeeze all other values into one bin, so the bins end at the 99th percentile.
    ordered = sorted(values)
    low, high = ordered[0], ordered[max(0, int(len(ordered) * 0.99) - 1)]
    whole = all(isinstance(value, int) for value in values)

    # Bins of whole numbers have whole widths: each then has the same number of values.
    width = max((high - low) / MAX_BINS, 1 if whole else 1e-9)
    if whole:
        width = math.ceil(width)
    counts = Counter(min(MAX_BINS - 1, int((value - low) / width)) for value in values)

    highest = max(counts.values())
    bars = []
    for number in range(max(counts) + 1):
        start = low + number * width
        label = f"{start:.0f}" if whole else f"{start:.2f}"
        bars.append(Bar(label, counts[number], 100 * counts[number] / highest))
    return bars


def _samples(dataset: Store, commits: dict[Part, Commit], kinds: list[str]) -> list[tuple[str, list[Tile]]]:
    """Return pairs of the first part of every bucket."""
    first: dict[str, Commit] = {}
    for part, commit in sorted(commits.items()):
        if commit.rows:
            first.setdefault(part.bucket, commit)

    samples = []
    for bucket, commit in first.items():
        pairs = read_pairs(dataset, commit, kinds)[:MAX_SAMPLES]
        samples.append((bucket, [_pair_tile(pair) for pair in pairs]))
    return samples


def _pair_tile(pair: Pair) -> Tile:
    caption = " / ".join(text for _, text in pair.captions[:2])
    source = _thumbnail(pair.image) if pair.frames == 1 else _contact_sheet(pair)
    return Tile(source, caption[:MAX_CAPTION], f"{pair.key} ({len(pair.captions)} captions)")


def _contact_sheet(pair: Pair) -> str:
    """Return evenly spaced frames of a clip, from the first to the last, as one small data URI."""
    try:
        frames = read_clip(pair)
    except (ImageError, UserError):
        return ""  # damaged, or PyAV is not installed here

    chosen = np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int)

    tiles = []
    for frame in frames[chosen]:
        tile = Image.fromarray(frame)
        tile.thumbnail((THUMBNAIL // 2, THUMBNAIL // 2), Image.Resampling.BICUBIC)
        tiles.append(np.asarray(tile))

    rows = [np.concatenate(tiles[start : start + 2], axis=1) for start in range(0, SHEET_FRAMES, 2)]
    return _data_uri(Image.fromarray(np.concatenate(rows)))


def _thumbnail(data: Media) -> str:
    """Return an image, or the first frame of a video, as a small data URI; empty if it cannot be decoded."""

    try:
        if is_clip(data):
            image = first_frame(data, THUMBNAIL)
        else:
            assert isinstance(data, bytes), "only videos are read in ranges"
            image = decode_image(data, at_least=(THUMBNAIL, THUMBNAIL))
    except (ImageError, UserError):
        return ""  # damaged, or PyAV is not installed here
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    return _data_uri(image)


def _data_uri(image: Image.Image) -> str:
    # Images are part of the page, so that the report is a single file that can be passed on.
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _dropped_samples(
    config: DatasetConfig, dataset: Store, commits: dict[Part, Commit]
) -> list[tuple[str, list[Tile]]]:
    """Return some dropped samples per reason, from the plan and from the parts.

    Images of the plan's are fetched from the source, if they have a place there.
    """
    tiles: dict[str, list[Tile]] = {}
    shown: Counter[str] = Counter()

    files = source_files(dataset)
    sources = OpenSources(config, files)
    # The source still has the images of rows that the plan dropped.
    for file in _evenly_spaced(files, MAX_FILES_READ):
        rows = _choose_rows(dataset, dropped_key(file.number), DROPPED_BY_PLAN, shown)
        images = _fetch_images(sources, file.number, rows)
        for number, row in enumerate(rows):
            tiles.setdefault(row["reason"], []).append(_dropped_tile(row, images.get(number)))

    # The parts keep no image of a row that they dropped, nor its place in the source.
    keys: list[str] = []
    for commit in commits.values():
        keys += [file.key for file in commit.files if posixpath.basename(file.key) == DROPPED_TABLE]
    for key in keys[:MAX_PARTS_READ]:
        for row in _choose_rows(dataset, key, DROPPED_IN_PARTS, shown):
            tiles.setdefault(row["reason"], []).append(_dropped_tile(row, None))
    return sorted(tiles.items(), key=lambda entry: (_position(entry[0]), entry[0]))


def _choose_rows(
    dataset: Store, key: str, schema: pyarrow.Schema, shown: Counter[str]
) -> list[dict[str, Any]]:
    """Return the first rows of a table of dropped rows; `shown` counts them by reason, over all tables."""
    rows = []
    for row in read_object(dataset, key, partial(parse_table, schema=schema), VERIFY).to_pylist():
        if shown[row["reason"]] < MAX_DROPPED_SAMPLES:
            shown[row["reason"]] += 1
            rows.append(row)
    return rows


def _fetch_images(sources: OpenSources, file: int, rows: list[dict[str, Any]]) -> dict[int, Media | None]:
    """Fetch the images of dropped rows from their source file, by number of the row.

    Rows without a place have none.
    """
    # The place of a parquet file's very first row is all zeros too: that row is shown without an image.
    numbers = [number for number, row in enumerate(rows) if row["length"] or row["path"] or row["offset"]]
    if not numbers:
        return {}
    places = [
        Place(rows[number]["offset"], rows[number]["length"], rows[number]["path"]) for number in numbers
    ]
    source, name = sources.open(file)
    return {numbers[position]: data for position, data in source.fetch(name, places)}


def _dropped_tile(row: dict[str, Any], image: Media | None) -> Tile:
    return Tile(_thumbnail(image) if image else "", row["detail"] or row["key"], row["key"])
