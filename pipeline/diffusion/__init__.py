"""Noise, target and loss of training; schedulers and guidance of sampling."""
