"""A small autoencoder whose latents are those of another VAE, its teacher.

Three levels of the Haar transform take pixels to an eighth of their sides without any weights; all
convolutions are narrow and run there. `pipeline.train_vae --kind wavelet` trains it so that its encoder and
its decoder can each take the place of the teacher's. After the tiny VAE of ElasticDiT (arXiv 2605.15684) and
LiteVAE (arXiv 2405.14477); ours is simpler than LiteVAE, which also has features at higher resolutions.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.common.errors import UserError
from model.common.settings import bounded, settings_from
from model.encoders.latent_spaces import (
    CONFIG,
    WEIGHTS,
    LatentSpace,
    find_folder,
    read_config,
    register_latent_space,
)

WAVELET = "WaveletAutoencoder"
LEVELS = 3
"""Levels of the transform: 8 pixels per latent position."""


def haar(x: Tensor) -> Tensor:
    """Return one level of the Haar transform: [B, C, H, W] -> [B, 4 C, H / 2, W / 2], of equal energy."""
    sums, differences = x[..., 0::2] + x[..., 1::2], x[..., 0::2] - x[..., 1::2]

    bands = []
    for half in (sums, differences):
        bands += [half[..., 0::2, :] + half[..., 1::2, :], half[..., 0::2, :] - half[..., 1::2, :]]
    return torch.cat(bands, dim=1) / 2


def inverse_haar(x: Tensor) -> Tensor:
    """Undo `haar`: [B, 4 C, h, w] -> [B, C, 2 h, 2 w]."""
    low, vertical, horizontal, diagonal = x.chunk(4, dim=1)
    columns = []
    for even, odd in ((low + horizontal, vertical + diagonal), (low - horizontal, vertical - diagonal)):
        columns.append(torch.stack([even + odd, even - odd], dim=-2).flatten(-3, -2))  # [B, C, 2 h, w]
    return torch.stack(columns, dim=-1).flatten(-2) / 2


@dataclass
class WaveletConfig:
    """Sizes of the autoencoder, and whose latents it has."""

    width: int = bounded(96, 8, 4_096)
    """Channels of the convolutions."""
    blocks: int = bounded(3, 1, 100)
    """Residual blocks of the decoder."""
    encoder_blocks: int = bounded(0, 0, 100)
    """Residual blocks of the encoder; 0 = as many as the decoder has."""
    channels: int = bounded(16, 1, 65_536)
    """Latent channels."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """Mean and std of the teacher's latents."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """Identity of the teacher."""


@dataclass
class Moments:
    """Mean and logarithm of the variance of latents, [B, C, h, w] each."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation."""
        return (0.5 * self.logvar).exp()


class ResidualBlock(nn.Module):
    """Two convolutions with a norm before them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's change to x [B, D, h, w]."""
        return x + self.outer(F.silu(self.inner(self.norm(x))))


class WaveletAutoencoder(nn.Module):
    """Encoder and decoder, called as diffusers' autoencoders are."""

    def __init__(self, config: WaveletConfig) -> None:
        super().__init__()
        self.config = config

        bands = 3 * 4**LEVELS
        encoder_blocks = config.encoder_blocks or config.blocks
        self.encoder = _convolutions(bands, config.width, encoder_blocks, 2 * config.channels)
        self.decoder = _convolutions(config.channels, config.width, config.blocks, bands)

    def encode(self, pixels: Tensor, return_dict: bool = False) -> tuple[Moments]:
        """Encode pixels [B, 3, H, W] in [-1, 1]."""
        x = pixels

        for _ in range(LEVELS):
            x = haar(x)

        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return (Moments(mean, logvar.clamp(-30.0, 20.0)),)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Decode latents [B, C, h, w] to pixels [B, 3, H, W]."""
        x = self.decoder(latents)

        for _ in range(LEVELS):
            x = inverse_haar(x)

        return (x,)

    def save_pretrained(self, folder: Path, safe_serialization: bool = True) -> None:
        """Write config and weights, named as diffusers names them; always as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)

        config = {"_class_name": WAVELET, **asdict(self.config)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)


def _convolutions(inputs: int, width: int, blocks: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1),
        *(ResidualBlock(width) for _ in range(blocks)),
        nn.GroupNorm(8, width),
        nn.SiLU(),
        nn.Conv2d(width, outputs, 3, padding=1),
    )


def load_weights(module: nn.Module, folder: Path) -> str:
    """Load an autoencoder's weights from its folder, and return the sha256 of their file.

    Raises:
        UserError: if they cannot be read, or do not fit.
    """
    try:
        module.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: the weights do not fit the config: {error}") from error
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


@register_latent_space(WAVELET)
class WaveletSpace(LatentSpace):
    """The latent space of a `WaveletAutoencoder`, which is its teacher's."""

    def __init__(self, module: WaveletAutoencoder, weights_sha256: str) -> None:
        """Wrap an autoencoder.

        Args:
            module: the autoencoder.
            weights_sha256: hash of its file of weights, for its identity.
        """
        config = module.config

        # The order in memory that convolutions are fastest in.
        self.module = module.to(memory_format=torch.channels_last)
        self.channels, self.downsampling = config.channels, 2**LEVELS
        self.statistics: Mapping[str, Any] = config.statistics
        self.identity = {
            "vae": WAVELET,
            "weights_sha256": weights_sha256,
            "width": config.width,
            "blocks": config.blocks,
            "teacher": config.teacher,
        }
        if config.encoder_blocks:
            self.identity["encoder_blocks"] = config.encoder_blocks

    @classmethod
    def load(cls, source: str, revision: str | None, device: torch.device) -> "WaveletSpace":
        """Load the autoencoder of a local folder or of the hub, in fp32; arguments as in `LatentSpace.load`.

        Raises:
            UserError: if there is none, or its files do not fit.
        """
        folder = find_folder(source, revision)
        config = read_config(folder)
        if config.pop("_class_name", None) != WAVELET:
            raise UserError(f"{folder} holds no {WAVELET}: name the folder of one")

        module = WaveletAutoencoder(settings_from(WaveletConfig, config, str(folder / CONFIG)))
        digest = load_weights(module, folder)
        return cls(module.eval().requires_grad_(False).to(device), digest)

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        return next(self.module.parameters()).device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of the latents, as the teacher would."""
        moments = self.module.encode(pixels.to(self.device).float())[0]
        return moments.mean, moments.std

    @torch.no_grad()
    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode raw latents [B, C, h, w], its own or the teacher's."""
        return self.module.decode(latents.float())[0].clamp(-1.0, 1.0)
