"""LI-DiT: a latent diffusion transformer that attends to the fused hidden states of frozen LLMs (paper
section 3)."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.blocks import BLOCKS
from model.condition import Condition
from model.conditions import CONDITIONS
from model.config import DiTConfig, FusionConfig
from model.functional import key_mask, modulate, patchify, unpatchify
from model.fusion import TextFusion
from model.layers import Linear, Modulation, PositionBlock, TimestepEmbedding, ZeroLinear


class FinalLayer(nn.Module):
    """Adaptive norm and a linear layer back to the values of a patch, which starts at zero."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.linear = ZeroLinear(width, outputs)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map patches [B, N, D] under a condition [B, D] or [B, N, D] to [B, N, outputs]."""
        shift, scale = self.modulation(c)
        return self.linear(modulate(x, shift, scale))


class LIDiT(nn.Module):
    """The whole trained network, from noisy latents, timesteps and the LLMs' hidden states to a prediction
    per latent."""

    new_branches: ClassVar[tuple[str, ...]] = ("fusion",)
    """Modules that start as the identity, so that a stage may add them, or branches of them, to an earlier
    stage's weights."""

    def __init__(
        self, config: DiTConfig, fusion: FusionConfig, text_widths: Sequence[int], checkpoint_every: int = 0
    ) -> None:
        """Build the network with its starting weights (see `init_weights`).

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
        self.position = PositionBlock(config.width, config.axes)
        self.time_embedding = TimestepEmbedding(config.frequency_width, config.width)
        self.fusion = TextFusion(fusion, text_widths, config)
        self.conditions = nn.ModuleDict({name: CONDITIONS[name](config) for name in config.conditions})
        self.blocks = nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.depth))
        self.final = FinalLayer(config.width, config.patch_values)

    def init_weights(self) -> None:
        """Set the starting weights again, such as after a model built on the meta device got its memory.

        | parameters                                            | start
        |
        |-------------------------------------------------------|----------------------------------------------|
        | linear layers                                         | Xavier-uniform, bias 0
        | | modulations and gates, linear layer of the last layer | 0, so blocks start as the identity, output
        0 | | gains of RMS norms                                    | 1
        | | convolutions                                          | torch's default
        |

        Each layer initializes itself when it is built, because parameters that ZeRO-3 has partitioned cannot
        be set from here.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | nn.RMSNorm):
                module.reset_parameters()

    def forward(self, latents: Tensor, condition: Condition) -> Tensor:
        """Predict the objective's target.

        Args:
            latents: noisy latents [B, C, h, w] or [B, C, T, h, w]; if they are the same in each branch of
                guidance, once for all branches: [B / branches, C, ...].
            condition: timesteps, one text per LLM in the order of `text_widths`, and the values of
                `model.conditions`.

        Returns:
            [B, C, ...] in the dtype of the weights.

        Raises:
            UserError: if the latents do not divide into patches.
        """
        positions, patch = latents.shape[2:], self.sizes.patch_shape
        grid = self.sizes.patch_grid(positions)
        x = patchify(latents.to(self.patch_embedding.weight.dtype), patch)  # [B, N, values of a patch]
        x = self.position(self.patch_embedding(x), grid)  # [B, N, D]

        # Guidance's branches share their latents, so patches and positions are computed once for all of them.
        branches = len(condition.timesteps) // len(x)
        if branches > 1:
            x = x.repeat(branches, 1, 1)  # [B, N, D]

        text, text_mask, c = self.embed(condition)  # [B, S, D], [B, 1, 1, S], [B, D]

        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_every and self.training and number % self.checkpoint_every == 0:
                x = self.recompute(block, x, text, text_mask, c)  # [B, N, D]
            else:
                x = block(x, text, text_mask, c)  # [B, N, D]

        return unpatchify(self.final(x, c), patch, positions)  # [B, C, ...]

    def recompute(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """Run a block whose activations are computed again in the backward pass."""
        # No layer has dropout, so recomputing needs no state of the random generators.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    def embed(self, condition: Condition) -> tuple[Tensor, Tensor | None, Tensor]:
        """Turn the condition into what every block reads.

        Returns:
            Text tokens [B, S, D]; their mask [B, 1, 1, S], or None if nothing is padded; the condition vector
            [B, D], or [B, N, D] where each patch has a time of its own.
        """
        times = condition.timesteps
        time = self.time_embedding(times)  # [B, D] or [B, N, D]

        # the text side reads one time per sample
        sample_time = time if times.dim() == 1 else self.time_embedding(times.mean(dim=1))  # [B, D]
        text, mask, pooled = self.fusion(condition.texts, sample_time)  # [B, S, D], [B, S], [B, D]
        text_mask = key_mask(mask) if any(text.padded for text in condition.texts) else None  # [B, 1, 1, S]

        for name, layer in self.conditions.items():
            pooled = pooled + layer(condition.extra[name])  # [B, D]
        # Text and further conditions are the same for all patches; only the time may differ.
        return text, text_mask, time + (pooled if times.dim() == 1 else pooled[:, None])
