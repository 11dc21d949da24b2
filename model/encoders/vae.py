"""The frozen VAE: diffusers' AutoencoderKL, read from safetensors only."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from model.common.errors import UserError
from model.encoders.latent_spaces import (
    AUTOENCODER_KL,
    WEIGHTS,
    LatentSpace,
    find_folder,
    read_config,
    register_latent_space,
)

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
"""Fields of the config that change what the encoder computes; others (scaling, decoder, tiling) do not."""


def small_vae() -> Any:
    """Build a new VAE of the paper's shape (8x downsampling, 16 channels) that a laptop can train.

    It is narrow at high resolution, where the time is spent. It has 1x1 convolutions next to the latent,
    so that the channels can be standardized after training without a change to the images.
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


def load_module(kind: Any, folder: Path, device: torch.device) -> tuple[Any, str]:
    """Load a diffusers autoencoder from safetensors only, in fp32 and frozen.

    Args:
        kind: its class.
        folder: with its config and weights.
        device: where it runs.

    Returns:
        The autoencoder, and the SHA-256 of its file of weights.

    Raises:
        UserError: if the folder holds another class, there is no safetensors file, or the weights do not fit
            the config.
    """
    found = read_config(folder).get("_class_name")
    # diffusers 0.39 loads the class that is called, even if the config names another one.
    if found != kind.__name__:
        raise UserError(f"{folder} holds a {found}, not an {kind.__name__}: name the folder of such a VAE")

    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(
            f"{folder}: no {WEIGHTS}: save the VAE as one safetensors file (pickled weights are never opened)"
        )
    options: dict[str, Any] = {
        # Without it, diffusers may fall back to a pickle.
        "use_safetensors": True,
        # Latents are stored once for all runs, so they are computed at full precision.
        "torch_dtype": torch.float32,
        "low_cpu_mem_usage": False,
    }
    try:
        module: Any = kind.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: the weights do not fit the config: {error}") from error

    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return module.eval().requires_grad_(False).to(device), digest


def to_bf16(module: Any) -> None:
    """Cast a module to bf16, the weights of its convolutions with channels last."""
    module.to(torch.bfloat16)
    orders = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.ndim in orders:
            parameter.data = parameter.data.to(memory_format=orders[parameter.ndim])


@register_latent_space(AUTOENCODER_KL)
class VAE(LatentSpace):
    """The latent space of an AutoencoderKL."""

    def __init__(self, module: Any, weights_sha256: str) -> None:
        """Wrap a diffusers AutoencoderKL.

        Args:
            module: the AutoencoderKL.
            weights_sha256: hash of its file of weights, for its identity.
        """
        config: dict[str, Any] = dict(module.config)
        self.module = module
        self.channels = config["latent_channels"]
        # Every block of the encoder but the last halves the sides.
        self.downsampling = 2 ** (len(config["block_out_channels"]) - 1)
        self.statistics = {
            "scaling_factor": config["scaling_factor"],
            # None for VAEs without a shift, such as those of Stable Diffusion 1 and 2.
            "shift_factor": config["shift_factor"] or 0.0,
        }
        self.identity = {
            "vae": type(module).__name__,
            "weights_sha256": weights_sha256,
            **{key: config[key] for key in _DECIDES_NUMBERS},
        }

    @classmethod
    def load(cls, source: str, revision: str | None, device: torch.device) -> "VAE":
        """Load the VAE of a local folder or of the hub, in fp32.

        Args:
            source: as in `find_folder`.
            revision: commit, tag or branch on the hub.
            device: where it runs.

        Raises:
            UserError: if there is no such VAE or no safetensors file, if it is of another class, or if the
                weights do not fit the config.
        """
        folder = find_folder(source, revision)
        return cls(*load_module(AutoencoderKL, folder, device))

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        return self.module.device

    def encode_in_bf16(self) -> None:
        """Compute in bf16 from now on; the identity then says so."""
        to_bf16(self.module)
        self.identity = {**self.identity, "dtype": "bf16"}

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of the posterior, each fp32 [B, C, h, w], of pixels [B, 3, H, W] in [-1, 1]."""
        posterior = self.module.encode(pixels.to(self.device, self.module.dtype), return_dict=False)[0]
        # The moments and not a sample: training takes another sample in every epoch.
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode raw latents [B, C, h, w], on the VAE's device, to pixels fp32 [B, 3, H, W] in [-1, 1]."""
        # Not moved to `device`: while diffusers offloads the module, that is where its weights wait.
        pixels = self.module.decode(latents.to(self.module.dtype), return_dict=False)[0]
        return pixels.float().clamp(-1.0, 1.0)
