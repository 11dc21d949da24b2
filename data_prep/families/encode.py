"""Encoding the committed pairs into a family, part by part: reading ahead, encoding, committing behind."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_prep.dataset.mds import write_mds
from data_prep.dataset.parts import commit_part, committed_parts, read_commit, read_plan
from data_prep.dataset.schema import PAIRS, Commit, Family, Part
from data_prep.dataset.snapshot_reader import read_family
from data_prep.pairs.pairs import Pair, read_pairs
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.files import naming_full_disk
from model.common.progress import Progress
from model.common.share import Share

SHARD = "shard.00000.mds"

Encoded = tuple[list[dict[str, Any]], dict[str, float]]


def encode_family(dataset: Store, family: Family, encode_part: Callable[[list[Pair]], Encoded], share: Share) -> None:
    """Encode the parts of a share that the family lacks; running it again does only what is missing.

    While one part is encoded, the next is read and the one before is written and committed: three parts are in memory.

    Args:
        dataset: the dataset's store.
        family: the family, as `register_family` returned it.
        encode_part: pairs of a part -> a row for each, in the same order, with the family's columns; and counts.
        share: this task's share of the parts.

    Raises:
        UserError: the family is registered as something else, or parts of the share have no pairs yet (all others are done).
    """
    if read_family(dataset, family.name) != family:
        raise UserError(f"{dataset.uri}: family `{family.name}` changed while it was encoded: start again")
    plan = read_plan(dataset)
    mine = sorted(share.owns(plan.parts))
    ready, done = committed_parts(dataset, PAIRS), committed_parts(dataset, family.name)
    todo = [part for part in mine if part in ready and part not in done]
    with (
        TemporaryDirectory(prefix="li-dit-") as folder,
        ThreadPoolExecutor(2) as pool,
        Progress(family.name, len(mine), "parts") as progress,
    ):
        progress.advance(sum(part in done for part in mine), "there before")
        work = _Work(dataset, family, plan.caption_kinds, Path(folder))
        ahead = pool.submit(work.read, todo[0]) if todo else None
        behind: Future[Commit] | None = None
        for part, following in zip_longest(todo, todo[1:]):
            assert ahead is not None
            pairs = ahead.result()
            ahead = pool.submit(work.read, following) if following else None
            rows, counts = encode_part(pairs) if pairs else ([], {})
            if behind:
                behind.result()
                progress.advance(1, "encoded")
            behind = pool.submit(work.commit, part, [pair.id for pair in pairs], rows, counts)
        if behind:
            behind.result()
            progress.advance(1, "encoded")
    if missing := [part for part in mine if part not in ready]:
        raise UserError(
            f"{dataset.uri}: {len(missing)} of {len(mine)} parts of this task have no pairs yet ({missing[0]} is the first): "
            "finish `python -m data_prep pairs`, then run this again"
        )


class _Work:
    """What runs beside the encoder."""

    def __init__(self, dataset: Store, family: Family, caption_kinds: list[str], folder: Path) -> None:
        self.dataset, self.family, self.caption_kinds, self.folder = dataset, family, caption_kinds, folder

    def read(self, part: Part) -> list[Pair]:
        commit = read_commit(self.dataset, PAIRS, part)
        return read_pairs(self.dataset, commit, self.caption_kinds) if commit.rows else []

    def commit(self, part: Part, ids: list[int], rows: list[dict[str, Any]], counts: dict[str, float]) -> Commit:
        if [row["id"] for row in rows] != ids:
            raise ValueError(f"{self.family.name} {part}: the encoder returned other rows than it was given")
        files = {}
        if rows:
            files[SHARD] = self.folder / SHARD
            with naming_full_disk(files[SHARD]):
                write_mds(files[SHARD], self.family.columns, rows)
        commit = commit_part(self.dataset, self.family.name, part, files, ids, counts, self.family.hash)
        for path in files.values():
            path.unlink()
        return commit
