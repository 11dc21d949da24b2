"""Objectives, a file each, which registers its class and is imported here; and the solvers that sample."""

from pipeline.diffusion import ddpm, flow  # noqa: F401
