"""Inception-v3 with the weights of the original FID, as torch-fidelity ports it."""

# torch-fidelity is an optional dependency.
# pyright: reportMissingImports=false

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

from model.common.errors import UserError, first_line


class Inception:
    """Computes features of images."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Load torch-fidelity's network in fp32.

        Args:
            path: torch-fidelity's weights file (.pth), or the same tensors as .safetensors.
            device: where it runs.

        Raises:
            UserError: if torch-fidelity is not installed, or the file is missing or contains something else.
        """
        try:
            import torch_fidelity
            import torch_fidelity.feature_extractor_inceptionv3 as port
        except ImportError as error:
            raise UserError(
                "FID needs torch-fidelity: pip install -c constraints.txt -e '.[eval]'"
            ) from error

        weights = _read(path)
        # torch-fidelity unpickles the file that it opens, so it gets one that was written here.
        with tempfile.NamedTemporaryFile(suffix=".pth") as copy:
            torch.save(weights, copy.name)
            try:
                self.network: Any = port.FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], copy.name
                ).to(device)
            except RuntimeError as error:
                raise UserError(
                    f"--inception {path}: not torch-fidelity's Inception: {first_line(error)}"
                ) from error

        self.device = device
        self.identity = {
            "name": "inception-v3-compat",
            "revision": f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}",
            "library": f"torch-fidelity {torch_fidelity.__version__}",
            "dtype": "float32",
        }

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return features fp32 [B, 2048] of images of any sizes.

        Each image is resized to 299 x 299 as in TensorFlow 1.
        """
        # One by one, since sizes differ.
        features: list[Tensor] = []
        for image in images:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
            features.append(self.network(pixels.to(self.device))[0])
        return torch.cat(features)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"--inception {path}: no such file: give torch-fidelity's Inception weights, .pth or .safetensors"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    # Both readers raise many kinds of errors for a file of another format.
    except Exception as error:
        raise UserError(f"--inception {path}: cannot be read: {first_line(error)}") from error
