"""Verification of a dataset: all objects that commits and snapshots name, and the records themselves."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow

from data_prep.dataset.mds import Shard
from data_prep.dataset.parts import (
    PLAN_AGAIN,
    PLAN_KEY,
    THREADS,
    committed_parts,
    hash_ids,
    read_commit,
    read_plan_record,
)
from data_prep.dataset.records import hashed, parse_table, read_object
from data_prep.dataset.schema import PAIRS, TABLE, Commit, Family, Part
from data_prep.dataset.snapshot import REPAIR, index_files, snapshot_ids
from data_prep.dataset.snapshot_reader import (
    family_names,
    read_constants,
    read_family,
    read_index,
    read_snapshot,
)
from data_prep.engines import Do, Outcome, Ray, Step, run
from data_prep.store.store import Store, StoredFile
from model.common.errors import UserError
from model.common.share import Share

RAY_TASKS = 64
"""Shares into which a Ray cluster divides the parts. Each lists all of them."""
SNAPSHOTS = "snapshots"
"""Name of the number of snapshots among the sums, which are otherwise the bytes of each kind."""


@dataclass
class Verification:
    """Result of `verify`."""

    parts: Counter[str] = field(default_factory=Counter)
    """Kind -> number of parts that are correct."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Kind -> bytes of the payloads of these parts."""
    snapshots: int = 0
    problems: list[str] = field(default_factory=list)
    """Messages that name the object and the remedy."""
    not_read: str = ""
    """The content that was not checked."""


class VerifyStep(Step):
    """The check of all parts; its units are tasks such as `3/64`, each with a share of the parts."""

    title = "verify"
    noun = "parts"

    def __init__(self, dataset: Store, deep: bool, tasks: int) -> None:
        """Check nothing yet.

        Args:
            dataset: the dataset's store.
            deep: see `verify`.
            tasks: number of units.
        """
        self.units = [f"{task}/{tasks}" for task in range(tasks)]
        self._dataset = dataset
        self._deep = deep

    def missing(self) -> None:
        """Return None: a check leaves nothing in the store."""
        return

    def total(self, units: object) -> None:
        """Return None: each unit lists the parts by itself."""
        return

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Open nothing."""

        def do(units: Sequence[str]) -> Iterator[Outcome]:
            for unit in units:
                yield from _verify_share(self._dataset, self._deep, Share.parse(unit))

        yield do


def verify(dataset: Store, deep: bool = False, share: Share | None = None) -> Verification:
    """Check all commits and snapshots against the objects in the store, and the families against the pairs.

    Args:
        dataset: the dataset's store.
        deep: also read every payload, the families' constants and the plan's tables, and compare hash, rows
            and sample ids; otherwise only presence and size.
        share: check only this share of the parts; None = all. The first share has the records as well.

    Returns:
        Counts of correct parts, and all problems.
    """
    share = share or Share()
    tasks = RAY_TASKS if isinstance(share, Ray) else share.count
    outcome = run(VerifyStep(dataset, deep, tasks), share)

    not_read = "the sources, and the tables of scanned and dropped rows"
    if not deep:
        not_read += "; the contents of files, which --deep reads"
    if share.count > 1:
        not_read += f"; the parts of the other {share.count - 1} tasks"
    sums = outcome.sums
    snapshots = sums.pop(SNAPSHOTS, 0)
    return Verification(outcome.counts, sums, snapshots, outcome.notes, not_read)


def _verify_share(dataset: Store, deep: bool, share: Share) -> Iterator[Outcome]:
    """Check a share of the parts, and with the first one the records.

    Yields the number of correct parts by kind, the bytes of their payloads, and as notes the problems.
    """
    families, problems = _families(dataset, deep and share.index == 0)
    if share.index == 0:
        yield Outcome(notes=problems)
    if deep:
        yield Outcome(notes=_plan_problems(dataset, share))

    existing = {kind: committed_parts(dataset, kind) for kind in [PAIRS, *sorted(families)]}
    # The same parts of all kinds, so that each commit of the pairs is read once.
    own = set(share.owns(sorted(set().union(*existing.values()))))
    sizes = _payload_sizes(dataset, existing, own)
    pairs: dict[Part, Commit] = {}
    for kind, parts in existing.items():

        def check(part: Part, kind: str = kind) -> Commit | str:
            key = f"{dataset.uri}/{part.commit_key(kind)}"
            try:
                commit = read_commit(dataset, kind, part)
                _check_part(dataset, commit, families.get(kind), pairs, sizes)
                if deep:
                    _check_payload(dataset, commit, families.get(kind))
                return commit
            # A result and not an exception: one damaged part must not hide the problems of the others.
            except (UserError, FileNotFoundError) as error:
                # The error of a damaged record names the record and the way out by itself.
                return str(error) if str(error).startswith(key) else f"{key}: {error}: {REPAIR}"

        with ThreadPoolExecutor(8 if deep else THREADS) as pool:
            for result in pool.map(check, sorted(own & parts)):
                if isinstance(result, str):
                    yield Outcome(notes=[result])
                    continue
                bytes = sum(file.bytes for file in result.files)
                yield Outcome(Counter({kind: 1}), Counter({kind: bytes}))
                if kind == PAIRS:
                    # Without its files and counts, of which there may be many.
                    pairs[result.part] = replace(result, files=[], counts={})

    known = set().union(*existing.values())
    for id in snapshot_ids(dataset):
        problems = _snapshot_problems(dataset, id, share, own, known, sizes)
        yield Outcome(sums=Counter({SNAPSHOTS: int(share.index == 0)}), notes=problems)


def _payload_sizes(dataset: Store, existing: dict[str, set[Part]], own: set[Part]) -> dict[str, int]:
    """Return the size of each payload file of some parts by key, from listings: a request per 1,000 files."""
    prefixes = []
    for kind, parts in existing.items():
        root = PAIRS if kind == PAIRS else f"families/{kind}"
        buckets = sorted({part.bucket for part in parts})
        prefixes += [f"{root}/{bucket}/" for bucket in buckets]

    def listed(prefix: str) -> dict[str, int]:
        bucket = prefix.split("/")[-2]
        found = {}
        for entry in dataset.listing(prefix):
            number = entry.key.removeprefix(prefix).partition("/")[0]
            if number.isdecimal() and Part(bucket, int(number)) in own:
                found[entry.key] = entry.bytes
        return found

    sizes: dict[str, int] = {}
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(listed, prefixes):
            sizes |= found
    return sizes


def _families(dataset: Store, deep: bool) -> tuple[dict[str, Family], list[str]]:
    """Return the families that can be read, and the problems of the others and of constants."""
    families: dict[str, Family] = {}
    problems = []
    for name in family_names(dataset):
        try:
            families[name] = read_family(dataset, name)
            if deep:
                read_constants(dataset, families[name])
        except UserError as error:
            problems.append(str(error))
    return families, problems


def _plan_problems(dataset: Store, share: Share) -> list[str]:
    """Return what is wrong with a share of the plan's tables."""
    # Plans that earlier versions made have it too; a dataset that was put together by hand may not.
    if not dataset.exists(PLAN_KEY):
        return []
    problems = []
    try:
        for key, xxh64 in share.owns(list(read_plan_record(dataset)["manifest"].items())):
            try:
                read_object(dataset, key, hashed(xxh64), PLAN_AGAIN)
            except FileNotFoundError:
                problems.append(f"{dataset.uri}/{key}: missing: {PLAN_AGAIN}")
    except UserError as error:
        problems.append(str(error))
    return problems


def _check_part(
    dataset: Store, commit: Commit, family: Family | None, pairs: dict[Part, Commit], sizes: dict[str, int]
) -> None:
    """Check one part against its commit.

    Args:
        dataset: the dataset's store.
        commit: the part's commit.
        family: its family; None for the pairs.
        pairs: commits of the pairs that were read already.
        sizes: bytes of the payload files by key.

    Raises:
        UserError: if they differ.
    """
    if family:
        own = pairs.get(commit.part) or read_commit(dataset, PAIRS, commit.part)
        if (own.rows, own.ids_xxh64) != (commit.rows, commit.ids_xxh64):
            raise UserError("other samples than the pairs of this part")
        if family.hash != commit.family_hash:
            raise UserError(f"not made by family `{family.name}` as registered")

    for file in commit.files:
        # Of a part that was committed after the listing, the size is asked for.
        size = sizes[file.key] if file.key in sizes else dataset.size(file.key)
        if size != file.bytes:
            raise UserError(f"{file.key} does not have {file.bytes:,} bytes")


def _check_payload(dataset: Store, commit: Commit, family: Family | None) -> None:
    """Download a part, which checks its hashes, and compare its sample ids with the commit.

    Raises:
        UserError: if they differ.
    """
    ids: list[int] = []
    with TemporaryDirectory(prefix="li-dit-") as folder:
        for file in commit.files:
            path = Path(folder) / file.key.rpartition("/")[2]
            dataset.fetch(file, path)
            if family:
                ids = [row["id"] for row in Shard(path, family.columns)]
            elif path.name == TABLE:
                ids = parse_table(path.read_bytes(), columns=["id"])["id"].to_pylist()

    if len(ids) != commit.rows or hash_ids(ids) != commit.ids_xxh64:
        raise UserError("the payload holds other samples than the commit says")


def _snapshot_problems(
    dataset: Store, id: str, share: Share, own: set[Part], known: set[Part], sizes: dict[str, int]
) -> list[str]:
    """Return what is wrong with a snapshot.

    Args:
        dataset: the dataset's store.
        id: the snapshot.
        share: the share to check.
        own: its parts.
        known: all parts that have a commit; the first share has those that have none.
        sizes: bytes of the payload files of `own`, as far as they are known.
    """
    try:
        snapshot = read_snapshot(dataset, id)
        indexes = {bucket: read_index(dataset, snapshot, bucket) for bucket in snapshot.buckets}
    except UserError as error:
        return [str(error)] if share.index == 0 else []

    files = []
    for bucket, index in indexes.items():
        parts = [Part(bucket, number) for number in index["number"].to_pylist()]
        chosen = [part in own or (part not in known and share.index == 0) for part in parts]
        files += index_files(index.filter(pyarrow.array(chosen)), snapshot.families)

    def is_intact(file: StoredFile) -> bool:
        if file.key in sizes:
            return sizes[file.key] == file.bytes
        try:
            return dataset.size(file.key) == file.bytes
        except FileNotFoundError:
            return False

    problems = []
    with ThreadPoolExecutor(THREADS) as pool:
        for file, intact in zip(files, pool.map(is_intact, files), strict=True):
            if not intact:
                problems.append(
                    f"{dataset.uri}/{file.key}: missing or of another size, but snapshot {id} needs it: "
                    "take another snapshot"
                )
    return problems
