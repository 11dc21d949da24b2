"""Division of work among the tasks of a Slurm array."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from model.common.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """The work of one of `count` array tasks: the `index`-th of `count` equal runs of neighboring items.

    It needs no lock, so nothing can wait for one; the commit protocol makes an overlap harmless.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(
                f"task {self.index} of {self.count}: tasks are numbered from 0 to one below their number"
            )

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Read `I/N`.

        Raises:
            UserError: if the text has another form.
        """
        if not re.fullmatch(r"\d+/\d+", text):
            raise UserError(f"task `{text}`: write I/N, for instance 0/64")
        index, count = map(int, text.split("/"))
        return cls(index, count)

    @classmethod
    def from_environment(cls) -> "Share":
        """Return the share of this Slurm array task; outside an array, everything.

        A sparse array (`--array=3,17`, to repeat some tasks of 64) does not show how many tasks share the
        work: then `LI_DIT_TASKS=64` has to say so.

        Raises:
            UserError: if the array is sparse and `LI_DIT_TASKS` is not set, or does not fit.
        """
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        if task is None:
            return cls()
        if tasks := os.environ.get("LI_DIT_TASKS"):
            return cls(int(task), int(tasks))

        # An array may be numbered from any number on.
        count, low, high = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("COUNT", "MIN", "MAX"))
        if high - low + 1 != count:
            raise UserError(
                f"array of {count} tasks between {low} and {high}: "
                "set LI_DIT_TASKS to the number of tasks that share the work"
            )
        return cls(int(task) - low, count)

    def owns(self, items: Sequence[Item]) -> list[Item]:
        """Return this task's items."""
        # Cut in proportion, so that the sizes differ by at most one and every item has one owner, without any
        # communication.
        return list(
            items[len(items) * self.index // self.count : len(items) * (self.index + 1) // self.count]
        )

    @staticmethod
    def owner(item: int, items: int, count: int) -> int:
        """Return which of `count` tasks has item number `item` of `items`."""
        # The smallest index with `item < items * (index + 1) // count`, see `owns`.
        return (count * (item + 1) - 1) // items
