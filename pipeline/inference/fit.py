"""Fit an embedding to a new user's images, on a frozen network whose adapter of users is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from model.adapters.users import START, UserAdapter, mixed_tokens
from model.common.errors import UserError
from model.condition import Users
from pipeline.diffusion.objective import make_objective
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.inference.users import user_adapter


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit."""

    by: Literal["coefficients", "row"] = "coefficients"
    """A mixture of the trained users, or an embedding of its own."""
    steps: int = 300
    lr: float = 0.3
    """Learning rate of the first step, as a multiple of the largest starting value; it falls to 0 as a
    cosine."""
    batch: int = 4
    """Images of a step."""
    seed: int = 0


@dataclass(frozen=True)
class FittedUser:
    """Result of a fit."""

    tokens: Tensor
    """fp32 [L, R]."""
    coefficients: Tensor | None
    """fp32 [count], of a mixture."""
    losses: list[float]
    """Loss of each step."""


def fit_user(
    sampler: Sampler,
    latents: Tensor,
    captions: Sequence[str],
    settings: FitSettings,
    on_step: Callable[[float], None] | None = None,
) -> FittedUser:
    """Fit an embedding to images; all weights stay as they are.

    Args:
        sampler: a run or an export whose network has users.
        latents: normalized latents fp32 [n, C, h, w] of the user's images.
        captions: one per image.
        settings: of the fit.
        on_step: called with the loss of each step.

    Raises:
        UserError: if the network has no users, there are no images, or a mixture is asked for and there is no
            table.
    """
    adapter = _trained_adapter(sampler)
    if not len(latents):
        raise UserError("no images: give a folder of images with captions")
    generator = torch.Generator().manual_seed(settings.seed)
    values, tokens_of = _start(adapter, settings, generator)
    objective = make_objective(sampler.objective, sampler.network.sizes.patch_shape)
    # A step moves each value by about the rate, whatever its size: coefficients start at 1 / count.
    rate = settings.lr * float(values.detach().abs().max())
    optimizer = torch.optim.AdamW([values], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    # Once for all steps: the LLMs have read the captions then.
    condition = sampler.condition(captions, SamplingParams())

    def normal(purpose: str, shape: Sequence[int]) -> Tensor:
        return torch.randn(len(rows), *shape, generator=generator).to(sampler.device)

    losses: list[float] = []
    for _ in range(settings.steps):
        rows = torch.randint(len(latents), (min(settings.batch, len(latents)),), generator=generator)
        noise = torch.randn(len(rows), *latents.shape[1:], generator=generator).to(sampler.device)
        u = torch.rand(len(rows), generator=generator).to(sampler.device)
        example = objective.training_example(latents[rows].to(sampler.device), noise, u, normal)

        users = Users(
            torch.zeros(len(rows), dtype=torch.int64, device=sampler.device),
            tokens_of(values).expand(len(rows), -1, -1),
        )
        given = condition.rows(rows.to(sampler.device))
        given = replace(given, timesteps=example.timesteps, levels=example.levels, users=users)
        prediction = sampler.network(example.noisy.to(sampler.dtype), given)
        loss = objective.loss(prediction, example.target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(losses[-1])

    with torch.no_grad():
        tokens = tokens_of(values)[0].float()
    mixed = settings.by == "coefficients"
    return FittedUser(tokens, values.detach()[0].clone() if mixed else None, losses)


def _trained_adapter(sampler: Sampler) -> UserAdapter:
    adapter = user_adapter(sampler.network)
    if adapter is None:
        raise UserError("the network has no users: train some with users.count, then fit another")
    return adapter


def _start(
    adapter: UserAdapter, settings: FitSettings, generator: torch.Generator
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the values to fit, and the function from them to tokens [1, L, R]."""
    table, tokens = adapter.table.weight.detach().float(), adapter.config.tokens
    if settings.by == "row":
        row = torch.empty(1, table.shape[1]).uniform_(-START, START, generator=generator).to(table.device)
        return row.requires_grad_(), lambda values: values.unflatten(-1, (tokens, -1))

    # Users that were deleted, and rows that are all there is of an export's table, are zero.
    known = table.any(dim=1)
    if not known.any():
        raise UserError(
            "an export has no table of users to mix: give the run's folder, or fit a row of its own "
            "(--by row)"
        )
    coefficients = (known.float() / known.sum())[None].requires_grad_()
    return coefficients, lambda values: mixed_tokens(table, values * known, tokens)
