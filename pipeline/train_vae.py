"""A small VAE of the paper's shape (8x, 16 channels), trained on a dataset's own pairs: `python -m pipeline.train_vae`.

For demos, tests and data that no public VAE knows; a real run names a public one. Muon on the convolutions reached 24.8 dB in
100 CPU seconds where AdamW reached 20.6 dB. Part of the loss is on 4x4 averages, since lines learn fast and colours do not.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.config import load_dataset
from data_prep.dataset.parts import committed, read_plan
from data_prep.dataset.schema import PAIRS
from data_prep.images.images import decode_image
from data_prep.pairs.pairs import read_pairs
from data_prep.store.store import Store, open_store
from model.common.errors import UserError, command
from model.common.files import atomic_path
from model.common.progress import Progress
from model.encoders.vae import small_vae
from pipeline.checkpoint.weights import apply_umask

SETTINGS = "training.json"


@dataclass(frozen=True)
class Training:
    """What decides the result, with the data and the machine's arithmetic."""

    steps: int = 1200
    batch: int = 8
    crop: int = 64
    """Side of the squares that it trains on, in pixels; smaller images are left out."""
    images: int = 4096
    """Most images to hold in memory, from the first parts on."""
    lr: float = 0.02
    """Of Muon on the convolutions; the norms and biases have a tenth, by AdamW."""
    kl: float = 2e-4
    seed: int = 0


def read_images(dataset: Store, crop: int, limit: int) -> list[Tensor]:
    """Images of the committed pairs in the order of the parts, each uint8 [3, H, W].

    Raises:
        UserError: there are none.
    """
    images: list[Tensor] = []
    kinds = read_plan(dataset).caption_kinds
    for _, commit in sorted(committed(dataset, PAIRS).items()):
        for pair in read_pairs(dataset, commit, kinds) if commit.rows else []:
            if len(images) < limit and min(pair.height, pair.width) >= crop:
                images.append(torch.from_numpy(np.array(decode_image(pair.image))).permute(2, 0, 1).contiguous())
        if len(images) >= limit:
            break
    if not images:
        raise UserError(f"{dataset.uri}: no images of at least {crop}x{crop} in its pairs: run `python -m data_prep pairs` first")
    return images


def batches(images: list[Tensor], training: Training, rng: torch.Generator) -> Iterator[Tensor]:
    """Random crops for ever, each image once per epoch: fp32 [B, 3, crop, crop] in [-1, 1]."""

    def crop(image: Tensor) -> Tensor:
        top, left = (int(torch.randint(side - training.crop + 1, (), generator=rng)) for side in image.shape[1:])
        return image[:, top : top + training.crop, left : left + training.crop]

    order: list[int] = []
    while True:
        while len(order) < training.batch:
            order += torch.randperm(len(images), generator=rng).tolist()
        chosen, order = order[: training.batch], order[training.batch :]
        yield torch.stack([crop(images[index]) for index in chosen]).float() / 127.5 - 1.0


def vae_loss(vae: Any, pixels: Tensor, kl_weight: float, rng: torch.Generator) -> Tensor:
    """L1 and squared error, the squared error of 4x4 averages (colour), and a little KL (Kingma and Welling 2014)."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        posterior = vae.encode(pixels, return_dict=False)[0]
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=rng).to(mean.device)
        decoded = vae.decode(mean + (0.5 * logvar).exp() * noise, return_dict=False)[0]
    error = decoded.float() - pixels
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return error.abs().mean() + error.square().mean() + 4.0 * F.avg_pool2d(error, 4).square().mean() + kl_weight * kl


class VAEOptimizer:
    """Muon (Jordan 2024) on the convolutions, each as a matrix of output channels by the rest; AdamW on norms and biases."""

    def __init__(self, vae: nn.Module, lr: float) -> None:
        self.kernels = [parameter for parameter in vae.parameters() if parameter.ndim == 4]
        self.matrices = [nn.Parameter(kernel.detach().flatten(1)) for kernel in self.kernels]  # views: they share storage
        rest = [parameter for parameter in vae.parameters() if parameter.ndim != 4]
        self.parts = [
            torch.optim.Muon(self.matrices, lr=lr, weight_decay=0.0, momentum=0.95),
            torch.optim.AdamW(rest, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = [lr, lr / 10]

    def step(self, share: float) -> None:
        """One step at `share` of the full learning rate, then clear the gradients."""
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * share
            part.step()
        for parameter in [*self.kernels, *self.parts[1].param_groups[0]["params"]]:
            parameter.grad = None


def train(images: list[Tensor], training: Training, device: torch.device) -> Any:
    """Train from fresh weights: warm-up, then a cosine to zero."""
    torch.manual_seed(training.seed)
    rng = torch.Generator().manual_seed(training.seed)
    vae = small_vae().to(device).train()
    optimizer = VAEOptimizer(vae, training.lr)
    source = batches(images, training, rng)
    with Progress("VAE", training.steps, "steps") as progress:
        for step in range(training.steps):
            loss = vae_loss(vae, next(source).to(device), training.kl, rng)
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step(min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / training.steps)))
            progress.advance()
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def standardize(vae: Any, images: list[Tensor], training: Training, device: torch.device) -> None:
    """Give each latent channel mean 0 and spread 1 on the data, in the 1x1 convolutions between encoder, latent and decoder.

    So scaling factor 1 and shift 0 are right for every channel, where one factor for all would be wrong for each.
    """
    rng = torch.Generator().manual_seed(training.seed)
    source = batches(images, training, rng)
    count = max(1, min(len(images), 1024) // training.batch)
    moments = [vae.encode(next(source).to(device), return_dict=False)[0] for _ in range(count)]
    means = torch.cat([posterior.mean for posterior in moments])  # [N, C, h, w]
    mean = means.mean((0, 2, 3))
    std = (means.var((0, 2, 3)) + torch.cat([posterior.var for posterior in moments]).mean((0, 2, 3))).sqrt()
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    encoder.weight[:channels] /= std.view(-1, 1, 1, 1)
    encoder.bias[:channels] = (encoder.bias[:channels] - mean) / std
    encoder.bias[channels:] -= 2.0 * std.log()
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


@torch.no_grad()
def psnr(vae: Any, images: list[Tensor], training: Training, device: torch.device) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB, over up to 256 images."""
    source = batches(images, training, torch.Generator().manual_seed(training.seed))
    values: list[Tensor] = []
    for _ in range(max(1, min(len(images), 256) // training.batch)):
        pixels = next(source).to(device)
        decoded = vae.decode(vae.encode(pixels, return_dict=False)[0].mean, return_dict=False)[0].clamp(-1, 1)
        values.append(-10.0 * (((decoded - pixels) / 2.0).square().flatten(1).mean(1) + 1e-10).log10())
    return torch.cat(values).mean().item()


def train_into(dataset: Store, out: Path, training: Training) -> None:
    """Train and write a diffusers folder, which appears complete or not at all; an equal one is kept.

    Raises:
        UserError: `out` holds something else, or the dataset has no pairs.
    """
    parts = sorted((str(part), commit.attempt) for part, commit in committed(dataset, PAIRS).items())
    record = {**asdict(training), "pairs": parts}
    if (out / SETTINGS).is_file() and json.loads((out / SETTINGS).read_text())["settings"] == json.loads(json.dumps(record)):
        print(f"{out}: already trained on these pairs with these settings")
        return
    if out.exists():
        raise UserError(f"{out} exists and was not made from these pairs with these settings: remove it or name another --out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = read_images(dataset, training.crop, training.images)
    vae = train(images, training, device)
    standardize(vae, images, training, device)
    quality = psnr(vae, images, training, device)
    with atomic_path(out) as unfinished:
        vae.save_pretrained(unfinished, safe_serialization=True)
        apply_umask(unfinished)
        (unfinished / SETTINGS).write_text(json.dumps({"settings": record, "psnr": quality}, indent=2) + "\n")
    print(f"{out}: {len(images):,} images, {training.steps:,} steps, reconstructions at {quality:.1f} dB PSNR")


@command
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.train_vae", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", type=Path, help="dataset YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the dataset to change")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    default = Training()
    for name, value in asdict(default).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = vars(parser.parse_intermixed_args())
    config = load_dataset(arguments["dataset"], arguments["overrides"])
    training = Training(**{name: arguments[name] for name in asdict(default)})
    if training.crop % 8 or min(training.steps, training.batch, training.crop, training.images) < 1:
        raise UserError(f"--crop {training.crop}: use a multiple of 8, and at least one step, image and image per batch")
    train_into(open_store(config.store).sub(config.name), arguments["out"], training)


if __name__ == "__main__":
    main()
