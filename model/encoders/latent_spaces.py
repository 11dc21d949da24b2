"""Latent spaces: how images or clips become the latents that a network is trained on, and back.

A space is usually a VAE (`model/encoders/vae.py`), but it can be any map from images or clips to vectors on a
grid. It is found by its name in a registry: another space is a class with `register_latent_space`, without a
change elsewhere.
"""

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from model.common.errors import UserError
from model.common.hub import download
from model.common.registry import Registry
from model.encoders.vae_files import CONFIG, WEIGHTS, find_in

AUTOENCODER_KL = "AutoencoderKL"
"""Name of the space of latents families that record none: it was the only one when they were written."""

Statistics = Mapping[str, Any]
"""Statistics of raw latents, in one of two forms: `scaling_factor` and `shift_factor`, one number each, as in
diffusers' AutoencoderKL; or `latents_mean` and `latents_std`, each one number or one per channel.
Other keys are ignored, so the info of a latents family can be given as it is."""


def normalize_latents(latents: Tensor, statistics: Statistics) -> Tensor:
    """Bring raw latents to about zero mean and unit variance.

    Args:
        latents: [B, C, ...] with any number of axes after the channels.
        statistics: of the latent space.

    Returns:
        Normalized latents of the same shape.
    """
    if "latents_std" in statistics:
        mean, std = _per_channel(latents, statistics)
        return (latents - mean) / std

    # Old runs resume bit for bit only with these operations in this order, on Python's numbers.
    return (latents - statistics["shift_factor"]) * statistics["scaling_factor"]


def denormalize_latents(latents: Tensor, statistics: Statistics) -> Tensor:
    """Undo `normalize_latents`, for latents [B, C, ...]."""
    if "latents_std" in statistics:
        mean, std = _per_channel(latents, statistics)
        return latents * std + mean

    return latents / statistics["scaling_factor"] + statistics["shift_factor"]


def _per_channel(latents: Tensor, statistics: Statistics) -> list[Tensor]:
    """Return mean and std, each [C, 1, ...] or [1, 1, ...] so that it broadcasts over latents [B, C, ...]."""
    tensors = []
    for key in ("latents_mean", "latents_std"):
        values = torch.as_tensor(statistics[key], dtype=latents.dtype, device=latents.device)
        if values.numel() not in (1, latents.shape[1]):
            raise ValueError(f"{key} has {values.numel()} numbers for latents of {latents.shape[1]} channels")
        tensors.append(values.view(-1, *[1] * (latents.ndim - 2)))

    return tensors


def downsampling_per_axis(downsampling: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return the downsampling of each axis.

    Args:
        downsampling: of a space or in a family's info: one number for all axes, or one per axis.
        axes: number of axes, such as 2 for images.

    Raises:
        UserError: if the space has another number of axes.
    """
    factors = (downsampling,) * axes if isinstance(downsampling, int) else tuple(downsampling)
    if len(factors) != axes:
        raise UserError(
            f"a latent space with downsampling {list(factors)} cannot encode data of {axes} axes: "
            "use another latent space"
        )
    return factors


def encodes_clips(downsampling: int | Sequence[int]) -> bool:
    """True if a space of this downsampling has latents with a time axis, [C, T, h, w]; its images are clips
    of one frame."""
    return not isinstance(downsampling, int) and len(downsampling) == 3


def side_downsampling(downsampling: int | Sequence[int]) -> tuple[int, int]:
    """Return the downsampling in height and width, of a space of images or of clips."""
    height, width = downsampling_per_axis(downsampling, axes=3 if encodes_clips(downsampling) else 2)[-2:]
    return height, width


def latent_frames(downsampling: Sequence[int], frames: int) -> int:
    """Return the frames of a clip's latents: the first frame is encoded by itself, then groups of frames.

    Args:
        downsampling: of the space: three numbers, the first in time.
        frames: of the clip.

    Raises:
        UserError: if the frames after the first do not divide into groups.
    """
    group = downsampling[0]
    groups, left = divmod(frames - 1, group)
    if frames < 1 or left:
        raise UserError(
            f"{frames} frames: this latent space encodes a first frame and groups of {group}: choose a "
            f"multiple of {group} and 1 more, such as {max(groups, 1) * group + 1}"
        )
    return 1 + groups


def latent_sizes(
    downsampling: int | Sequence[int], height: int, width: int, frames: int | None = None
) -> tuple[int, ...]:
    """Return the positions of latents along each axis: (h, w), or (T, h, w) of a clip.

    Args:
        downsampling: of the space: one number, one in height and width, or one in time, height and width.
        height: of the images, in pixels.
        width: of the images, in pixels.
        frames: of the clip; of a space without downsampling in time, of its latents. None = images.

    Raises:
        UserError: if the space has another number of axes, or the frames do not divide.
    """
    if encodes_clips(downsampling):
        time, down_height, down_width = downsampling_per_axis(downsampling, axes=3)
        clip = (latent_frames((time, down_height, down_width), frames or 1),)
        return *clip, height // down_height, width // down_width

    down_height, down_width = downsampling_per_axis(downsampling, axes=2)
    clip = () if frames is None else (frames,)
    return *clip, height // down_height, width // down_width


def same_latents(identity: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if two identities are those of spaces with the same latents: equal, or one the other's teacher, or
    with the same teacher.

    Args:
        identity: of a latent space.
        other: of a latent space or of a latents family, which has further keys.
    """
    own, theirs = identity.get("teacher", identity), other.get("teacher", other)
    return all(theirs.get(key) == value for key, value in own.items())


class LatentSpace(ABC):
    """A map from images or clips to latents and back, with all that the rest of the code has to know about
    it.

    One with three numbers for its downsampling encodes clips: pixels are then [B, 3, T, H, W] and latents
    [B, C, t, h, w], with 1 + (T - 1) / `downsampling[0]` frames of latents, and an image is a clip of one
    frame.
    """

    name: ClassVar[str] = ""
    """Its name in `LATENT_SPACES`."""

    identity: dict[str, Any]
    """All that decides the numbers that `encode` returns, as values that JSON has."""
    channels: int
    """Number of latent channels, C."""
    downsampling: int | tuple[int, ...]
    """Pixels per latent position: one number for all axes, or one per axis, such as (4, 8, 8) for video."""
    statistics: Statistics
    """Mean and std of the latents that `encode` returns, in one of the two forms of `Statistics`."""

    @classmethod
    @abstractmethod
    def load(cls, source: str, revision: str | None, device: torch.device) -> Self:
        """Load the space.

        Args:
            source: where its files are; `vae` of the dataset's YAML.
            revision: commit, tag or branch on the hub.
            device: where it runs.

        Raises:
            UserError: if it cannot be loaded from `source`.
        """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device that it runs on."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            pixels: [B, 3, H, W] in [-1, 1]; the sides are multiples of `downsampling`.

        Returns:
            Mean and std of the raw latents, each fp32 [B, C, h, w]; std is zero if the map is deterministic.
        """

    @abstractmethod
    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode raw latents fp32 [B, C, h, w] to pixels fp32 [B, 3, H, W] in [-1, 1]."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents [B, C, h, w] to pixels fp32 [B, 3, H, W] in [-1, 1]."""
        return self.decode_raw(denormalize_latents(latents.float(), self.statistics))

    @property
    def encodes_clips(self) -> bool:
        """True if its latents have a time axis."""
        return encodes_clips(self.downsampling)

    def tile_encoding(self) -> None:
        """Encode large inputs in overlapping tiles from now on, which needs less memory and changes the
        latents a little: `identity` then says so.

        Raises:
            UserError: if the space has no tiles.
        """
        raise UserError(f"the latent space {self.name} has no tiles: leave latents.tiling out")

    def encode_in_bf16(self) -> None:
        """Compute in bf16 from now on, with channels last in memory, which a GPU's convolutions take two to
        three times less time for: `identity` then says so.

        Raises:
            UserError: if the space has no network that would gain by it.
        """
        raise UserError(f"the latent space {self.name} computes in fp32: leave latents.dtype out")


LATENT_SPACES: Registry[type[LatentSpace]] = Registry("latents.space")
"""Name -> latent space. One that reads diffusers folders is named as `_class_name` in their config.json."""

_BUILT_IN = (
    "model.encoders.pixels",
    "model.encoders.pixel_clips",
    "model.encoders.vae",
    "model.encoders.wavelet",
    "model.encoders.video_vae",
    "model.encoders.video_wavelet",
)
"""Modules that register spaces; imported when one is needed, since diffusers takes seconds to import."""

_Space = TypeVar("_Space", bound=type[LatentSpace])


def register_latent_space(name: str) -> Callable[[_Space], _Space]:
    """Return a class decorator that adds a latent space to the registry, and gives it its name.

    Raises:
        ValueError: if another class has this name.
    """

    def register(space: _Space) -> _Space:
        space.name = name
        return LATENT_SPACES.register(name)(space)

    return register


def find_latent_space(name: str) -> type[LatentSpace]:
    """Return the latent space of a name.

    Raises:
        UserError: if none is registered under it.
    """
    if name not in LATENT_SPACES:
        for module in _BUILT_IN:
            importlib.import_module(module)
    return LATENT_SPACES[name]


def load_latent_space(source: str, revision: str | None, device: torch.device, name: str = "") -> LatentSpace:
    """Load a latent space.

    Args:
        source: a local folder or `<owner>/<name>` on the hub, or whatever else the space's own `load` takes.
        revision: commit, tag or branch on the hub.
        device: where it runs.
        name: its name in the registry; empty = the class that the folder's config.json names.

    Raises:
        UserError: if no such space is registered, or it cannot be loaded.
    """
    if name:
        return find_latent_space(name).load(source, revision, device)

    folder = find_folder(source, revision)
    name = str(read_config(folder).get("_class_name"))
    try:
        space = find_latent_space(name)
    except UserError as error:
        raise UserError(
            f"{folder} holds a {name}, not an {AUTOENCODER_KL} or other latent space ({error}): "
            "name the folder of one"
        ) from error

    # The folder has been downloaded, so the revision has done its work.
    return space.load(str(folder), None, device)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a diffusers folder's config.json.

    Raises:
        UserError: if it is not JSON.
    """
    try:
        return json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: not JSON ({error}): fetch the VAE again") from error


def find_folder(source: str, revision: str | None) -> Path:
    """Return the local folder of a diffusers VAE, downloaded first if `source` is a hub name.

    Args:
        source: a local folder or `<owner>/<name>` on the hub. Of a pipeline, the subfolder `vae` is taken.
        revision: commit, tag or branch on the hub.

    Raises:
        UserError: if there is no such folder, or no config in it.
    """
    if not source:
        raise UserError("no VAE is named: set its folder or hub name")

    root = Path(source)
    if not root.is_dir():
        # The repository may be that of a VAE or of a whole pipeline, of which the rest would be many GB.
        files = [f"{folder}{name}" for folder in ("", "vae/") for name in (CONFIG, WEIGHTS)]
        root = download(f"VAE {source!r} is not a local folder", source, revision, files)

    folder = find_in(root)
    if folder is not None:
        return folder
    raise UserError(
        f"{root}: no {CONFIG}: name the folder of a diffusers AutoencoderKL, "
        "or of a pipeline with a `vae` subfolder"
    )
