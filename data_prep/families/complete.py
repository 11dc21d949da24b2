"""Look for something to encode before a model is loaded, which takes a minute for a large LLM."""

from collections.abc import Mapping
from typing import Any

from data_prep.config import LatentsConfig, captions_of
from data_prep.dataset.parts import committed_parts, read_plan
from data_prep.dataset.schema import CAPTIONS
from data_prep.dataset.snapshot_reader import family_names, read_family
from data_prep.store.store import Store
from model.common.share import Share
from model.config import TextConfig


def latents_settings(latents: LatentsConfig) -> dict[str, Any] | None:
    """Return the settings of a latents family that its record must have; None if they are not comparable."""
    return None if latents.space else {"vae": latents.vae, "revision": latents.revision}


def text_settings(dataset: Store, text: TextConfig) -> dict[str, Any] | None:
    """Return the settings of a text family that its record must have; None if they are not comparable."""
    read = captions_of(text)
    if not read:
        return {**text.identity, CAPTIONS: None}
    names = family_names(dataset)
    if not all(name in names for name in read):
        return None  # the caller's full check says which one is missing
    hashes = {name: read_family(dataset, name).hash for name in read}
    return {**text.identity, CAPTIONS: hashes}


def already_encoded(dataset: Store, name: str, settings: Mapping[str, Any] | None, share: Share) -> bool:
    """True if a family has all parts of a share.

    Args:
        dataset: the dataset's store.
        name: the family.
        settings: what its record must have in `identity` or `info`; with other settings, or None, the answer
            is False, and the caller's full check finds the difference.
        share: the parts.
    """
    if settings is None or name not in family_names(dataset):
        return False
    family = read_family(dataset, name)
    record = {**family.info, **family.identity}
    if any(record.get(key) != value for key, value in settings.items()):
        return False
    done = committed_parts(dataset, name)
    return all(part in done for part in share.owns(read_plan(dataset).parts))
