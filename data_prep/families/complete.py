"""Look for something to encode before a model is loaded, which takes a minute for a large LLM.

A model in a local folder may have other weights now than its family was made with. They are compared by the
hashes that the family's record has, of files alone, so neither torch nor the model is needed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.config import LatentsConfig, captions_of
from data_prep.dataset.parts import committed_parts, read_plan
from data_prep.dataset.schema import CAPTIONS, MEAN_ALONE
from data_prep.dataset.snapshot_reader import family_names, read_family
from data_prep.store.store import Store
from model.common.hub import fingerprint
from model.common.share import Share
from model.config import TextConfig
from model.encoders.gguf import file_sha256, find_gguf
from model.encoders.vae_files import CONFIG, WEIGHTS, find_in


class Expected(NamedTuple):
    """Values that the record of a family has, in `identity` or `info`, if it is that of the settings."""

    always: Mapping[str, Any]
    if_there: Mapping[str, Any]
    """Values that are compared only if the record has them too."""


def latents_settings(latents: LatentsConfig) -> Expected | None:
    """Return what the record of a latents family must have; None if that is not known without the model."""
    if latents.space:
        return None
    always: dict[str, Any] = {
        "revision": latents.revision,
        "moments": MEAN_ALONE if latents.moments == "mean" else "bf16",
        # Not in the identity of a VAE that is not asked for it.
        "tiling": True if latents.tiling else None,
        "dtype": None if latents.dtype == "fp32" else latents.dtype,
    }
    if_there: dict[str, Any] = {}
    folder = find_in(Path(latents.vae)) if latents.vae and Path(latents.vae).is_dir() else None
    if folder is not None and (folder / WEIGHTS).is_file():
        always["weights_sha256"] = file_sha256(folder / WEIGHTS)
        try:
            config = json.loads((folder / CONFIG).read_text())
        except ValueError:
            return None  # loading it says what is wrong
        if_there = {key: value for key, value in config.items() if value is not None}
    return Expected({"vae": latents.vae, **always}, if_there)


def text_settings(dataset: Store, text: TextConfig) -> Expected | None:
    """Return what the record of a text family must have; None if that is not known without the model."""
    always: dict[str, Any] = {**text.identity, "quantisation": text.quantisation, CAPTIONS: None}
    read = captions_of(text)
    if read:
        names = family_names(dataset)
        if not all(name in names for name in read):
            return None  # the caller's full check says which one is missing
        always[CAPTIONS] = {name: read_family(dataset, name).hash for name in read}

    folder = Path(text.llm)
    if folder.is_dir():
        always["weights"] = fingerprint(folder, sorted(folder.glob("*.safetensors")))
    elif folder.is_file() and (path := find_gguf(text.llm)) is not None:
        always["weights"] = f"sha256:{file_sha256(path)}"
    return Expected(always, {})


def already_encoded(dataset: Store, name: str, expected: Expected | None, share: Share) -> bool:
    """True if a family has all parts of a share.

    Args:
        dataset: the dataset's store.
        name: the family.
        expected: what its record must have; with anything else, or None, the answer is False, and the
            caller's full check finds the difference.
        share: the parts.
    """
    if expected is None or name not in family_names(dataset):
        return False
    family = read_family(dataset, name)
    # `vae` is the folder in `info`, and the class of the autoencoder in `identity`.
    record = {**family.identity, **family.info}
    if any(record.get(key) != value for key, value in expected.always.items()):
        return False
    if any(key in record and record[key] != value for key, value in expected.if_there.items()):
        return False
    done = committed_parts(dataset, name)
    return all(part in done for part in share.owns(read_plan(dataset).parts))
