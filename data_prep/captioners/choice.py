"""The captioner that a dataset's settings mean, and all that decides its captions."""

from dataclasses import asdict
from typing import Any

from data_prep.captioners.answers import RULES
from data_prep.captioners.captioner import Captioner
from data_prep.model_settings import CaptionsConfig


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
