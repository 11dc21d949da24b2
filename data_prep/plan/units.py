"""Units of a plan's finish: work that any number of tasks share, each with one object as its result.

A unit is done if and only if its object is in the store. Objects are written by conditional puts and are a
function of the scan tables and the settings only, so units that two tasks do at the same moment are the same
bytes. A task needs no other one: it does its own share first, and then whatever is missing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from data_prep.dataset.schema import Manifest
from data_prep.engines import Do, Outcome, Step, run
from data_prep.plan.listing import FOLDER
from data_prep.store.store import Store
from model.common.share import Share

FINISH = f"{FOLDER}/finish"
"""Folder of the units' objects, which is removed when the plan exists."""


class SupersededError(Exception):
    """Another task has finished the plan meanwhile, so the units' objects are not needed, or are removed."""


def unit_keys(step: str, count: int) -> list[str]:
    """Return the keys of the objects of `count` units of a step."""
    return [f"{FINISH}/{step}/{number:06d}" for number in range(count)]


class PlanStep(Step):
    """A step of the finish."""

    helps = True

    def __init__(self, dataset: Store, step: str, keys: Sequence[str], make: Callable[[int], bytes]) -> None:
        """Do nothing yet.

        Args:
            dataset: the dataset's store.
            step: the step's name.
            keys: keys of all units of the step, below one folder.
            make: returns the object of a unit, by its number.
        """
        self.title = f"plan, {step}"
        self.units = keys
        self._dataset = dataset
        self._folder = keys[0][: len(f"{FINISH}/{step}/")]
        self._make = make

    def missing(self) -> list[str]:
        """Return the keys of the units that are missing.

        Raises:
            SupersededError: if there are any, and the plan exists.
        """
        present = set(self._dataset.list(self._folder))
        missing = [key for key in self.units if key not in present]
        if missing and self._dataset.exists(Manifest.KEY):
            raise SupersededError
        return missing

    def exists(self, unit: str) -> bool:
        """True if the unit's object is there."""
        return self._dataset.exists(unit)

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Open nothing: what the units need is read when the first one does."""
        numbers = {key: number for number, key in enumerate(self.units)}

        def do(keys: Sequence[str]) -> Iterator[Outcome]:
            for key in keys:
                self._dataset.put_new(key, self._make(numbers[key]))
                yield Outcome(Counter({"": 1}))

        yield do


def make_units(
    dataset: Store, share: Share, step: str, keys: Sequence[str], make: Callable[[int], bytes]
) -> None:
    """Make the objects of a step that are missing, and return when all are there.

    Args:
        dataset: the dataset's store.
        share: the units that this task does first.
        step: the step's name.
        keys: keys of all units of the step, below one folder.
        make: returns the object of a unit, by its number.

    Raises:
        SupersededError: if the plan exists.
    """
    if keys:
        run(PlanStep(dataset, step, keys, make), share)
