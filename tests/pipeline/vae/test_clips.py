"""Windows of clips for the training of a VAE, and the statistics of its latents."""

from dataclasses import replace

import pytest
import torch

from model.common.errors import UserError
from model.encoders.latent_spaces import load_latent_space
from model.encoders.video_wavelet import VideoWaveletAutoencoder, VideoWaveletConfig
from pipeline.train_vae import Training, check_frames, psnr, standardize, train
from pipeline.vae.clips import clip_batches

CPU = torch.device("cpu")
TINY = Training(steps=2, batch=4, crop=16, images=100, frames=5)


def moving_boxes(count, frames=9):
    """White clips [3, T, 16, 24] with a colored box that moves right; each value is a clip's own."""
    clips = []
    for number in range(count):
        clip = torch.full((3, frames, 16, 24), 255, dtype=torch.uint8)
        for frame in range(frames):
            clip[number % 3, frame, 4:12, frame : frame + 8] = number
        clips.append(clip)
    return clips


def test_every_fourth_batch_has_single_frames_and_windows_are_pieces_of_clips():
    clips = [*moving_boxes(4), *moving_boxes(3, frames=1)]
    source = clip_batches(clips, 4, 16, 5, torch.Generator().manual_seed(0))
    batches = [next(source) for _ in range(8)]
    assert [batch.shape[2] for batch in batches] == [5, 5, 5, 1] * 2
    for window in batches[0]:
        pixels = ((window + 1) * 127.5).round().byte()
        found = any(
            torch.equal(pixels, clip[:, first : first + 5, :, left : left + 16])
            for clip in clips[:4]
            for first in range(5)
            for left in range(9)
        )
        assert found


def test_images_alone_train_on_single_frames():
    source = clip_batches(moving_boxes(3, frames=1), 2, 16, 5, torch.Generator())
    assert {next(source).shape for _ in range(3)} == {torch.Size((2, 3, 1, 16, 16))}


def test_it_trains_and_records_what_its_latents_are(tmp_path):
    clips = moving_boxes(8)
    vae = train(clips, TINY, CPU)
    assert isinstance(vae, VideoWaveletAutoencoder)
    fresh = VideoWaveletAutoencoder(VideoWaveletConfig())
    assert any(not torch.equal(a, b) for a, b in zip(vae.parameters(), fresh.parameters(), strict=True))
    standardize(vae, clips, TINY, CPU)
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == 16
    assert min(vae.config.latents_std) > 0
    assert psnr(vae, clips, TINY, CPU) > 0
    vae.save_pretrained(tmp_path)
    space = load_latent_space(str(tmp_path), None, CPU)
    assert space.statistics["latents_std"] == vae.config.latents_std


def test_frames_divide_into_groups():
    assert check_frames(replace(TINY, frames=0), True).frames == 17
    assert check_frames(replace(TINY, frames=0), False).frames == 0
    with pytest.raises(UserError, match="--frames 16: give a multiple of 4 and 1 more"):
        check_frames(replace(TINY, frames=16), True)
    with pytest.raises(UserError, match="--frames 5 is for --kind video"):
        check_frames(TINY, False)
