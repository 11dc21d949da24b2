"""Pretrained models that judge pictures: where they come from, and what is written down about them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from model.common.errors import UserError
from model.encoders.language_model import fingerprint

_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]


@dataclass(frozen=True)
class ScorerFiles:
    """A scorer's files on this machine."""

    folder: Path
    identity: dict[str, Any]
    """Name, revision (the hub's commit, or a hash of a local folder's files) and the library that runs it."""


def find_scorer(source: str, option: str) -> ScorerFiles:
    """Find a scorer, downloading it first where `source` is a hub name.

    Args:
        source: a local folder, or `OWNER/NAME@COMMIT` on the hub.
        option: the option that named it, for messages.

    Raises:
        UserError: no such folder, a hub name without its commit, no network, or no safetensors.
    """
    library = f"transformers {transformers.__version__}"
    folder = Path(source)
    if folder.is_dir():
        weights = _weights(folder, source, option)
        return ScorerFiles(folder, {"name": folder.resolve().name, "revision": fingerprint(folder, weights), "library": library})
    found = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)@([0-9a-f]{40})", source)
    if found is None:
        raise UserError(f"{option} {source}: no such folder: give a folder, or OWNER/NAME@COMMIT with the 40-digit commit")
    try:
        folder = Path(snapshot_download(found[1], revision=found[2], allow_patterns=_FILES))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{option} {source}: cannot be downloaded ({reason}): check name, commit and network") from error
    _weights(folder, source, option)
    return ScorerFiles(folder, {"name": found[1], "revision": found[2], "library": library})


def load_pretrained(kind: Any, files: ScorerFiles) -> Any:
    """A config, tokenizer or processor of a scorer's folder: `kind.from_pretrained`.

    Raises:
        UserError: the folder holds something else.
    """
    return _load(kind, files)


def load_model(kind: Any, files: ScorerFiles, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a scorer's folder, from safetensors alone, ready to judge.

    Raises:
        UserError: the folder holds another model, or not all of this one's weights.
    """
    model, info = _load(kind, files, use_safetensors=True, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{files.folder}: no {kind.__name__}: {len(missing)} weights are missing, {missing[0]} the first")
    return model.to(device).eval().requires_grad_(False)


def _load(kind: Any, files: ScorerFiles, **options: Any) -> Any:
    try:
        return kind.from_pretrained(files.folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{files.folder}: no {kind.__name__} can be read from it: {str(error).splitlines()[0]}") from error


def _weights(folder: Path, source: str, option: str) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{option} {source}: no safetensors there (pickled weights are never opened): take a copy that has them")
    return weights


def download_data(source: str, option: str) -> Path:
    """A dataset of the hub, or a file or folder in it: `OWNER/NAME@COMMIT` or `OWNER/NAME@COMMIT:PATH`.

    Raises:
        UserError: the name has another form, or nothing could be downloaded.
    """
    found = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)@([0-9a-f]{40})(?::(.+))?", source)
    if found is None:
        raise UserError(f"{option} {source}: no such file: give a path, or OWNER/NAME@COMMIT:PATH with the 40-digit commit")
    wanted = None if found[3] is None else [found[3], f"{found[3]}/*"]
    try:
        root = Path(snapshot_download(found[1], revision=found[2], repo_type="dataset", allow_patterns=wanted))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{option} {source}: cannot be downloaded ({reason}): check name, commit and network") from error
    return root / (found[3] or "")
