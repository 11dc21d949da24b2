"""The interface of captioners, and the one that the settings mean."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from data_prep.captioners.answers import RULES
from data_prep.model_settings import CaptionsConfig


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


def captioner_identity(captions: CaptionsConfig) -> dict[str, Any]:
    """Return all that decides the captions. An endpoint's address is not in it, since servers move.

    Raises:
        UserError: if the model's folder does not exist, or it cannot be downloaded.
    """
    identity: dict[str, Any] = {
        "prompts": [asdict(prompt) for prompt in captions.prompts],
        "temperature": captions.temperature,
        "top_p": captions.top_p,
        "seed": captions.seed,
        "max_letters": captions.max_letters,
        "refusals": list(captions.refusals),
        "rules": RULES,
    }
    if captions.endpoint:
        return {**identity, "model": captions.model, "revision": captions.revision, "library": "endpoint"}

    from data_prep.captioners.in_process import find_model

    files = find_model(captions).identity
    # Without the library's version: an update in the middle of a dataset would make another family.
    return {
        **identity,
        "model": files["name"],
        "revision": files["revision"],
        "library": "transformers",
        "dtype": captions.dtype,
        "template": captions.template,
    }


def open_captioner(captions: CaptionsConfig) -> Captioner:
    """Load the model, or open the endpoint.

    Raises:
        UserError: if there is no such model, or the endpoint's address or key is missing or wrong.
    """
    if captions.endpoint:
        from data_prep.captioners.endpoint import EndpointCaptioner

        return EndpointCaptioner(captions)

    from data_prep.captioners.in_process import InProcessCaptioner

    return InProcessCaptioner(captions)
