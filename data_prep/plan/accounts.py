"""The accounts of a dataset: by source file, rows read = committed + dropped, or the command fails."""

from collections import Counter
from dataclasses import dataclass

from data_prep.dataset.parts import committed, read_plan, read_plan_record
from data_prep.dataset.schema import PAIRS
from data_prep.store.store import Store
from model.common.errors import UserError


@dataclass(frozen=True)
class FileAccount:
    """What became of the rows of one source file."""

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
    """Name of the count of a part's rows from source file `number`, in the part's commit."""
    return f"file {number} written"


def dropped_count(number: int) -> str:
    """Name of the count of rows of source file `number` that were dropped while the part was made."""
    return f"file {number} dropped"


def account(dataset: Store) -> list[FileAccount]:
    """The accounts of all source files.

    Raises:
        UserError: they do not add up: a file has more rows in parts than were planned, or, with all parts there, fewer.
    """
    commits = committed(dataset, PAIRS)
    totals: Counter[str] = Counter()
    for commit in commits.values():
        totals.update({name: int(count) for name, count in commit.counts.items()})
    complete = set(commits) >= set(read_plan(dataset).parts)
    accounts = []
    for file in read_plan_record(dataset)["files"]:
        number, dropped = file["number"], sum(file["dropped"].values())
        written, lost = totals[written_count(number)], totals[dropped_count(number)]
        one = FileAccount(file["label"], file["rows"], dropped, file["kept"], written, lost)
        if one.read != dropped + one.planned or one.pending < 0 or (complete and one.pending):
            raise UserError(
                f"{dataset.uri}: the counts of source file {one.label} do not add up: {one.read} rows read, {dropped} dropped by "
                f"the plan, {one.planned} planned, {written} written, {lost} dropped in parts: run `verify --deep`, then prepare "
                "the dataset anew under another name"
            )
        accounts.append(one)
    return accounts
