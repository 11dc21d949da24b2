"""Row counts of a dataset by source file: rows read = rows committed + rows dropped, or the command fails."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data_prep.dataset.parts import THREADS, committed, read_commit, read_plan, read_plan_record
from data_prep.dataset.rollups import write_committed
from data_prep.dataset.schema import PAIRS, Commit, Manifest, Part
from data_prep.store.store import Store
from model.common.errors import UserError


@dataclass(frozen=True)
class FileAccount:
    """Row counts of one source file, by what happened to the rows."""

    label: str
    read: int
    dropped_by_plan: int
    planned: int
    written: int
    dropped_in_parts: int

    @property
    def pending(self) -> int:
        """Rows of parts that no task has made yet."""
        return self.planned - self.written - self.dropped_in_parts


def written_count(number: int) -> str:
    """Name, in a part's commit, of the count of its rows from source file `number`."""
    return f"file {number} written"


def dropped_count(number: int) -> str:
    """Name, in a part's commit, of the count of dropped rows from source file `number`."""
    # Not `dropped ...`: counts with that start are by reason, and the report adds them up.
    return f"file {number} dropped"


def check_parts(
    dataset: Store, manifest: Manifest, parts: Iterable[Part], made: Iterable[Commit] = ()
) -> None:
    """Check that each of some committed parts has all of its planned rows, written or dropped.

    A task checks the parts of its own share, and `snapshot` and `report` all of them (`account`): if each of
    many tasks read all commits, their requests would grow with the square of the dataset.

    Args:
        dataset: the dataset's store.
        manifest: the plan.
        parts: the parts.
        made: commits of some of them that this process wrote, or found when another task was first; the
            others are read.

    Raises:
        UserError: if rows were lost.
    """
    known = {commit.part: commit for commit in made}
    commits = []
    with ThreadPoolExecutor(THREADS) as pool:
        for commit in pool.map(lambda part: known.get(part) or read_commit(dataset, PAIRS, part), parts):
            commits.append(commit)
            planned = manifest.buckets[commit.bucket][commit.number]
            written = dropped = 0
            for name, count in commit.counts.items():
                if name.startswith("file "):
                    written += int(count) if name.endswith(" written") else 0
                    dropped += int(count) if name.endswith(" dropped") else 0
            if written != commit.rows or written + dropped != planned:
                raise UserError(
                    f"{dataset.uri}: the counts of pairs {commit.part} do not add up: {planned} planned, "
                    f"{commit.rows} committed, {written} written, {dropped} dropped: "
                    "delete its commit and run `pairs` again"
                )
    write_committed(dataset, PAIRS, commits)


class Totals:
    """Rows of all parts by source file and by reason, added up while commits are read."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """By the names that they have in commits."""

    def take(self, commit: Commit) -> Commit:
        """Add the counts of a commit, and return it without them."""
        for name, count in commit.counts.items():
            if name.startswith(("file ", "dropped ")):
                self.counts[name] += int(count)
        return without_counts(commit)


def without_counts(commit: Commit) -> Commit:
    """Return a commit without its counts, which are most of it."""
    # By hand, since `replace` takes four times as long, and there may be a million.
    return Commit(
        sys.intern(commit.kind),
        sys.intern(commit.bucket),
        commit.number,
        commit.rows,
        commit.attempt,
        commit.ids_xxh64,
        commit.files,
        sys.intern(commit.family_hash),
    )


def account(
    dataset: Store, commits: Mapping[Part, Commit] | None = None, totals: Totals | None = None
) -> list[FileAccount]:
    """Return the accounts of all source files.

    Args:
        dataset: the dataset's store.
        commits: all commits of the pairs; None = read them.
        totals: the sums of their counts, if the commits have none any more.

    Raises:
        UserError: if they do not add up: a file has more rows in parts than were planned, or, with all parts
            committed, fewer.
    """
    if commits is None:
        commits = committed(dataset, PAIRS)
    if totals is None:
        totals = Totals()
        for commit in commits.values():
            totals.take(commit)
    complete = set(commits) >= set(read_plan(dataset).parts)

    accounts = []
    for file in read_plan_record(dataset)["files"]:
        account = FileAccount(
            label=file["label"],
            read=file["rows"],
            dropped_by_plan=sum(file["dropped"].values()),
            planned=file["kept"],
            written=totals.counts[written_count(file["number"])],
            dropped_in_parts=totals.counts[dropped_count(file["number"])],
        )

        # Until all parts exist, rows may be pending, but never fewer than none.
        lost = account.read != account.dropped_by_plan + account.planned
        if lost or account.pending < 0 or (complete and account.pending):
            raise UserError(
                f"{dataset.uri}: the counts of source file {account.label} do not add up: "
                f"{account.read} rows read, {account.dropped_by_plan} dropped by the plan, "
                f"{account.planned} planned, {account.written} written, "
                f"{account.dropped_in_parts} dropped in parts: "
                "run `verify --deep`, then prepare the dataset again under another name"
            )
        accounts.append(account)
    return accounts
