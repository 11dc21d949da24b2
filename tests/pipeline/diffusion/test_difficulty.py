"""The loss of the difficulty head, and the rank correlation that judges it."""

import math

import pytest
import torch
from scipy.stats import spearmanr

from pipeline.diffusion.difficulty import (
    difficulty_loss,
    patch_errors,
    patch_log_variances,
    rank_correlation,
)
from pipeline.diffusion.objective import make_objective
from pipeline.stage.objective import ObjectiveConfig

PATCH = (2, 2)


def maps(seed=0):
    """Prediction, target and one log-variance per patch, spread over its positions."""
    rng = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, 2, 3, 4, 6, generator=rng).unbind(1)
    values = torch.randn(2, 2, 3, generator=rng)
    spread = values[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    return prediction, target, values.flatten(1), spread


def test_errors_and_log_variances_are_per_patch():
    prediction, target, values, spread = maps()
    errors = patch_errors(prediction, target, PATCH)
    assert errors[1, 4].item() == pytest.approx(
        (prediction - target)[1, :, 2:4, 2:4].square().mean().item(), rel=1e-6
    )
    assert torch.equal(patch_log_variances(spread, PATCH), values)


def test_of_a_zero_head_it_is_half_of_the_error_and_a_constant():
    prediction, target, _, spread = maps()
    loss = difficulty_loss(prediction, torch.zeros_like(spread), target, PATCH)
    expected = 0.5 * (math.log(2 * math.pi) + (prediction - target).square().flatten(1).mean(1))
    torch.testing.assert_close(loss, expected)


def test_it_is_the_gaussian_likelihood_of_each_value():
    prediction, target, _, spread = maps()
    normal = torch.distributions.Normal(prediction, (0.5 * spread).exp().expand_as(prediction))
    expected = -normal.log_prob(target).flatten(1).mean(1)
    torch.testing.assert_close(difficulty_loss(prediction, spread, target, PATCH), expected)


def test_the_best_log_variance_is_that_of_the_errors():
    prediction, target, _, _ = maps()
    best = patch_errors(prediction, target, PATCH).log().requires_grad_()
    up = best.unflatten(1, (1, 2, 3)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    difficulty_loss(prediction, up, target, PATCH).sum().backward()
    assert best.grad.abs().max() < 1e-6


def test_no_gradient_reaches_the_prediction():
    prediction, target, _, spread = maps()
    prediction.requires_grad_()
    spread.requires_grad_()
    difficulty_loss(prediction, spread, target, PATCH).sum().backward()
    assert prediction.grad is None
    assert spread.grad.any()


def test_an_objective_adds_it_with_its_weight():
    prediction, target, _, spread = maps()
    both = torch.cat([prediction, spread], 1)
    objective = make_objective(ObjectiveConfig(difficulty=0.01), PATCH)
    learned, reported = objective.training_losses(both, target)
    assert torch.equal(reported, objective.loss(prediction, target))
    assert torch.equal(learned, reported + 0.01 * difficulty_loss(prediction, spread, target, PATCH))
    plain = make_objective(ObjectiveConfig(), PATCH).training_losses(prediction, target)
    assert torch.equal(plain[0], plain[1])


@pytest.mark.parametrize("values", [torch.randn(50), torch.randint(4, (50,)).float()])
def test_rank_correlation_is_spearmans(values):
    other = values + torch.randn(50)
    assert rank_correlation(values, other) == pytest.approx(spearmanr(values, other).statistic)


def test_rank_correlation_with_a_constant_is_unknown():
    assert math.isnan(rank_correlation(torch.ones(5), torch.arange(5.0)))
