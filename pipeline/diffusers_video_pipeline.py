"""LI-DiT on clips as a diffusers pipeline: `LIDiTVideoPipeline.from_pretrained(folder)`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from model.encoders.latent_spaces import LatentSpace, find_latent_space
from pipeline.diffusers_pipeline import FORMAT, LIDiTModel, LIDiTPipeline, LIDiTText
from pipeline.inference.call import whole_number
from pipeline.inference.clips import to_clips
from pipeline.inference.images import to_images


@dataclass
class LIDiTVideoOutput(BaseOutput):
    """The clips of a call."""

    frames: Any
    """`pil`: a list of images per clip; `np`: [B, T, H, W, 3] in [0, 1]; `pt`: [B, T, 3, H, W] in [0, 1];
    `latent`: normalized latents [B, C, t, h, w]."""


class LIDiTVideoPipeline(LIDiTPipeline):
    """The pipeline of a network of clips; the call is that of images, and has `num_frames`."""

    vae_classes: ClassVar[tuple[str, ...]] = (
        "AutoencoderKLHunyuanVideo",
        "AutoencoderKLHunyuanVideo15",
        "AutoencoderKLWan",
        "AutoencoderKLLTXVideo",
        "AutoencoderKLCogVideoX",
    )

    def __init__(
        self,
        transformer: LIDiTModel,
        scheduler: Any,
        vae: Any,
        text: LIDiTText,
        height: int = 256,
        width: int = 256,
        steps: int = 30,
        guidance: float = 4.0,
        format: int = FORMAT,
        objective: str = "",
        patch_times: Mapping[str, Any] | None = None,
        solver: str = "",
        adaptive: Mapping[str, Any] | None = None,
        frames: int = 17,
        fps: float = 8.0,
    ) -> None:
        """Put the parts together; arguments as those of `LIDiTPipeline`.

        Args:
            transformer: the network.
            scheduler: of the kind that the network was trained for.
            vae: a video VAE of diffusers.
            text: reads the prompts.
            height: default of a call, as the next three.
            width: default.
            steps: default.
            guidance: default.
            format: version of the exported folder.
            objective: what the network was trained to predict.
            patch_times: fields of `PatchTimesConfig` in training.
            solver: default of a call.
            adaptive: fields of `AdaptiveConfig`.
            frames: default of `num_frames`.
            fps: frames per second of files of its clips; the call does not read it.
        """
        super().__init__(
            transformer, scheduler, vae, text, height, width, steps, guidance, format, objective, patch_times,
            solver, adaptive,
        )  # fmt: skip
        self.register_to_config(frames=frames, fps=fps)
        # `encode_prompt` may be called before the pipeline is.
        self.num_frames = frames

    @property
    def space(self) -> LatentSpace:
        """The VAE as a latent space."""
        kind: Any = find_latent_space(type(self.vae).__name__)
        return kind(self.vae, "")

    def finish(self, pixels: Tensor, output_type: str) -> Any:
        """Return pixels [B, 3, T, H, W] in [-1, 1] as an output type other than `latent`."""
        if output_type == "pil":
            return [to_images(clip.movedim(1, 0)) for clip in pixels]
        if output_type == "np":
            return np.stack(to_clips(pixels)) / np.float32(255)
        return ((pixels + 1.0) / 2.0).movedim(2, 1)

    @torch.no_grad()
    def __call__(
        self, *arguments: Any, num_frames: int | None = None, return_dict: bool = True, **named: Any
    ) -> Any:
        """Generate clips.

        Args:
            arguments: as of `LIDiTPipeline`.
            num_frames: of a clip; None = the pipeline's default; 1 = images.
            return_dict: a `LIDiTVideoOutput` instead of a tuple.
            named: as of `LIDiTPipeline`.

        Raises:
            UserError: if an argument is wrong.
        """
        self.num_frames = whole_number("num_frames", num_frames, self.config["frames"])
        (frames,) = super().__call__(*arguments, return_dict=False, **named)
        return LIDiTVideoOutput(frames=frames) if return_dict else (frames,)
