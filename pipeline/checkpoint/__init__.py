"""Checkpoints: saving, resuming, and reading weights from them."""
