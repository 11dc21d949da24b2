"""Learn an embedding for a new user from a few images with captions.

    python -m pipeline.fit_user RUN --pictures DIR --out anna.safetensors
    python -m pipeline.sample RUN --user anna.safetensors --prompt "a red apple"

DIR has images, and beside each a text file of the same name with its caption. By default the user is a
mixture of the trained users, which a handful of images suffices for; `--by row` learns an embedding of its
own. The result is one small file.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep.dataset.schema import Bucket
from data_prep.images.images import ImageError, fit_bucket
from model.common.dtypes import DTYPES
from model.common.errors import UserError, command
from model.common.progress import Progress
from model.encoders.latent_spaces import normalize_latents
from pipeline.inference.fit import FitSettings, fit_user
from pipeline.inference.sampler import Sampler
from pipeline.inference.source import add_weights_options, choose_precision, load_source
from pipeline.inference.users import save_user
from pipeline.runtime.console import CONSOLE

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_images(folder: Path, bucket: Bucket) -> tuple[list[Image.Image], list[str]]:
    """Return the images of a folder, cropped to a size, and their captions.

    Raises:
        UserError: if there are none, or one is damaged, too small, or has no caption.
    """
    images: list[Image.Image] = []
    captions: list[str] = []
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() not in SUFFIXES:
            continue
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise UserError(f"{caption}: not there: write the caption of {path.name} into it")
        try:
            images.append(fit_bucket(path.read_bytes(), bucket)[0])
        except ImageError as error:
            raise UserError(f"{path}: {error}: remove it, or give another image") from error
        captions.append(caption.read_text(encoding="utf-8-sig").strip())
    if not images:
        raise UserError(f"{folder}: no images ({', '.join(SUFFIXES)}): name a folder with some")
    return images, captions


@torch.no_grad()
def encode_images(sampler: Sampler, images: list[Image.Image]) -> torch.Tensor:
    """Return the normalized latents fp32 [n, C, h, w] of images, the means of the VAE's moments."""
    latents = []
    for image in images:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        mean, _ = sampler.vae.encode(pixels.to(sampler.device))
        latents.append(normalize_latents(mean.float(), sampler.vae.statistics))
    return torch.cat(latents)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.fit_user",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = FitSettings()
    parser.add_argument("source", type=Path, metavar="RUN|EXPORT", help="folder of a run with users")
    parser.add_argument("--pictures", type=Path, required=True, metavar="DIR", help="images and captions")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends in .safetensors")
    parser.add_argument("--by", choices=("coefficients", "row"), default=defaults.by)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    add_weights_options(parser)
    return parser.parse_args(arguments)


@command
def main() -> None:
    """Run the command line."""
    arguments = parse()
    if arguments.out.suffix != ".safetensors":
        raise UserError(f"--out {arguments.out}: give a name that ends in .safetensors")
    if min(arguments.steps, arguments.batch) < 1:
        raise UserError(f"--steps {arguments.steps} --batch {arguments.batch}: both have to be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[choose_precision(arguments.precision, device)]
    sampler = load_source(arguments.source, arguments.weights, device, dtype)

    size = Bucket(sampler.defaults.height, sampler.defaults.width)
    images, captions = read_images(arguments.pictures, size)
    latents = encode_images(sampler, images)
    sampler.reader.read(captions, keep_llms=False)
    settings = FitSettings(arguments.by, arguments.steps, arguments.lr, arguments.batch, arguments.seed)
    with Progress("fitting", settings.steps, "steps", console=CONSOLE, lines=False) as progress:
        fitted = fit_user(sampler, latents, captions, settings, lambda loss: progress.advance(1))

    source = arguments.source.absolute().name
    about = {"source": source, "by": settings.by, "images": len(images), "steps": settings.steps}
    save_user(arguments.out, fitted.tokens, **about)
    print(
        f"{arguments.out}: {settings.by} fitted to {len(images)} images, loss {fitted.losses[0]:.4f} to "
        f"{fitted.losses[-1]:.4f}; generate with python -m pipeline.sample {arguments.source} --user "
        f"{arguments.out}"
    )


if __name__ == "__main__":
    main()
