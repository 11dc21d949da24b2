"""Encode the committed pairs into a family, part by part: read ahead, encode, commit behind."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_prep.dataset.mds import write_mds
from data_prep.dataset.parts import commit_part, committed_parts, read_commit, read_plan
from data_prep.dataset.rollups import write_committed
from data_prep.dataset.schema import PAIRS, Commit, Family, Part
from data_prep.dataset.snapshot_reader import read_family
from data_prep.pairs.pairs import Pair, read_pairs
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.files import naming_full_disk
from model.common.progress import Progress
from model.common.share import Share

SHARD = "shard.00000.mds"

EncodedRows = tuple[list[dict[str, Any]], dict[str, float]]
"""A row per sample, with the family's columns; and counts for the part's commit."""


def encode_family(
    dataset: Store, family: Family, encode_part: Callable[[list[Pair]], EncodedRows], share: Share
) -> None:
    """Encode the parts of a share that the family lacks; running it again encodes only what is missing.

    While one part is encoded, the next one is read and the previous one is written and committed. Three parts
    are in memory.

    Args:
        dataset: the dataset's store.
        family: the family, as returned by `register_family`.
        encode_part: maps the pairs of a part to their rows, in the same order, and to counts.
        share: this task's share of the parts.

    Raises:
        UserError: if the family is registered as something else, or parts of the share have no pairs yet (all
            others are encoded before).
    """
    if read_family(dataset, family.name) != family:
        raise UserError(f"{dataset.uri}: family `{family.name}` changed while it was encoded: start again")
    plan = read_plan(dataset)
    parts = sorted(share.owns(plan.parts))
    ready, done = committed_parts(dataset, PAIRS), committed_parts(dataset, family.name)
    missing = [part for part in parts if part in ready and part not in done]

    def read(part: Part) -> list[Pair]:
        return read_pairs(dataset, read_commit(dataset, PAIRS, part), plan.caption_kinds)

    # One thread reads and one commits, while this one encodes.
    with (
        TemporaryDirectory(prefix="li-dit-") as folder,
        ThreadPoolExecutor(2) as pool,
        Progress(family.name, len(parts), "parts") as progress,
    ):
        progress.advance(sum(part in done for part in parts), "there before")
        commit: Future[Commit] | None = None
        made: list[Future[Commit]] = []
        for part, pairs in _read_ahead(pool, read, missing):
            # A part that lost all of its pairs is committed as well, so that the family becomes complete.
            rows, counts = encode_part(pairs) if pairs else ([], {})
            # wait for the previous commit first, so that no more than three parts are in memory
            _finish(commit, progress)
            ids = [pair.id for pair in pairs]
            commit = pool.submit(_commit_rows, dataset, family, part, ids, rows, counts, Path(folder))
            made.append(commit)
        _finish(commit, progress)
    write_committed(dataset, family.name, [commit.result() for commit in made])

    # All other parts are encoded by now: another run has only these left to do.
    without_pairs = [part for part in parts if part not in ready]
    if without_pairs:
        raise UserError(
            f"{dataset.uri}: {len(without_pairs)} of {len(parts)} parts of this task have no pairs yet "
            f"({without_pairs[0]} is the first): finish `python -m data_prep pairs`, then run this again"
        )


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[Part], list[Pair]], parts: list[Part]
) -> Iterator[tuple[Part, list[Pair]]]:
    """Yield each part with its pairs, while a thread reads the next part."""
    ahead = pool.submit(read, parts[0]) if parts else None
    for part, following in zip_longest(parts, parts[1:]):
        assert ahead is not None
        pairs = ahead.result()
        ahead = pool.submit(read, following) if following else None
        yield part, pairs


def _finish(commit: "Future[Commit] | None", progress: Progress) -> None:
    """Wait for the commit of a part, if there is one."""
    if commit:
        # Raises the error of the upload, if there was one.
        commit.result()
        progress.advance(1, "encoded")


def _commit_rows(
    dataset: Store,
    family: Family,
    part: Part,
    ids: list[int],
    rows: list[dict[str, Any]],
    counts: dict[str, float],
    folder: Path,
) -> Commit:
    """Write and commit the rows of a part; a part without rows has no file."""
    # A shard with other rows than its commit names would pair images with the wrong latents or captions.
    if [row["id"] for row in rows] != ids:
        raise ValueError(f"{family.name} {part}: the encoder returned other rows than it was given")

    files = {SHARD: folder / SHARD} if rows else {}
    for path in files.values():
        with naming_full_disk(path):
            write_mds(path, family.columns, rows)

    commit = commit_part(dataset, family.name, part, files, ids, counts, family.hash)
    # The next part writes its shard under the same name.
    for path in files.values():
        path.unlink()
    return commit
