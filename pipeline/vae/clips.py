"""Training data of a VAE of clips, and what its latents are.

Three of four batches are windows of clips; every fourth has single frames, so that the VAE encodes images
too. A dataset without clips trains it on images alone.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data_prep.dataset.parts import committed, read_plan
from data_prep.dataset.schema import PAIRS
from data_prep.pairs.pairs import read_clip, read_pairs
from data_prep.store.store import Store
from model.common.errors import UserError
from model.encoders.video_wavelet import VideoWaveletAutoencoder

SINGLES_EVERY = 4
"""One batch of so many has single frames."""


def read_clips(dataset: Store, crop: int, limit: int) -> list[Tensor]:
    """Read clips and images of the committed pairs, in the order of the parts.

    Args:
        dataset: the dataset's store.
        crop: smallest side, in pixels.
        limit: maximum number of clips and images.

    Returns:
        Clips, each uint8 [3, T, H, W]; an image has one frame.

    Raises:
        UserError: if there are none.
    """
    clips: list[Tensor] = []
    kinds = read_plan(dataset).caption_kinds
    for _, commit in sorted(committed(dataset, PAIRS).items()):
        for pair in read_pairs(dataset, commit, kinds) if commit.rows else []:
            # smaller ones have no crop of this size
            if len(clips) < limit and min(pair.height, pair.width) >= crop:
                frames = torch.from_numpy(read_clip(pair).copy())  # [T, H, W, 3]
                clips.append(frames.movedim(-1, 0).contiguous())
        if len(clips) >= limit:
            break

    if not clips:
        raise UserError(
            f"{dataset.uri}: no clips of at least {crop}x{crop} in its pairs: "
            "run `python -m data_prep pairs` first"
        )
    return clips


def clip_batches(
    clips: Sequence[Tensor], batch: int, crop: int, frames: int, rng: torch.Generator
) -> Iterator[Tensor]:
    """Yield batches of random windows and of single frames without an end, each clip once per epoch of each.

    Args:
        clips: uint8 [3, T, H, W] each.
        batch: samples of a batch of windows; one of single frames has as many.
        crop: side of the square windows, in pixels.
        frames: of a window; shorter clips give single frames alone.
        rng: decides what is cut.

    Yields:
        Pixels, fp32 [B, 3, T, crop, crop] in [-1, 1].
    """
    long = [clip for clip in clips if clip.shape[1] >= frames]
    windows = _endless(long, batch, crop, frames, rng) if long else None
    singles = _endless(clips, batch, crop, 1, rng)
    number = 0
    while True:
        number += 1
        yield next(singles if windows is None or number % SINGLES_EVERY == 0 else windows)


def _endless(
    clips: Sequence[Tensor], batch: int, crop: int, frames: int, rng: torch.Generator
) -> Iterator[Tensor]:
    """Yield batches of windows of one length."""

    def cut(clip: Tensor) -> Tensor:
        size = (frames, crop, crop)
        starts = [
            int(torch.randint(whole - part + 1, (), generator=rng))
            for whole, part in zip(clip.shape[1:], size, strict=True)
        ]
        first, top, left = starts
        return clip[:, first : first + frames, top : top + crop, left : left + crop]

    order: list[int] = []
    while True:
        while len(order) < batch:
            order += torch.randperm(len(clips), generator=rng).tolist()
        indices, order = order[:batch], order[batch:]
        yield torch.stack([cut(clips[index]) for index in indices]).float() / 127.5 - 1.0


@torch.no_grad()
def measure_latents(
    vae: VideoWaveletAutoencoder, source: Iterator[Tensor], batches: int, device: torch.device
) -> None:
    """Record mean and std of each channel of the latents, over `batches` batches of `source`."""
    total = square = count = torch.zeros((), dtype=torch.float64)
    for _ in range(batches):
        moments = vae.encode(next(source).to(device))[0]
        mean, variance = moments.mean.double().cpu(), moments.std.double().square().cpu()
        axes = (0, 2, 3, 4)
        total = total + mean.sum(axes)  # [C]
        # total variance: that of the means plus the mean of the posteriors' own
        square = square + (mean.square() + variance).sum(axes)
        count = count + mean.numel() / mean.shape[1]

    mean = total / count
    vae.config.latents_mean = mean.tolist()
    vae.config.latents_std = (square / count - mean.square()).sqrt().tolist()
