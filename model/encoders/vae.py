"""The frozen VAE: diffusers' AutoencoderKL, read from safetensors only."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from model.common.errors import UserError

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_DECIDES_NUMBERS = (
    "act_fn",
    "block_out_channels",
    "down_block_types",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "mid_block_add_attention",
    "norm_num_groups",
    "use_quant_conv",
)
"""Fields of the VAE's config that change what its encoder computes; others (scaling, decoder, tiling) do not."""


def small_vae() -> Any:
    """A new VAE of the paper's shape, 8x downsampling and 16 channels, small enough to train on a laptop.

    Narrow where the picture is large, since there the time goes; with 1x1 convolutions around the latent, so that its
    channels can be standardised after training without a change to the pictures.
    """
    widths = (16, 32, 64, 64)
    config: dict[str, Any] = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "sample_size": 64,
        "mid_block_add_attention": False,
        "force_upcast": False,
    }
    return AutoencoderKL(**config)


def normalize(mean: Tensor, std: Tensor, noise: Tensor, scaling: float, shift: float) -> Tensor:
    """Sample the posterior and bring it to about zero mean and unit variance, fp32 [B, C, h, w].

    Diffusers' convention: shift first, then scale.
    """
    return (mean.float() + std.float() * noise - shift) * scaling


class VAE:
    """An AutoencoderKL with its latent's normalisation and an identity for the families that it writes."""

    def __init__(self, module: Any, weights_sha256: str) -> None:
        self.module = module
        config: dict[str, Any] = dict(module.config)
        self.channels: int = config["latent_channels"]
        self.downsampling: int = 2 ** (len(config["block_out_channels"]) - 1)
        self.scaling: float = config["scaling_factor"]
        self.shift: float = config["shift_factor"] or 0.0
        self.identity: dict[str, Any] = {
            "vae": type(module).__name__,
            "weights_sha256": weights_sha256,
            **{key: config[key] for key in _DECIDES_NUMBERS},
        }

    @classmethod
    def load(cls, source: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> "VAE":
        """Load the VAE of a local folder or of the hub.

        Args:
            source: a local folder or `<owner>/<name>` on the hub; of a whole pipeline, its `vae` subfolder is taken.
            revision: commit, tag or branch on the hub.
            device: where it runs.
            dtype: precision of its weights.

        Raises:
            UserError: no such VAE, no safetensors, another class, or weights that do not fit the config.
        """
        folder = _find_folder(source, revision)
        try:
            config = json.loads((folder / CONFIG).read_text())
        except ValueError as error:
            raise UserError(f"{folder / CONFIG}: not JSON ({error}): fetch the VAE again") from error
        if config.get("_class_name") != "AutoencoderKL":
            raise UserError(f"{folder} holds a {config.get('_class_name')}, not an AutoencoderKL: name the folder of such a VAE")
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise UserError(f"{folder}: no {WEIGHTS}: save the VAE as one safetensors file (pickled weights are never opened)")
        try:
            module: Any = AutoencoderKL.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype, low_cpu_mem_usage=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: the weights do not fit the config: {error}") from error
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        module.eval().requires_grad_(False).to(device)
        return cls(module, digest)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of the posterior: mean and standard deviation, each fp32 [B, C, h, w]; not normalised.

        Args:
            pixels: [B, 3, H, W] in [-1, 1], sides multiples of `downsampling`.
        """
        posterior = self.module.encode(pixels.to(self.module.device, self.module.dtype), return_dict=False)[0]
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels fp32 [B, 3, H, W] in [-1, 1] of normalised latents [B, C, h, w]."""
        raw = latents.float() / self.scaling + self.shift
        pixels = self.module.decode(raw.to(self.module.device, self.module.dtype), return_dict=False)[0]
        return pixels.float().clamp(-1.0, 1.0)


def _find_folder(source: str, revision: str | None) -> Path:
    """The local folder that holds the VAE's config, downloaded first if `source` is a hub name."""
    if not source:
        raise UserError("no VAE is named: set its folder or hub name")
    root = Path(source)
    if not root.is_dir():
        files = [f"{folder}{name}" for folder in ("", "vae/") for name in (CONFIG, WEIGHTS)]
        try:
            root = Path(snapshot_download(source, revision=revision, allow_patterns=files))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"VAE {source!r} is neither a local folder nor reachable on the hub ({reason})") from error
    for folder in (root / "vae", root):
        if (folder / CONFIG).is_file():
            return folder
    raise UserError(f"{root}: no {CONFIG}: name the folder of a diffusers AutoencoderKL, or of a pipeline with a `vae` in it")
