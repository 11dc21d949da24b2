"""The interface of captioners."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Question(NamedTuple):
    """One image and one prompt."""

    image: bytes
    """The file (JPEG, PNG or WebP)."""
    prompt: str
    max_tokens: int
    seed: int
    """Seed of the answer's random numbers, below 2^63."""


class Answer(NamedTuple):
    """An answer, or the reason why there is none."""

    text: str = ""
    reason: str = ""
    is_complete: bool = True
    """False if it was cut at the maximum number of tokens."""
    prompt_tokens: int = 0
    tokens: int = 0
    requests: int = 1
    """Requests that it took; more than one if some failed."""


class Captioner(Protocol):
    """Answers questions about images. Several threads may ask at the same time."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answers, in the order of the questions.

        Raises:
            UserError: if the model or the endpoint does not work at all.
        """
        ...

    def close(self) -> None:
        """End all work; threads that still ask get an error."""
        ...
