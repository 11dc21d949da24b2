"""LI-DiT: a latent diffusion transformer that attends to the fused hidden states of frozen LLMs (paper
section 3)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.adapter import entered, find_shifts
from model.blocks import BLOCKS
from model.common.errors import UserError
from model.condition import Condition
from model.conditions import CONDITIONS
from model.config import DiTConfig, FusionConfig
from model.difficulty import DifficultyHead
from model.functional import fill_patches, key_mask, modulate, patchify, unpatchify, velocity_to
from model.fusion import TextFusion
from model.layers import Linear, Modulation, TimestepEmbedding, ZeroLinear
from model.ragged import Rows
from model.rotary import rotation_table
from model.sub_network import Part
from model.video_position import make_position


class FinalLayer(nn.Module):
    """Adaptive norm and a linear layer back to the values of a patch, which starts at zero; and the head of
    difficulty, if there is one."""

    def __init__(self, width: int, outputs: int, difficulty: str = "none") -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.linear = ZeroLinear(width, outputs)
        self.difficulty = None if difficulty == "none" else DifficultyHead(width, difficulty == "detached")

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        places: Tensor | None = None,
        with_difficulty: bool = False,
        linear: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Map patches [B, N, D] to their values [B, N, outputs] and, if asked for, their log-variance [B, N].

        Args:
            x: patches.
            c: condition as in `Block.forward`, and so is `places`.
            places: level of each patch.
            with_difficulty: True to run the head.
            linear: in place of the layer's own `linear`.

        Raises:
            UserError: if the network has no head.
        """
        shift, scale = self.modulation(c, places)
        x = modulate(x, shift, scale)
        values = (self.linear if linear is None else linear)(x)
        if not with_difficulty:
            return values, None
        if self.difficulty is None:
            raise UserError(
                "this network has no difficulty head: train one with objective.difficulty=0.01, "
                "such as in a stage that starts from these weights"
            )
        return values, self.difficulty(x)


@dataclass
class Route:
    """The layers of one forward pass."""

    sizes: DiTConfig
    """The network's, with this pass's patches."""
    patch_embedding: nn.Module
    position: nn.Module
    blocks: Iterable[nn.Module]
    linear: nn.Module
    """The last layer."""
    time_shift: nn.Module | None = None
    """Returns [D], which is added to the time embedding; None = nothing."""


class LIDiT(nn.Module):
    """The whole trained network, from noisy latents, timesteps and the LLMs' hidden states to a prediction
    per latent."""

    new_branches: ClassVar[tuple[str, ...]] = (
        "fusion",
        "final.difficulty",
        "position.temporal",
        "position.frame_embedding",
    )
    """Modules that start as the identity, so that a stage may add them, or branches of them, to an earlier
    stage's weights."""

    def __init__(
        self, config: DiTConfig, fusion: FusionConfig, text_widths: Sequence[int], checkpoint_every: int = 0
    ) -> None:
        """Build the network with its starting weights.

        Each layer sets its own, since parameters that ZeRO-3 has partitioned cannot be set from here:
        Xavier-uniform for linear layers with biases of 0, 1 for the gains of RMS norms, torch's default for
        convolutions, and 0 for modulations, gates and the last linear layer, so that blocks start as the
        identity.

        Args:
            config: sizes of the DiT.
            fusion: switches of the text side.
            text_widths: width of each LLM's hidden states, in the order of `fusion.families`.
            checkpoint_every: recompute every n-th block in the backward pass instead of keeping its
            activations; 0 = none.

        Raises:
            UserError: if the settings do not fit together, or name a block or condition that does not exist.
        """
        super().__init__()
        self.sizes = config
        self.checkpoint_every = checkpoint_every
        # The order fixes the starting weights of a seed, and the names are those of every checkpoint.
        self.patch_embedding = Linear(config.patch_values, config.width)
        self.position = make_position(config)
        self.time_embedding = TimestepEmbedding(config.frequency_width, config.width)
        self.fusion = TextFusion(fusion, text_widths, config)
        self.conditions = nn.ModuleDict({name: CONDITIONS[name](config) for name in config.conditions})
        self.blocks = nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.depth))
        self.final = FinalLayer(config.width, config.patch_values, config.difficulty)
        # Filled by `attach_adapters` of `model/adapters/`.
        self.adapters = nn.ModuleDict()

    def forward(self, latents: Tensor, condition: Condition) -> Tensor:
        """Predict the objective's target.

        Args:
            latents: noisy latents [B, C, h, w] or [B, C, T, h, w]; if they are the same in each branch of
                guidance, once for all branches: [B / branches, C, ...].
            condition: timesteps, one text per LLM in the order of `text_widths`, and the values of
                `model.conditions`.

        Returns:
            [B, C, ...] in the dtype of the weights; [B, C + 1, ...] if the condition asks for the difficulty.

        Raises:
            UserError: if the latents do not divide into patches, the device has no kernel for the attention,
                or a difficulty is asked for and there is no head.
        """
        route = self.route(condition.part)
        positions, patch = latents.shape[2:], route.sizes.patch_shape
        grid = route.sizes.patch_grid(positions)
        self.sizes.attention.check_device(latents.device.type)
        x = patchify(latents.to(self.patch_embedding.weight.dtype), patch)  # [B, N, values of a patch]
        x = route.position(route.patch_embedding(x), grid)  # [B, N, D]

        # Guidance's branches share their latents, so patches and positions are computed once for all of them.
        branches = len(condition.timesteps) // len(x)
        if branches > 1:
            x = x.repeat(branches, 1, 1)  # [B, N, D]

        # [B, S, D], [B, 1, 1, S], [B, D], [B, N, K]
        text, text_mask, c, places = self.embed(condition, route.time_shift)
        x = entered(x, self.training)
        shifts = find_shifts(self.adapters, text, condition)
        for shift in shifts:
            c = shift.shifted_condition(c)

        rotation = self.rotation(grid, x.device, route.sizes.position_scale)  # [2, N, head / 2]
        for number, block in enumerate(route.blocks):
            own_text = text
            for shift in shifts:
                own_text = shift.shifted_text(own_text, number)
            # Blocks that know no levels work in all networks without them.
            inputs = (own_text, text_mask, c) if places is None else (own_text, text_mask, c, places)
            if self.sizes.attention.sparse:
                # Tiles of sparse attention need the grid, and every second block shifts them.
                inputs = (own_text, text_mask, c, places, *grid, number % 2)
            if rotation is not None:
                inputs = (own_text, text_mask, c, places, 0, 0, 0, rotation)
            if self.checkpoint_every and self.training and (number + 1) % self.checkpoint_every == 0:
                x = self.recompute(block, x, *inputs)  # [B, N, D]
            else:
                x = block(x, *inputs)  # [B, N, D]

        values, log_variance = self.final(x, c, places, condition.with_difficulty, route.linear)
        prediction = unpatchify(values, patch, positions)  # [B, C, ...]
        if self.sizes.predicts == "clean":
            prediction = velocity_to(prediction, latents, condition.timesteps)
        if log_variance is None:
            return prediction
        return torch.cat([prediction, fill_patches(log_variance, patch, positions)], dim=1)  # [B, C + 1, ...]

    def rotation(self, grid: Sequence[int], device: torch.device, scale: int) -> Tensor | None:
        """Return the rotary positions of a grid of patches, of which each takes `scale` along a side; None
        for a network with a position block."""
        if self.sizes.position != "rope":
            return None
        return rotation_table(grid, self.sizes.width // self.sizes.heads, device, scale)

    def route(self, part: Part | None) -> Route:
        """Return the layers of a forward pass; only an elastic network has parts.

        Raises:
            UserError: if the network has no such part.
        """
        if part is not None:
            raise UserError(f"{part}: this network is not elastic: ask for no depth and no patch")
        return Route(self.sizes, self.patch_embedding, self.position, self.blocks, self.final.linear)

    def recompute(self, block: nn.Module, *inputs: Tensor | Rows | int | None) -> Tensor:
        """Run a block whose activations are computed again in the backward pass."""
        # No layer has dropout, so recomputing needs no state of the random generators.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    def embed(
        self, condition: Condition, time_shift: nn.Module | None = None
    ) -> tuple[Tensor, Tensor | Rows | None, Tensor, Tensor | None]:
        """Turn the condition into what every block reads.

        Args:
            condition: of the batch.
            time_shift: as in `Route`.

        Returns:
            Text tokens [B, S, D]; their mask [B, 1, 1, S], or None if nothing is padded; or ragged tokens
            [1, S, D] and their rows; the condition vector
            [B, D], [B, N, D] where each patch has a time of its own, or [B, K, D] with levels; and for levels
            the one of each patch, one-hot [B, N, K].
        """
        times, levels = condition.timesteps, condition.levels
        if levels is not None and times.shape[1] == 1:
            # One level is one time per sample, bit for bit.
            times, levels = times[:, 0], None
        shift = None if time_shift is None else time_shift()  # [D]
        time = self.time_embedding(times, shift)  # [B, D], [B, N, D] or [B, K, D]

        # the text side reads one time per sample
        sample_time = time  # [B, D]
        if times.dim() > 1:
            sample_time = self.time_embedding(levels.sample_times if levels else times.mean(dim=1), shift)
        text, shown, pooled = self.fusion(condition.texts, sample_time)  # [B, S, D], [B, S], [B, D]
        text_mask = None
        if isinstance(shown, Rows):
            text_mask = shown
        elif any(text.padded for text in condition.texts):
            text_mask = key_mask(shown)  # [B, 1, 1, S]

        for name, layer in self.conditions.items():
            pooled = pooled + layer(condition.extra[name])  # [B, D]
        # Text and further conditions are the same for all patches; only the time may differ.
        c = time + (pooled if times.dim() == 1 else pooled[:, None])
        places = F.one_hot(levels.places, times.shape[1]).to(c.dtype) if levels else None  # [B, N, K]
        return text, text_mask, c, places
