"""The pieces of arithmetic that the network is made of: pure functions of tensors, no parameters."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

CPU_HAS_BF16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""True if this CPU has instructions that bf16 products run on (AVX-512, or bf16 on ARM)."""


def has_bf16(device: torch.device) -> bool:
    """True if a device multiplies in bf16 at least as fast as in fp32."""
    return device.type != "cpu" or CPU_HAS_BF16


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products with x are computed: its own, but fp32 for bf16 on a CPU without
    bf16 instructions.

    There torch's bf16 kernels run one value at a time, 5 to 40 times slower than fp32's: a training step of
    the demo takes 33 s and not 2 s. Both sum in fp32 and round once, so only the order of the sum differs.
    """
    return torch.float32 if x.dtype == torch.bfloat16 and not has_bf16(x.device) else x.dtype


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention over heads.

    Args:
        q: queries [B, S, H, d].
        k: keys [B, T, H, d].
        v: values [B, T, H, d].
        mask: the result of `key_mask`, or None if every key is a token.
        causal: hide later keys, the last query being as late as the last key; with padding on the right this
            hides the padding too, so it excludes `mask`.

    Returns:
        The heads concatenated, [B, S, H * d].
    """
    kind = q.dtype
    if (
        kind == torch.bfloat16 and q.device.type == "cpu"
    ):  # where torch's bf16 backward pass is 3 to 14 times slower than fp32's
        q, k, v = q.float(), k.float(), v.float()
    # SDPA wants heads before tokens, [B, H, S, d].
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    queries, keys = q.shape[2], k.shape[2]
    if causal and queries < keys:  # torch would take the first query for as early as the first key
        mask, causal = (
            torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries),
            False,
        )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)  # [B, H, S, d]
    return out.transpose(1, 2).flatten(2).to(kind)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the softmax inside `attention`, which torch's fused kernels never store: fp32 [B, H, S, T]."""
    scores = torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


def key_mask(mask: Tensor) -> Tensor:
    """Turn a padding mask [B, S] (True = a token) into one that broadcasts over heads and queries, [B, 1, 1,
    S].

    A row without any token shows its first key: attention over no key at all would be 0 / 0.
    """
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return (mask | (first & ~mask.any(dim=1, keepdim=True)))[:, None, None]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean [B, D] of the tokens of x [B, S, D] where `mask` [B, S] is True, summed in fp32; zero
    if there is none."""
    # Filled and not multiplied with the mask, since a NaN in the padding times zero is still a NaN.
    total = x.masked_fill(~mask[..., None], 0).sum(dim=1, dtype=torch.float32)
    return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply adaptive layer norm: x [B, S, D] normalized, then scaled and shifted by [B, 1, D] or [B, S, D]
    (DiT, arXiv 2212.09748)."""
    # 1 + scale, so that a modulation that starts at zero changes nothing. The layer norm has no gain or bias
    # of its own: the condition gives them. `addcmul` is one kernel where a product and a sum are two.
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def residual(x: Tensor, change: Tensor, gate: Tensor | None) -> Tensor:
    """Add a sub-layer's output to its input, through a gate [B, 1, D] or [B, S, D] if there is one."""
    return x + change if gate is None else torch.addcmul(x, gate, change)


def spread(values: Tensor, places: Tensor) -> Tensor:
    """Give each patch the value of its level: values [B, K, D] and one-hot places [B, N, K] -> [B, N, D].

    A product and not an index: sums of one value and zeros are exact in any type, and the gradient is a
    product too, whose order of summation is fixed, while that of an index is not on a GPU.
    """
    kind = product_dtype(values)
    return (places.to(kind) @ values.to(kind)).to(values.dtype)


def timestep_features(timesteps: Tensor, width: int) -> Tensor:
    """Return sinusoids of timesteps in [0, 1]: fp32 [...] -> fp32 [..., width].

    The unit is a thousandth, the step of DDPM, and periods run from 2 pi to 20,000 pi of them. The
    frequencies are made at each call: a buffer made in a bf16 model would hold rounded ones.
    """
    half = width // 2
    exponents = torch.arange(half, device=timesteps.device).float() / half
    angles = (
        1000 * timesteps.float()[..., None] * torch.exp(-math.log(10_000) * exponents)
    )  # [..., width / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


_LATENTS_AND_PATCHES = {
    2: ("b c (h p) (w q)", "b (h w) (p q c)"),
    3: ("b c (t o) (h p) (w q)", "b (t h w) (o p q c)"),
}
"""Axes of the latents after the channels -> einops patterns of latents and of patches."""


def patchify(latents: Tensor, patch: Sequence[int]) -> Tensor:
    """Cut latents into patches, row by row.

    Args:
        latents: [B, C, h, w] or [B, C, T, h, w].
        patch: latent positions of a patch along each axis after the channels.

    Returns:
        [B, N, values of a patch]; within a patch, channels vary fastest.
    """
    whole, cut = _LATENTS_AND_PATCHES[len(patch)]
    return rearrange(latents, f"{whole} -> {cut}", **dict(zip("qpo", reversed(patch), strict=False)))


def unpatchify(patches: Tensor, patch: Sequence[int], latents: Sequence[int]) -> Tensor:
    """Undo `patchify` for latents of `latents` = (h, w) or (T, h, w) positions: [B, N, values] -> [B, C,
    *latents]."""
    whole, cut = _LATENTS_AND_PATCHES[len(patch)]
    grid = [size // side for size, side in zip(latents, patch, strict=True)]
    axes = dict(zip("qpo", reversed(patch), strict=False)) | dict(zip("wht", reversed(grid), strict=False))
    return rearrange(patches, f"{cut} -> {whole}", **axes)


def fill_patches(values: Tensor, patch: Sequence[int], latents: Sequence[int]) -> Tensor:
    """Give each position of latents of `latents` positions the value of its patch: [B, N] -> [B, 1,
    *latents]."""
    return unpatchify(values[..., None].expand(-1, -1, math.prod(patch)), patch, latents)


MIN_CLEAN_TIME = 0.05
"""Least time that clean latents are divided by: at earlier times the quotient would mostly be their error."""


def velocity_to(clean: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
    """Return the velocity of the line from clean latents through noisy ones (arXiv 2511.13720, table 1).

    Args:
        clean: predicted latents [B, C, ...].
        noisy: latents [B / branches, C, ...], shared by the branches of guidance.
        times: of the noisy latents, fp32 [B] in [0, 1].

    Returns:
        (noisy - clean) / time, [B, C, ...] in the dtype of `clean`, computed in fp32.
    """
    branches = len(times) // len(noisy)
    noisy = noisy.float().repeat(branches, *[1] * (noisy.dim() - 1))
    divisor = times.clamp(min=MIN_CLEAN_TIME).view(-1, *[1] * (clean.dim() - 1))
    return ((noisy - clean.float()) / divisor).to(clean.dtype)
