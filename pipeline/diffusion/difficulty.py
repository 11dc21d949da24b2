"""Difficulty of patches: the loss of the head that predicts it, and how well its predictions rank the
errors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.functional import patchify


def patch_errors(prediction: Tensor, target: Tensor, patch: Sequence[int]) -> Tensor:
    """Return the mean squared error of each patch, fp32 [B, N]."""
    return patchify((prediction.float() - target.float()).square(), patch).mean(dim=-1)


def patch_log_variances(log_variance: Tensor, patch: Sequence[int]) -> Tensor:
    """Return one value per patch, fp32 [B, N], of the network's channel of log-variances [B, 1, ...]."""
    # The positions of a patch have the same value.
    return patchify(log_variance.float(), patch)[..., 0]


def difficulty_loss(prediction: Tensor, log_variance: Tensor, target: Tensor, patch: Sequence[int]) -> Tensor:
    """Return the mean over patches of the Gaussian negative log-likelihood per latent value, fp32 [B].

    Args:
        prediction: [B, C, ...]; no gradient reaches it, or the network could lower its loss by erring as it
            expects.
        log_variance: [B, 1, ...], equal in all positions of a patch.
        target: [B, C, ...].
        patch: latent positions of a patch along each axis.
    """
    errors = patch_errors(prediction.detach(), target, patch)
    expected = patch_log_variances(log_variance, patch)
    return 0.5 * (math.log(2 * math.pi) + expected + errors * torch.exp(-expected)).mean(dim=1)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's correlation of two vectors; equal values share their mean rank. NaN if one of them is
    constant."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[group]
