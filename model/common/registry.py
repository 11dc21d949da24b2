"""A table of named implementations, to which another file adds its own."""

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Generic, TypeVar

from model.common.errors import UserError

T = TypeVar("T")
Added = TypeVar("Added")


class Registry(Generic[T]):
    """Implementations by name, such as the block types that `model.block` may name."""

    def __init__(self, setting: str) -> None:
        """Make an empty table.

        Args:
            setting: the setting that takes a name of the table; error messages begin with it.
        """
        self.setting = setting
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Added], Added]:
        """Return a decorator that adds a class or function under `name`.

        Raises:
            ValueError: if the name is taken.
        """

        def add(entry: Added) -> Added:
            # Replaced without an error, a name in a checkpoint's settings would mean whichever module was
            # imported last.
            if name in self._entries:
                raise ValueError(f"{self.setting}={name} is registered already, by {self._entries[name]}")
            self._entries[name] = entry  # type: ignore[assignment]
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """Return the entry of a name.

        Raises:
            UserError: if there is none; the message names the nearest.
        """
        if name not in self._entries:
            raise UserError(unknown(self.setting, name, list(self._entries)))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order in which they were registered."""
        return iter(self._entries)

    def remove(self, name: str) -> None:
        """Take an entry out again."""
        del self._entries[name]


def unknown(setting: str, value: str, known: list[str]) -> str:
    """Return the message for a setting whose value is not a known name."""
    nearest = get_close_matches(value, known, n=1)
    hint = f"did you mean `{nearest[0]}`? " if nearest else ""
    return f"{setting}={value} is unknown: {hint}known are {', '.join(sorted(known))}"
