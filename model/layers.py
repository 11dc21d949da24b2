"""Layers of the refiners and of the DiT.

Every layer with parameters sets them in its own `reset_parameters`, so a model built under DeepSpeed's
`zero.Init`, which takes each layer's parameters away as soon as the layer exists, starts from the same
distribution as any other.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from model.functional import attention, attention_weights, product_dtype, spread, timestep_features
from model.ragged import Rows, ragged_attention
from model.rotary import rotate


class Linear(nn.Linear):
    """Linear layer that starts Xavier-uniform with no bias."""

    def forward(self, input: Tensor, shift: Tensor | None = None) -> Tensor:
        """Map the last axis of the input, in the dtype that is fastest here; `shift` is added to the bias."""
        kind = product_dtype(input)
        # Into the bias and not to the result: a network with the sum as its bias gives the same bits.
        bias = self.bias if shift is None else self.bias + shift
        return F.linear(input.to(kind), self.weight.to(kind), bias.to(kind)).to(input.dtype)

    def reset_parameters(self) -> None:
        """Set the starting values."""
        # DiT's starting values (arXiv 2212.09748), not torch's defaults.
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroLinear(Linear):
    """Linear layer that starts at zero: gates and modulations, so that a new branch changes nothing at
    first."""

    def reset_parameters(self) -> None:
        """Set the starting values."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Conv2d(nn.Conv2d):
    """Convolution over [B, C, h, w], in the dtype that is fastest here."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the input."""
        kind = product_dtype(input)
        bias = None if self.bias is None else self.bias.to(kind)
        return self._conv_forward(input.to(kind), self.weight.to(kind), bias).to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """RMS norm with a learned gain; the epsilon is named, since torch's default depends on the type (0.8 % in
    bf16)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


class SelfAttention(nn.Module):
    """Multi-head self-attention with RMSNorm on queries and keys (paper section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = Linear(width, 3 * width)
        self.query_norm = RMSNorm(width // heads)
        self.key_norm = RMSNorm(width // heads)
        self.out = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Rows | None = None,
        causal: bool = False,
        first: int = 0,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Let each token of x [B, S, D] from `first` on attend to the tokens that `mask` [B, 1, 1, S] shows,
        or each of ragged x [1, N, D] to those of its row; with the result of `rotation_table`, queries and
        keys turn with their positions."""
        # One product of matrices for all three; on a GPU one large kernel is faster than three small ones.
        q, k, v = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # 3 x [B, S, H, d]
        # Only queries are cut: tokens before `first` are still read as keys and values.
        if isinstance(mask, Rows):
            kept, queries = mask.after(first) if first else (None, mask)
            q = q if kept is None else q.index_select(1, kept)
            x = ragged_attention(self.query_norm(q), self.key_norm(k), v, queries, mask, causal)
            return self.out(x)  # [1, N - first * B, D]
        q, k = self.query_norm(q[:, first:]), self.key_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.out(attention(q, k, v, mask, causal))  # [B, S - first, D]


class CrossAttention(nn.Module):
    """Multi-head cross-attention with RMSNorm on queries and keys (paper section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.query_norm = RMSNorm(width // heads)
        self.key_norm = RMSNorm(width // heads)
        self.out = Linear(width, width)

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | Rows | None = None, queries: Rows | None = None
    ) -> Tensor:
        """Let each token of x attend to tokens of `context`.

        Args:
            x: [B, S, D]; ragged, [1, M, D].
            context: [B, T, D]; ragged, [1, N, D].
            mask: the tokens of `context` that are shown, [B, 1, 1, T]; `Rows` if it is ragged.
            queries: if x is ragged too, its rows.
        """
        q = self.query(x).unflatten(-1, (self.heads, -1))  # [B, S, H, d]
        k, v = self.key_value(context).unflatten(-1, (2, self.heads, -1)).unbind(2)  # 2 x [B, T, H, d]
        if isinstance(mask, Rows):
            return self.out(ragged_attention(self.query_norm(q), self.key_norm(k), v, queries, mask))
        x = attention(self.query_norm(q), self.key_norm(k), v, mask)  # [B, S, D]
        return self.out(x)

    def weights(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention weights of `forward`, fp32 [B, H, S, T]: for inspection, far too large for
        training."""
        q = self.query(x).unflatten(-1, (self.heads, -1))  # [B, S, H, d]
        # Values have no part in the weights.
        k = self.key_value(context).unflatten(-1, (2, self.heads, -1)).select(2, 0)  # [B, T, H, d]
        return attention_weights(self.query_norm(q), self.key_norm(k), mask)  # [B, H, S, T]


class MLP(nn.Module):
    """Feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token of x [B, S, D] by itself."""
        # The tanh form of GELU, as in DiT.
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Modulation(nn.Module):
    """`count` vectors of scale, shift or gate from a condition; all start at zero (adaLN-zero, arXiv
    2212.09748)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = ZeroLinear(width, count * width)

    def forward(self, c: Tensor, places: Tensor | Rows | None = None) -> tuple[Tensor, ...]:
        """Turn a condition into vectors of each patch or token.

        Args:
            c: [B, D], one for all patches; [B, N, D], one per patch; or [B, K, D], one per level.
            places: for levels, the level of each patch, one-hot [B, N, K]; for ragged tokens, their rows.

        Returns:
            `count` vectors, [B, 1, D] or [B, N, D]; [1, N, D] for ragged tokens.
        """
        if isinstance(places, Rows):
            # Samples are the levels of a single row of tokens.
            c, places = c[None], places.one_hot(c.dtype)
        vectors = self.linear(F.silu(c))
        if vectors.dim() == 2:
            vectors = vectors.unsqueeze(1)  # one for all patches
        parts = vectors.chunk(self.count, dim=-1)
        # One by one, so that the backward pass keeps those alone that it reads: gates and scales, no shifts.
        return parts if places is None else tuple(spread(part, places) for part in parts)


class ConditionEmbedding(nn.Module):
    """Two linear layers around a SiLU, from a vector per sample to a condition."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inner = Linear(inputs, width)
        self.outer = Linear(width, width)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Map [B, inputs] to [B, width]; `shift` [width] is added to the last bias."""
        return self.outer(F.silu(self.inner(x)), shift)


class TimestepEmbedding(nn.Module):
    """Embedding of the timestep; its sinusoids are fp32 whatever the type of the weights."""

    def __init__(self, frequency_width: int, width: int) -> None:
        super().__init__()
        self.frequency_width = frequency_width
        self.mlp = ConditionEmbedding(frequency_width, width)

    def forward(self, timesteps: Tensor, shift: Tensor | None = None) -> Tensor:
        """Embed timesteps in [0, 1]: fp32 [...] -> [..., D]; `shift` [D] is added to the last bias."""
        # Rounded to the type of the weights only after the sinusoids: bf16 has 8 bits, too few for 1,000
        # steps.
        features = timestep_features(timesteps, self.frequency_width)  # fp32 [..., F]
        return self.mlp(features.to(self.mlp.inner.weight.dtype), shift)


class PositionBlock(nn.Module):
    """Convolutional residual block after patchify: the network's only knowledge of a patch's place (paper
    section 3.2).

    Zero padding gives a patch its distance to the border, its neighbors give it its surroundings, and no
    table ties it to a resolution. The paper does not give its width; between full-width convolutions (18 D^2)
    the 1B model would exceed its size by 3 %, so the inner width is a quarter (4.5 D^2).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(width)
        self.narrow = Conv2d(width, width // 4, kernel_size=3, padding=1)
        self.inner_norm = RMSNorm(width // 4)
        self.widen = Conv2d(width // 4, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Add the neighbors' contribution to patches x [B, N, D], which fill a grid of (rows, columns)."""
        # Convolutions take channels first, norms take them last, so channels move twice.
        h = F.silu(self.input_norm(x)).unflatten(1, tuple(grid))  # [B, *grid, D]
        h = self.narrow(h.movedim(-1, 1)).movedim(1, -1)  # [B, *grid, D / 4]
        h = F.silu(self.inner_norm(h))
        h = self.widen(h.movedim(-1, 1))  # [B, D, *grid]
        return x + h.flatten(2).transpose(1, 2)
