"""Units of a plan's finish: work that any number of tasks share, each with one object as its result.

A unit is done if and only if its object is in the store. Objects are written by conditional puts and are a
function of the scan tables and the settings only, so units that two tasks do at the same moment are the same
bytes. A task needs no other one: it does its own share first, and then whatever is missing.
"""

import secrets
from collections.abc import Callable, Sequence

from data_prep.dataset.schema import Manifest
from data_prep.plan.listing import FOLDER
from data_prep.store.store import Store
from model.common.progress import Progress
from model.common.share import Share

FINISH = f"{FOLDER}/finish"
"""Folder of the units' objects, which is removed when the plan exists."""


class SupersededError(Exception):
    """Another task has finished the plan meanwhile, so the units' objects are not needed, or are removed."""


def unit_keys(step: str, count: int) -> list[str]:
    """Return the keys of the objects of `count` units of a step."""
    return [f"{FINISH}/{step}/{number:06d}" for number in range(count)]


def make_units(
    dataset: Store, share: Share, step: str, keys: Sequence[str], make: Callable[[int], bytes]
) -> None:
    """Make the objects of a step that are missing, and return when all are there.

    Args:
        dataset: the dataset's store.
        share: the units that this task does first.
        step: the step's name, for the display.
        keys: keys of all units of the step, below one folder.
        make: returns the object of a unit, by its number.

    Raises:
        SupersededError: if the plan exists.
    """
    if not keys:
        return
    folder = keys[0][: len(f"{FINISH}/{step}/")]
    own = set(share.owns(range(len(keys)))) if share.count > 1 else set()
    with Progress(f"plan, {step}", len(keys), "units") as progress:
        while True:
            present = set(dataset.list(folder))
            missing = [number for number, key in enumerate(keys) if key not in present]
            progress.update(len(keys) - len(missing))
            if not missing:
                return
            if dataset.exists(Manifest.KEY):
                raise SupersededError

            todo = [number for number in missing if number in own]
            if not todo:
                # From a random unit on, so that tasks that are here at the same time do different ones.
                start = secrets.randbelow(len(missing))
                todo = missing[start:] + missing[:start]
            for number in todo:
                # Another task works here: look again for what is missing.
                if dataset.exists(keys[number]):
                    break
                dataset.put_new(keys[number], make(number))
                progress.advance()
            else:
                if len(todo) == len(missing):
                    return
