"""LI-DiT: a latent diffusion transformer that attends to the fused states of frozen LLMs (paper section 3)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.common.errors import UserError
from model.config import DiTConfig, FusionConfig
from model.functional import key_mask, modulate, patchify, residual, unpatchify
from model.fusion import Text, TextFusion
from model.layers import MLP, CrossAttention, Linear, Modulation, PositionBlock, SelfAttention, TimestepEmbedding, ZeroLinear


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward layer, each with its own shift, scale and gate.

    `forward` takes and returns nothing but tensors: as a leaf of ZeRO-3 the block is gathered whole, and its `forward`
    compiles to one graph.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(width, heads)
        self.cross_attention = CrossAttention(width, heads)
        self.mlp = MLP(width, hidden)
        self.modulation = Modulation(width, 9)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None, c: Tensor) -> Tensor:
        """Run the block.

        Args:
            x: patches [B, N, D].
            text: text tokens [B, S, D].
            text_mask: what `key_mask` gives for the text, or None if nothing is padded.
            c: condition, [B, D].

        Returns:
            Patches [B, N, D].
        """
        vectors = self.modulation(c)  # 9 x [B, 1, D]
        shift, scale, gate = vectors[0:3]
        x = residual(x, self.self_attention(modulate(x, shift, scale)), gate)  # [B, N, D]
        shift, scale, gate = vectors[3:6]
        x = residual(x, self.cross_attention(modulate(x, shift, scale), text, text_mask), gate)  # [B, N, D]
        shift, scale, gate = vectors[6:9]
        return residual(x, self.mlp(modulate(x, shift, scale)), gate)  # [B, N, D]


class FinalLayer(nn.Module):
    """Adaptive norm and a linear layer back to the values of a patch, which starts at zero."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.linear = ZeroLinear(width, outputs)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map patches [B, N, D] under a condition [B, D] to [B, N, outputs]."""
        shift, scale = self.modulation(c)
        return self.linear(modulate(x, shift, scale))


class LIDiT(nn.Module):
    """The whole trained network, from noisy latents, timesteps and the LLMs' states to a prediction per latent."""

    def __init__(self, config: DiTConfig, fusion: FusionConfig, text_widths: Sequence[int], checkpoint_every: int = 0) -> None:
        """Build the network with its starting weights (see `init_weights`).

        Args:
            config: sizes of the DiT.
            fusion: switches of the text side.
            text_widths: width of each LLM's states, in the order of `fusion.families`.
            checkpoint_every: recompute every n-th block in the backward pass instead of keeping its activations; 0 = none.

        Raises:
            UserError: the settings do not fit together.
        """
        super().__init__()
        self.sizes = config
        self.checkpoint_every = checkpoint_every
        patch_values = config.patch**2 * config.channels
        self.patch_embedding = Linear(patch_values, config.width)
        self.position = PositionBlock(config.width)
        self.time_embedding = TimestepEmbedding(config.frequency_width, config.width)
        self.fusion = TextFusion(fusion, text_widths, config)
        hidden = int(config.mlp_ratio * config.width)
        self.blocks = nn.ModuleList(DiTBlock(config.width, config.heads, hidden) for _ in range(config.depth))
        self.final = FinalLayer(config.width, patch_values)

    def init_weights(self) -> None:
        """Set the starting weights again, such as after a model built on the meta device got its memory.

        | parameters                                           | start                                        |
        |------------------------------------------------------|----------------------------------------------|
        | linear layers                                        | Xavier-uniform, bias 0                       |
        | modulations and gates, linear layer of the last layer | 0, so blocks start as the identity, output 0 |
        | gains of RMS norms                                   | 1                                            |
        | convolutions                                         | torch's default                              |

        Each layer does its own part when it is built; parameters that ZeRO-3 has taken away cannot be set from here.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.RMSNorm):
                module.reset_parameters()

    def forward(self, latents: Tensor, timesteps: Tensor, texts: Sequence[Text]) -> Tensor:
        """Predict the objective's target.

        Args:
            latents: noisy latents [B, C, h, w]; fewer if they come again for each branch of guidance, [B / branches, C, h, w].
            timesteps: fp32 [B] in [0, 1], 1 = pure noise.
            texts: one per LLM, in the order of `text_widths`.

        Returns:
            [B, C, h, w] in the type of the weights.

        Raises:
            UserError: the latents do not divide into patches.
        """
        height, width, patch = latents.shape[2], latents.shape[3], self.sizes.patch
        if height % patch or width % patch:
            raise UserError(f"latents of {height} x {width} do not divide into patches of {patch}: choose a multiple of it")
        x = patchify(latents.to(self.patch_embedding.weight.dtype), patch)  # [B, N, p * p * C]
        x = self.position(self.patch_embedding(x), height // patch, width // patch)  # [B, N, D]
        if len(x) < len(timesteps):
            x = x.repeat(len(timesteps) // len(x), 1, 1)  # [B, N, D]
        time = self.time_embedding(timesteps)  # [B, D]
        text, mask, pooled = self.fusion(texts, time)  # [B, S, D], [B, S], [B, D]
        text_mask = key_mask(mask) if any(text.padded for text in texts) else None  # [B, 1, 1, S]
        c = time + pooled  # [B, D]
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_every and self.training and number % self.checkpoint_every == 0:
                x = checkpoint(block, x, text, text_mask, c, use_reentrant=False, preserve_rng_state=False)  # [B, N, D]
            else:
                x = block(x, text, text_mask, c)  # [B, N, D]
        return unpatchify(self.final(x, c), patch, height, width)  # [B, C, h, w]
