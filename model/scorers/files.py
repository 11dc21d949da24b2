"""Files of pretrained scorer models: where they are, and how they are identified in a result."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from model.common.errors import UserError, first_line
from model.common.hub import download, fingerprint

_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
_PINNED = r"(?P<name>[\w-][\w.-]*/[\w.-]+)@(?P<commit>[0-9a-f]{40})"
"""`OWNER/NAME@COMMIT`."""


@dataclass(frozen=True)
class ScorerFiles:
    """A scorer's files on this machine."""

    folder: Path
    identity: dict[str, Any]
    """Name, revision (the hub's commit, or a local folder's fingerprint) and library of the model."""


def find_scorer(source: str, option: str) -> ScorerFiles:
    """Find a scorer, and download it first if `source` is a hub name.

    Args:
        source: a local folder, or `OWNER/NAME@COMMIT` on the hub.
        option: the option that named it, for messages.

    Raises:
        UserError: if the folder does not exist, the hub name has no commit, the download fails, or there are
            no safetensors.
    """
    folder = Path(source)
    if folder.is_dir():
        # A local folder has no commit, so its content identifies it.
        name, revision = folder.resolve().name, fingerprint(folder, _find_weights(folder, source, option))
    else:
        pinned = re.fullmatch(_PINNED, source)
        if pinned is None:
            raise UserError(
                f"{option} {source}: no such folder: "
                "give a folder, or OWNER/NAME@COMMIT with the 40-digit commit"
            )
        name, revision = pinned["name"], pinned["commit"]
        folder = download(f"{option} {source}", name, revision, _FILES)
        # A repository with pickles only arrives without weights, which are not among `_FILES`.
        _find_weights(folder, source, option)

    library = f"transformers {transformers.__version__}"

    return ScorerFiles(folder, {"name": name, "revision": revision, "library": library})


def load_pretrained(kind: Any, files: ScorerFiles, **options: Any) -> Any:
    """Load a config, tokenizer, processor or model from a scorer's folder: `kind.from_pretrained`.

    Raises:
        UserError: if the folder holds something else.
    """
    try:
        return kind.from_pretrained(files.folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{files.folder}: no {kind.__name__} can be read from it: {first_line(error)}"
        ) from error


def load_model(
    kind: Any, files: ScorerFiles, device: torch.device, dtype: torch.dtype = torch.float32
) -> Any:
    """Load the model of a scorer's folder, from safetensors only, in evaluation mode.

    Raises:
        UserError: if the folder holds another model, or not all of this model's weights.
    """
    model, info = load_pretrained(kind, files, use_safetensors=True, dtype=dtype, output_loading_info=True)
    # transformers only warns of missing weights, and leaves them random.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{files.folder}: no {kind.__name__}: {len(missing)} weights are missing, "
            f"the first is {missing[0]}"
        )

    return model.to(device).eval().requires_grad_(False)


def _find_weights(folder: Path, source: str, option: str) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"{option} {source}: no safetensors there (pickled weights are never opened): "
            "take a copy that has them"
        )
    return weights


def download_data(source: str, option: str) -> Path:
    """Download a dataset of the hub, or one file or folder of it.

    Args:
        source: `OWNER/NAME@COMMIT` or `OWNER/NAME@COMMIT:PATH`.
        option: the option that named it, for messages.

    Raises:
        UserError: if the name has another form, or the download fails.
    """
    pinned = re.fullmatch(_PINNED + "(?::(?P<path>.+))?", source)
    if pinned is None:
        raise UserError(
            f"{option} {source}: no such file: "
            "give a path, or OWNER/NAME@COMMIT:PATH with the 40-digit commit"
        )
    path = pinned["path"]
    # The path may be a file or a folder.
    files = None if path is None else (path, f"{path}/*")
    root = download(f"{option} {source}", pinned["name"], pinned["commit"], files, dataset=True)

    return root / (path or "")
