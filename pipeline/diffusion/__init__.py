"""The diffusion process: noise, target and loss of training; schedulers and guidance of sampling."""
