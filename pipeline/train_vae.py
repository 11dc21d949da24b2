"""Train a small VAE of the paper's shape on a dataset's own pairs: `python -m pipeline.train_vae`.

It has 8x downsampling and 16 channels. Use it for demos, tests and data that no public VAE has seen; a real
run names a public VAE. In 100 CPU seconds it reached 24.8 dB with Muon on convolutions, 20.6 dB with AdamW.
Part of the loss is on 4x4 averages, since lines are learned fast and colors are not.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.config import load_dataset
from data_prep.dataset.parts import committed, read_plan
from data_prep.dataset.schema import PAIRS
from data_prep.pairs.pairs import read_clip, read_pairs
from data_prep.store.store import Store, open_store
from model.common.errors import UserError, command
from model.common.files import atomic_path
from model.common.progress import Progress
from model.encoders.vae import VAE, small_vae
from model.encoders.video_wavelet import GROUP, VideoWaveletAutoencoder, VideoWaveletConfig
from model.functional import has_bf16
from pipeline.checkpoint.weights import apply_umask
from pipeline.engine.muon import orthogonalize
from pipeline.vae.clips import clip_batches, measure_latents, read_clips
from pipeline.vae.distillation import distillation_loss, make_student, read_teacher

SETTINGS = "training.json"
"""File in the VAE's folder with the settings and pairs that it was trained with, and its PSNR."""
WARM_UP_STEPS = 50
MAX_STATISTICS_IMAGES = 1024
"""Images over which the latent channels are standardized."""
MAX_PSNR_IMAGES = 256
DEFAULT_FRAMES = 17
"""Frames of the clips that a VAE of clips is trained on."""
MEASURED_STEPS = 8
"""Steps whose speed decides how many are taken in a given time."""


@dataclass(frozen=True)
class Training:
    """Settings of the training."""

    steps: int = 1200
    batch: int = 8
    crop: int = 64
    """Side of the square crops that it is trained on, in pixels; smaller images are left out."""
    images: int = 4096
    """Maximum number of images to keep in memory, counted from the first part."""
    lr: float = 0.02
    """Learning rate of Muon on the convolutions; AdamW on norms and biases has a tenth of it."""
    kl: float = 2e-4
    """Weight of the KL term in the loss."""
    seed: int = 0
    frames: int = 0
    """Frames of the clips that it is trained on, with `--kind video`: a multiple of 4 and 1 more."""


def read_images(dataset: Store, crop: int, limit: int) -> list[Tensor]:
    """Read images of the committed pairs, in the order of the parts.

    Args:
        dataset: the dataset's store.
        crop: smallest side of an image, in pixels.
        limit: maximum number of images.

    Returns:
        Images, each uint8 [3, H, W].

    Raises:
        UserError: if there are none.
    """
    # uint8, a quarter of fp32's memory; `batches` converts the crops only
    images: list[Tensor] = []
    kinds = read_plan(dataset).caption_kinds
    for _, commit in sorted(committed(dataset, PAIRS).items()):
        for pair in read_pairs(dataset, commit, kinds) if commit.rows else []:
            # smaller images have no crop of this size
            if len(images) < limit and min(pair.height, pair.width) >= crop:
                pixels = torch.from_numpy(read_clip(pair)[0].copy())  # [H, W, 3]; of a clip the first frame
                images.append(pixels.permute(2, 0, 1).contiguous())
        if len(images) >= limit:
            break

    if not images:
        raise UserError(
            f"{dataset.uri}: no images of at least {crop}x{crop} in its pairs: "
            "run `python -m data_prep pairs` first"
        )
    return images


def batches(images: list[Tensor], training: Training, rng: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of random crops without an end, each image once per epoch; of clips, random windows.

    Yields:
        Pixels, fp32 [B, 3, crop, crop] in [-1, 1]; of clips [B, 3, T, crop, crop].
    """
    if training.frames:
        yield from clip_batches(images, training.batch, training.crop, training.frames, rng)
    side = training.crop

    def crop(image: Tensor) -> Tensor:
        top, left = (int(torch.randint(size - side + 1, (), generator=rng)) for size in image.shape[1:])
        return image[:, top : top + side, left : left + side]

    # the rest of an epoch goes into the next batch, since batches have to be of equal size
    order: list[int] = []
    while True:
        while len(order) < training.batch:
            order += torch.randperm(len(images), generator=rng).tolist()
        indices, order = order[: training.batch], order[training.batch :]
        yield torch.stack([crop(images[index]) for index in indices]).float() / 127.5 - 1.0


def vae_loss(vae: Any, pixels: Tensor, kl_weight: float, rng: torch.Generator) -> Tensor:
    """Return the loss: L1, squared error, squared error of 4x4 averages, and KL (Kingma and Welling 2014).

    Args:
        vae: a diffusers AutoencoderKL, or an autoencoder of clips.
        pixels: [B, 3, H, W] in [-1, 1], or [B, 3, T, H, W] of clips.
        kl_weight: weight of the KL term.
        rng: generator of the posterior's noise, on the CPU, so that any device has the same noise.
    """
    # a CPU without bf16 instructions takes 8 times as long in bf16 as in fp32
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=has_bf16(pixels.device)):
        posterior = vae.encode(pixels, return_dict=False)[0]
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=rng).to(mean.device)
        decoded = vae.decode(mean + (0.5 * logvar).exp() * noise, return_dict=False)[0]

    # the loss in fp32: bf16 has less than three decimal digits, too few for small differences
    error = decoded.float() - pixels
    # of a Gaussian with this mean and variance from the standard normal one
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    reconstruction = error.abs().mean() + error.square().mean()
    # averages have no lines left, only colors, which would otherwise be learned last
    of_frames = error if error.ndim == 4 else error.movedim(2, 1).flatten(0, 1)
    color = F.avg_pool2d(of_frames, 4).square().mean()
    return reconstruction + 4.0 * color + kl_weight * kl


class VAEOptimizer:
    """Muon (Jordan 2024) on convolutions, as matrices of one row per output channel; AdamW on the rest."""

    momentum = 0.95

    def __init__(self, vae: nn.Module, lr: float) -> None:
        self.lr = lr
        self.kernels = [parameter for parameter in vae.parameters() if parameter.ndim >= 4]
        self.means = [torch.zeros_like(kernel.detach().flatten(1)) for kernel in self.kernels]

        others = [parameter for parameter in vae.parameters() if parameter.ndim < 4]
        self.adamw = torch.optim.AdamW(others, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.0)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Take one step at `factor` times the full learning rate, then clear the gradients."""
        for kernel, mean in zip(self.kernels, self.means, strict=True):
            assert kernel.grad is not None
            gradient = kernel.grad.flatten(1)
            mean.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(mean, self.momentum))

            # A tall matrix has orthogonal columns, so its rows are shorter than 1 and would move less.
            rows, columns = update.shape
            rate = self.lr * factor * math.sqrt(max(1, rows / columns))
            kernel.flatten(1).add_(update, alpha=-rate)
            kernel.grad = None

        self.adamw.param_groups[0]["lr"] = self.lr / 10 * factor
        self.adamw.step()
        self.adamw.zero_grad()


def make_vae(training: Training, teacher: VAE | None) -> nn.Module:
    """Build the autoencoder that is trained: one of clips, one with a teacher's latents, or an AutoencoderKL.

    Raises:
        UserError: if the teacher has another downsampling than wavelets.
    """
    if training.frames:
        return VideoWaveletAutoencoder(VideoWaveletConfig())
    return small_vae() if teacher is None else make_student(teacher)


def train(images: list[Tensor], training: Training, device: torch.device, teacher: VAE | None = None) -> Any:
    """Train a VAE from fresh weights, with a linear warm-up and a cosine decay to zero.

    Args:
        images: to train on, or clips.
        training: settings.
        device: where it is trained.
        teacher: whose latents a `WaveletAutoencoder` learns; None = train one with its own.

    Returns:
        What `make_vae` has built, frozen.
    """
    torch.manual_seed(training.seed)
    rng = torch.Generator().manual_seed(training.seed)
    # built on the CPU, so that the same seed gives the same weights on any device
    vae: Any = make_vae(training, teacher).to(device).train()
    optimizer = VAEOptimizer(vae, training.lr)
    source = batches(images, training, rng)

    with Progress("VAE", training.steps, "steps") as progress:
        for step in range(training.steps):
            pixels = next(source).to(device)
            if teacher is None:
                loss = vae_loss(vae, pixels, training.kl, rng)
            else:
                loss = distillation_loss(vae, teacher, pixels, rng)
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)

            warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
            optimizer.step(warm_up * 0.5 * (1.0 + math.cos(math.pi * step / training.steps)))
            progress.advance()

    return vae.eval().requires_grad_(False)


def steps_within(
    minutes: float,
    images: list[Tensor],
    training: Training,
    device: torch.device,
    teacher: VAE | None = None,
) -> int:
    """Return how many steps take about `minutes`, at the speed of the first ones, which are thrown away.

    The number is known before the training starts, whose learning rate depends on it. So it is the same
    training as one with this number in its settings.
    """
    run = train if teacher is None else partial(train, teacher=teacher)
    # allocates memory and picks kernels, which later steps do not
    run(images, replace(training, steps=1), device)
    began = time.monotonic()
    run(images, replace(training, steps=MEASURED_STEPS), device)
    seconds = (time.monotonic() - began) / MEASURED_STEPS
    return max(1, int(60 * minutes / seconds))


@torch.no_grad()
def standardize(vae: Any, images: list[Tensor], training: Training, device: torch.device) -> None:
    """Give each latent channel mean 0 and std 1 on the data, through the 1x1 convolutions around the latent.

    Then scaling factor 1 and shift 0 are right for every channel; one factor for all channels would fit none.
    The decoded images do not change. A VAE of clips records mean and std of each channel instead.
    """
    rng = torch.Generator().manual_seed(training.seed)
    source = batches(images, training, rng)
    count = max(1, min(len(images), MAX_STATISTICS_IMAGES) // training.batch)
    if training.frames:
        measure_latents(vae, source, count, device)
        return
    posteriors = [vae.encode(next(source).to(device), return_dict=False)[0] for _ in range(count)]

    means = torch.cat([posterior.mean for posterior in posteriors])  # [N, C, h, w]
    variances = torch.cat([posterior.var for posterior in posteriors])
    mean = means.mean((0, 2, 3))
    # total variance: that of the means plus the mean of the posteriors' own
    std = (means.var((0, 2, 3)) + variances.mean((0, 2, 3))).sqrt()

    # The encoder's last convolution gives z and its logvar: now (z - mean) / std and logvar - 2 log(std).
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    encoder.weight[:channels] /= std.view(-1, 1, 1, 1)
    encoder.bias[:channels] = (encoder.bias[:channels] - mean) / std
    encoder.bias[channels:] -= 2.0 * std.log()

    # The decoder's first convolution undoes it: W z + b = (W std) ((z - mean) / std) + (b + W mean).
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


@torch.no_grad()
def psnr(
    vae: Any, images: list[Tensor], training: Training, device: torch.device, decoder: Any = None
) -> float:
    """Return the mean peak signal-to-noise ratio, in dB, of reconstructing up to `MAX_PSNR_IMAGES` images.

    Args:
        vae: that encodes.
        images: to reconstruct.
        training: settings, for the crops.
        device: of the weights.
        decoder: another VAE that decodes; None = the same.
    """
    decoder = vae if decoder is None else decoder
    source = batches(images, training, torch.Generator().manual_seed(training.seed))
    values: list[Tensor] = []
    for _ in range(max(1, min(len(images), MAX_PSNR_IMAGES) // training.batch)):
        pixels = next(source).to(device)
        # the mean, without the posterior's noise, so that the value measures the VAE alone
        latents = vae.encode(pixels, return_dict=False)[0].mean
        decoded = decoder.decode(latents, return_dict=False)[0].clamp(-1, 1)

        error = ((decoded - pixels) / 2.0).square().flatten(1).mean(1)  # [B], of pixels in [0, 1]
        values.append(-10.0 * (error + 1e-10).log10())

    return torch.cat(values).mean().item()


def train_into(
    dataset: Store,
    out: Path,
    training: Training,
    minutes: float | None = None,
    teacher_folder: str = "",
) -> None:
    """Train, and write a diffusers folder, which appears complete or not at all; an equal one is kept.

    Args:
        dataset: the dataset's store.
        out: the folder to write.
        training: the settings.
        minutes: take as many steps as fit into this time, instead of the settings' number.
        teacher_folder: whose latents a wavelet autoencoder learns; empty = a VAE with its own.

    Raises:
        UserError: if `out` exists and was made from other pairs or settings, or the dataset has no pairs.
    """

    # a part that is prepared again has another attempt, so its pairs count as others
    parts = sorted([str(part), commit.attempt] for part, commit in committed(dataset, PAIRS).items())
    settings = {**asdict(training), "pairs": parts}
    if not training.frames:
        del settings["frames"]  # records of images have the fields that they always had
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = read_teacher(teacher_folder, device) if teacher_folder else None
    if teacher is not None:
        settings["teacher"] = teacher.identity["weights_sha256"]
    record = out / SETTINGS
    stored = json.loads(record.read_text())["settings"] if record.is_file() else None
    if stored and minutes is not None:
        # another day's measurement gives another number of steps, and asks for the same VAE
        settings["steps"] = stored["steps"]
    if stored == settings:
        print(f"{out}: already trained on these pairs with these settings")
        return
    if out.exists():
        raise UserError(
            f"{out} exists and was not made from these pairs with these settings: "
            "remove it or name another --out"
        )

    read: Callable[[Store, int, int], list[Tensor]] = read_clips if training.frames else read_images
    images = read(dataset, training.crop, training.images)
    if minutes is not None:
        training = replace(training, steps=steps_within(minutes, images, training, device, teacher))
        settings["steps"] = training.steps
    vae = train(images, training, device, teacher)
    if teacher is None:
        standardize(vae, images, training, device)
    quality = {"psnr": psnr(vae, images, training, device)}
    if teacher is not None:
        # encoder and decoder can each take the place of the teacher's
        quality["psnr_own_encoder"] = psnr(vae, images, training, device, teacher.module)
        quality["psnr_own_decoder"] = psnr(teacher.module, images, training, device, vae)

    with atomic_path(out) as unfinished:
        vae.save_pretrained(unfinished, safe_serialization=True)
        # safetensors 0.8 makes files that only their owner can read, and other users run the jobs
        apply_umask(unfinished)
        text = json.dumps({"settings": settings, **quality}, indent=2)
        (unfinished / SETTINGS).write_text(text + "\n")
    reached = f"reconstructions at {quality['psnr']:.1f} dB PSNR"
    print(f"{out}: {len(images):,} images, {training.steps:,} steps, {reached}")


def check_frames(training: Training, video: bool) -> Training:
    """Return the settings with the frames of clips, 17 by default.

    Raises:
        UserError: if they do not divide into groups, or images are to have frames.
    """
    if not video:
        if training.frames:
            raise UserError(f"--frames {training.frames} is for --kind video: leave it out")
        return training
    frames = training.frames or DEFAULT_FRAMES
    if frames < 1 or frames % GROUP != 1:
        raise UserError(f"--frames {frames}: give a multiple of {GROUP} and 1 more, such as {DEFAULT_FRAMES}")
    return replace(training, frames=frames)


@command
def main() -> None:
    """Run the command."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m pipeline.train_vae", description=description)
    parser.add_argument("dataset", type=Path, help="dataset YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the dataset to change")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    # one option per setting, so that a new setting needs no second place
    defaults = asdict(Training())
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")

    parser.add_argument(
        "--kind",
        choices=("small", "wavelet", "video"),
        default="small",
        help="wavelet = a smaller one with the latents of --teacher; video = a causal one of clips, with 4 "
        "frames and 8x8 pixels per position",
    )
    parser.add_argument("--teacher", default="", metavar="DIR", help="VAE whose latents are learned")
    parser.add_argument(
        "--minutes", type=float, help="take as many steps as fit into this time, instead of --steps"
    )

    arguments = vars(parser.parse_intermixed_args())
    config = load_dataset(arguments["dataset"], arguments["overrides"])
    training = Training(**{name: arguments[name] for name in defaults})
    # the VAE downsamples three times by two
    if training.crop % 8 or min(training.steps, training.batch, training.crop, training.images) < 1:
        raise UserError(
            f"--crop {training.crop}: use a multiple of 8, and at least one step, image and image per batch"
        )
    minutes = arguments["minutes"]
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"--minutes {minutes}: give a number above 0, or --steps")
    training = check_frames(training, arguments["kind"] == "video")
    teacher = arguments["teacher"]
    if (arguments["kind"] == "wavelet") != bool(teacher):
        raise UserError("--kind wavelet and --teacher DIR belong together: give both or neither")
    train_into(open_store(config.store).sub(config.name), arguments["out"], training, minutes, teacher)


if __name__ == "__main__":
    main()
