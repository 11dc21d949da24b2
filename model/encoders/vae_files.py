"""Names of the files of a diffusers VAE, and its folder; without torch, for commands that load no model."""

from pathlib import Path

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def find_in(root: Path) -> Path | None:
    """Return the folder of the VAE in `root`: of a pipeline, the subfolder `vae`; None without a config."""
    return next((folder for folder in (root / "vae", root) if (folder / CONFIG).is_file()), None)
