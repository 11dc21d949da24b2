"""Sampling: from weights and prompts to images."""
