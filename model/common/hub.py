"""Files of pretrained models: downloads from the Hugging Face hub, and fingerprints of local files."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from model.common.errors import UserError, first_line

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


def is_commit(revision: str | None) -> bool:
    """True if `revision` is a full commit hash, the only revision that always means the same files."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def download(
    what: str,
    name: str,
    revision: str | None,
    files: Sequence[str] | None = None,
    *,
    ignore: Sequence[str] | None = None,
    dataset: bool = False,
) -> Path:
    """Download files of a repository on the hub, unless they are in the hub's cache.

    Args:
        what: the setting or option that named the repository, for messages.
        name: `OWNER/NAME`.
        revision: commit, branch or tag; None = the default branch.
        files: patterns of the files to download; None = all.
        ignore: patterns of files that are left out.
        dataset: True if it is a dataset's repository, not a model's.

    Returns:
        The local folder.

    Raises:
        UserError: if the repository or revision does not exist, or the hub cannot be reached.
    """
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                repo_type="dataset" if dataset else None,
                allow_patterns=None if files is None else list(files),
                ignore_patterns=None if ignore is None else list(ignore),
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"{what}: cannot be downloaded ({first_line(error)}): "
            "check the name, the revision and the network"
        ) from error


def fingerprint(folder: Path, weights: Sequence[Path]) -> str:
    """Return a hash of a folder's settings and tokenizer, and of 64 samples of each weight file.

    Of a weight file, its size, its header and samples spread over its length count. To read 16 GB at the
    start of every task would cost more than it finds: a fine-tune changes all tensors.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).is_file():
            settings = (folder / name).read_bytes()
            digest.update(json.dumps([name, len(settings)]).encode() + settings)

    for path in weights:
        # The length and name come first, so that two lists of files never give the same bytes.
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            # A safetensors file begins with the length of its JSON header: names, types and shapes.
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header))
            for sample in range(_SAMPLES):
                file.seek(8 + header + (size - 8 - header) * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"sampled-sha256:{digest.hexdigest()}"
