"""A small causal autoencoder of clips: 4 frames and 8 x 8 pixels per position of its latents.

Three levels of the Haar transform take each frame to an eighth of its sides, and a transform of four frames
takes each group of them to one, without any weights; all convolutions are narrow and run there. The first
frame is a group by itself, so an image is a clip of one frame. Nothing looks at later frames: neither the
convolutions, which are padded before the first frame alone, nor the norms, each of one position.
`pipeline.train_vae --kind video` trains it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
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
from model.encoders.wavelet import LEVELS, Moments, haar, inverse_haar, load_weights

VIDEO_WAVELET = "VideoWaveletAutoencoder"
GROUP = 4
"""Frames per position of the latents in time, after the first frame."""
SIDE = 2**LEVELS
"""Pixels per position of the latents in height and width."""
BANDS = 3 * 4**LEVELS
"""Channels of a frame after the Haar transform."""

# Rows are orthonormal; the first is the mean of the frames, up to a factor.
_OVER_FRAMES = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, -1, 1), (1, -1, 1, -1))


@dataclass
class VideoWaveletConfig:
    """Sizes of the autoencoder, and what its latents are."""

    width: int = bounded(96, 8, 4_096)
    """Channels of the convolutions."""
    blocks: int = bounded(3, 1, 100)
    """Residual blocks of the encoder, and of the decoder."""
    channels: int = bounded(16, 1, 65_536)
    """Latent channels."""
    latents_mean: list[float] = field(default_factory=list)
    """Mean of each channel of the latents on the training data."""
    latents_std: list[float] = field(default_factory=list)
    """Standard deviation of each channel."""


class CausalConvolution(nn.Conv3d):
    """Convolution over [B, C, T, h, w] that reads no later frame."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the input; before the first frame and beyond the borders there are zeros."""
        time, height, width = self.kernel_size
        sides = (width // 2, width // 2, height // 2, height // 2)
        return super().forward(F.pad(input, (*sides, time - 1, 0)))


class PositionNorm(nn.Module):
    """RMS norm over the channels of each position, with a learned gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [B, C, T, h, w]."""
        return F.rms_norm(x.movedim(1, -1), self.gain.shape, self.gain, eps=1e-6).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Two convolutions, one inside each frame and one over frames too, with a norm before them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = PositionNorm(width)
        self.inner = CausalConvolution(width, width, (1, 3, 3))
        self.outer = CausalConvolution(width, width, (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's change to x [B, D, T, h, w]."""
        return x + self.outer(F.silu(self.inner(self.norm(x))))


class VideoWaveletAutoencoder(nn.Module):
    """Encoder and decoder, called as diffusers' autoencoders are."""

    def __init__(self, config: VideoWaveletConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _convolutions(GROUP * BANDS, config.width, config.blocks, 2 * config.channels)
        self.decoder = _convolutions(config.channels, config.width, config.blocks, GROUP * BANDS)

    def encode(self, pixels: Tensor, return_dict: bool = False) -> tuple[Moments]:
        """Encode pixels [B, 3, T, H, W] in [-1, 1], where T - 1 is a multiple of 4."""
        mean, logvar = self.encoder(split_bands(pixels)).chunk(2, dim=1)
        return (Moments(mean, logvar.clamp(-30.0, 20.0)),)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Decode latents [B, C, t, h, w] to pixels [B, 3, 1 + 4 (t - 1), H, W]."""
        return (join_bands(self.decoder(latents)),)

    def save_pretrained(self, folder: Path, safe_serialization: bool = True) -> None:
        """Write config and weights, named as diffusers names them; always as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)

        config = {"_class_name": VIDEO_WAVELET, **asdict(self.config)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)


def split_bands(pixels: Tensor) -> Tensor:
    """Transform pixels [B, 3, T, H, W] to bands [B, 768, 1 + (T - 1) / 4, H / 8, W / 8], of equal energy but
    for the first frame, which counts four times."""
    # The first group is the first frame four times.
    frames = torch.cat([pixels[:, :, :1].expand(-1, -1, GROUP - 1, -1, -1), pixels], dim=2)
    x = frames.movedim(2, 1)  # [B, 4 t, 3, H, W]
    clip = x.shape[:2]

    x = x.flatten(0, 1)
    for _ in range(LEVELS):
        x = haar(x)  # at last [B 4 t, 192, h, w]

    x = x.unflatten(0, clip).unflatten(1, (-1, GROUP))  # [B, t, 4, 192, h, w]
    x = torch.einsum("gf,btfchw->btgchw", _over_frames(x), x)
    return x.flatten(2, 3).movedim(1, 2)


def join_bands(bands: Tensor) -> Tensor:
    """Undo `split_bands`: [B, 768, t, h, w] -> [B, 3, 1 + 4 (t - 1), H, W]."""
    x = bands.movedim(2, 1).unflatten(2, (GROUP, -1))  # [B, t, 4, 192, h, w]
    x = torch.einsum("gf,btgchw->btfchw", _over_frames(x), x)
    clip = x.shape[:3]

    x = x.flatten(0, 2)
    for _ in range(LEVELS):
        x = inverse_haar(x)  # at last [B t 4, 3, H, W]

    x = x.unflatten(0, clip)  # [B, t, 4, 3, H, W]
    first, others = x[:, :1].mean(dim=2), x[:, 1:].flatten(1, 2)  # [B, 1, 3, H, W], [B, 4 (t - 1), 3, H, W]
    return torch.cat([first, others], dim=1).movedim(1, 2)


def _over_frames(like: Tensor) -> Tensor:
    return torch.tensor(_OVER_FRAMES, dtype=like.dtype, device=like.device) / 2


def _convolutions(inputs: int, width: int, blocks: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        CausalConvolution(inputs, width, (1, 3, 3)),
        *(ResidualBlock(width) for _ in range(blocks)),
        PositionNorm(width),
        nn.SiLU(),
        CausalConvolution(width, outputs, (1, 3, 3)),
    )


@register_latent_space(VIDEO_WAVELET)
class VideoWaveletSpace(LatentSpace):
    """The latent space of a `VideoWaveletAutoencoder`."""

    downsampling = (GROUP, SIDE, SIDE)

    def __init__(self, module: VideoWaveletAutoencoder, weights_sha256: str) -> None:
        """Wrap an autoencoder.

        Args:
            module: the autoencoder.
            weights_sha256: hash of its file of weights, for its identity.
        """
        config = module.config
        self.module, self.channels = module, config.channels
        self.statistics: Mapping[str, Any] = {
            "latents_mean": config.latents_mean,
            "latents_std": config.latents_std,
        }
        self.identity = {
            "vae": VIDEO_WAVELET,
            "weights_sha256": weights_sha256,
            "width": config.width,
            "blocks": config.blocks,
        }

    @classmethod
    def load(cls, source: str, revision: str | None, device: torch.device) -> "VideoWaveletSpace":
        """Load the autoencoder of a local folder or of the hub, in fp32; arguments as in `LatentSpace.load`.

        Raises:
            UserError: if there is none, or its files do not fit.
        """
        folder = find_folder(source, revision)
        config = read_config(folder)
        if config.pop("_class_name", None) != VIDEO_WAVELET:
            raise UserError(f"{folder} holds no {VIDEO_WAVELET}: name the folder of one")

        sizes = settings_from(VideoWaveletConfig, config, str(folder / CONFIG))
        if {len(sizes.latents_mean), len(sizes.latents_std)} != {sizes.channels}:
            raise UserError(
                f"{folder / CONFIG}: latents_mean and latents_std need {sizes.channels} numbers each"
            )
        module = VideoWaveletAutoencoder(sizes)
        digest = load_weights(module, folder)
        return cls(module.eval().requires_grad_(False).to(device), digest)

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        return next(self.module.parameters()).device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of the latents, each fp32 [B, C, t, h, w], of pixels [B, 3, T, H, W]."""
        moments = self.module.encode(pixels.to(self.device).float())[0]
        return moments.mean, moments.std

    @torch.no_grad()
    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode raw latents [B, C, t, h, w] to pixels fp32 [B, 3, T, H, W] in [-1, 1]."""
        return self.module.decode(latents.float())[0].clamp(-1.0, 1.0)
