"""The encoded form of clips."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.clips.media import decode_clip, encode_clip
from data_prep.dataset.schema import Bucket, Part
from data_prep.images.images import ImageError
from data_prep.pairs.pairs import Pair, read_clip
from tests.helpers.raw_material import png, smooth_image


def smooth_clip(seed, frames=5, height=48, width=64):
    """Return a clip of a smooth image that moves by a pixel per frame, uint8 [T, H, W, 3]."""
    image = np.asarray(smooth_image(seed, height, width)) // 2 + 64  # colors that every YUV has
    return np.stack([np.roll(image, shift, axis=1) for shift in range(frames)])


@given(st.integers(0, 99), st.lists(st.integers(0, 2), min_size=2, max_size=9), st.floats(1, 60))
@settings(max_examples=25, deadline=None)
def test_webp_returns_every_frame_also_those_that_are_held(seed, order, fps):
    # equal neighbors become one longer frame in the file
    clip = np.random.default_rng(seed).integers(0, 256, (3, 8, 16, 3), np.uint8)[order]
    data = encode_clip(clip, fps, "webp")
    assert np.array_equal(decode_clip(data, len(clip)), clip)
    assert encode_clip(clip, fps, "webp") == data


@pytest.mark.parametrize(("chroma", "least"), [("yuv444p", 38), ("yuv420p", 36)])
def test_h264_is_close_and_the_same_bytes_every_time(chroma, least):
    clip = smooth_clip(0, 9)
    data = encode_clip(clip, 24, "mp4", chroma=chroma)
    decoded = decode_clip(data, 9)
    assert decoded.shape == clip.shape
    error = decoded.astype(float) - clip
    assert 10 * np.log10(255**2 / (error**2).mean()) > least
    assert abs(error.mean()) < 1  # neither the matrix nor the range of the colors is another one

    # x264 reads memory that it has not written, which differs with what was there before
    for size in range(1, 6):
        del_me = np.full(size << 20, 37 * size, np.uint8)
        del del_me
        assert encode_clip(clip, 24, "mp4", chroma=chroma) == data


@pytest.mark.parametrize("clip_format", ["mp4", "webp"])
def test_a_damaged_clip_is_an_image_error(clip_format):
    data = encode_clip(smooth_clip(1), 24, clip_format)
    for bad in (data[: len(data) // 2], data[:20], b""):
        with pytest.raises(ImageError):
            decode_clip(bad, 5)
    with pytest.raises(ImageError, match="frames instead of 9"):
        decode_clip(data, 9)


def test_read_clip_gives_images_and_clips_one_form():
    clip = smooth_clip(2)
    pair = Pair(1, "a", encode_clip(clip, 12, "webp"), [], 48, 64, 5, 12.0)
    assert np.array_equal(read_clip(pair), clip)
    image = Pair(1, "a", png(3, 48, 64), [], 48, 64)
    assert np.array_equal(read_clip(image), np.asarray(smooth_image(3, 48, 64))[None])


@given(st.integers(1, 9999), st.integers(1, 9999), st.integers(1, 999))
def test_bucket_names_are_unique_and_those_of_images_as_before(height, width, frames):
    bucket = Bucket(height, width, frames)
    assert Bucket.parse(bucket.name) == bucket
    assert Bucket(height, width).name == f"{height}x{width}" == Bucket.parse(f"{height}x{width}").name
    assert Part(bucket.name, 3).commit_key("pairs") == f"commits/pairs/{bucket.name}/00003.json"


@pytest.mark.parametrize("name", ["64", "64x", "64x64x", "64x64x1", "64x64x0", "64x64x17x3", "a64x64", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="not a bucket's name"):
        Bucket.parse(name)
