"""Inception-v3 with the weights of the original FID, as torch-fidelity ports it."""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from model.common.errors import UserError


class Inception:
    """Features of pictures."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Load torch-fidelity's network in fp32.

        Args:
            path: torch-fidelity's weights file (.pth), or the same tensors as .safetensors.
            device: where it runs.

        Raises:
            UserError: torch-fidelity is not installed, or the file is missing or holds something else.
        """
        try:
            import torch_fidelity  # pyright: ignore[reportMissingImports]
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise UserError("FID needs torch-fidelity: pip install -c constraints.txt -e '.[eval]'") from error
        weights = _read(path)
        with tempfile.NamedTemporaryFile(suffix=".pth") as copy:  # torch-fidelity unpickles what it opens: only what we wrote
            torch.save(weights, copy.name)
            try:
                self.network: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], copy.name).to(device)
            except RuntimeError as error:
                raise UserError(f"--inception {path}: not torch-fidelity's Inception: {str(error).splitlines()[0]}") from error
        self.device = device
        self.identity = {
            "name": "inception-v3-compat",
            "revision": f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}",
            "library": f"torch-fidelity {torch_fidelity.__version__}",
            "dtype": "float32",
        }

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """fp32 [B, 2048] of pictures of any sizes; each is resized to 299 x 299 as TensorFlow 1 did."""
        pixels = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] for image in images]
        return torch.cat([self.network(each.to(self.device))[0] for each in pixels])


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"--inception {path}: no such file: give torch-fidelity's Inception weights, .pth or .safetensors")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"--inception {path}: cannot be read: {str(error).splitlines()[0]}") from error
