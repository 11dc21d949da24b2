"""Videos are decoded frame by frame as their times say, whatever their container, codec and form."""

from fractions import Fraction

import numpy as np
import pytest

from data_prep.clips.clips import fit_clip, is_clip, measure_motion, probe_clip
from data_prep.clips.media import encode_clip
from data_prep.clips.video import HDR, open_video
from data_prep.config import ClipsConfig
from data_prep.dataset.schema import Bucket
from data_prep.images.images import ImageError
from tests.helpers.videos import number_of, numbered, video

FORMS = {
    "mp4, B-frames": {"bf": "3"},
    "mp4, open groups": {"bf": "3", "x264-params": "open-gop=1:mbtree=0"},
    "mp4, one group": {"g": "1000"},
    "mp4, fragments": {"container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}},
    "mkv": {"container": "matroska", "bf": "2"},
    "webm, VP9": {"container": "webm", "codec": "libvpx-vp9", "cpu-used": "8", "deadline": "realtime"},
    "mkv, lossless": {"container": "matroska", "codec": "ffv1", "pix_fmt": "yuv444p"},
    "mp4, MPEG-4": {"codec": "mpeg4", "qscale": "2"},
    "mp4, HEVC": {"codec": "libx265", "preset": "ultrafast", "x265-params": "log-level=none:bframes=3"},
    "webm, AV1": {"container": "webm", "codec": "libsvtav1", "preset": "12", "svtav1-params": "lp=1"},
}


@pytest.mark.parametrize("form", FORMS)
def test_seeking_gives_the_frames_of_sequential_decoding(form):
    data = video(50, fps=25, **FORMS[form])
    assert is_clip(data)
    with open_video(data) as opened:
        assert opened.timeline.steps == len(opened.timeline.times) == 50
        assert (opened.height, opened.width) == (48, 64)
        bucket = Bucket(48, 64)
        times = [int(time) for time in opened.timeline.times]
        everything, _ = opened.decode_all(times, bucket)
        assert [number_of(everything[time]) for time in times] == list(range(50))
        for first, stride in ((0, 1), (11, 1), (12, 3), (37, 2), (49, 1)):
            wanted = times[first::stride][:9]
            found, _ = opened.decode(wanted, bucket)
            for time in wanted:
                assert np.array_equal(found[time], everything[time]), (form, first, time)


def test_a_variable_rate_gives_the_frames_shown_at_the_requested_times():
    """A screen recording: frames 10 and 20 are held for a second."""
    times = np.cumsum([0] + [1000 if number in (10, 20) else 40 for number in range(29)])
    data = video(30, container="matroska", times=times.tolist())
    settings = ClipsConfig(frames=[33], fps=12.5, start="start")
    clip = fit_clip(data, Bucket(48, 64, 33), settings, ())
    assert clip.choice.fps == pytest.approx(12.5)
    assert clip.choice.stride == 2
    for number, frame in enumerate(clip.frames):
        shown = int(np.searchsorted(times, number * 80, side="right")) - 1
        assert number_of(frame) == shown


def test_clip_start_and_stride_are_stored_as_taken():
    data = video(60, fps=48)
    clip = fit_clip(data, Bucket(48, 64, 9), ClipsConfig(frames=[9], fps=24), ())
    first = clip.choice.indices[0]
    assert [number_of(frame) for frame in clip.frames] == list(range(first, first + 18, 2))
    assert clip.choice.start == pytest.approx(first / 48)
    assert (clip.choice.fps, clip.choice.stride) == (pytest.approx(24), 2)
    facts = probe_clip(data, ClipsConfig(frames=[9], fps=24), (), ends_side=48)
    assert [number_of(frame) for frame in facts.ends] == [first, first + 8, first + 16]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_videos_are_made_upright(rotation):
    data = video(9, rotation=rotation)
    upright = np.rot90(numbered(5), rotation // 90)
    height, width = upright.shape[:2]
    facts = probe_clip(data, ClipsConfig(frames=[9]), ())
    assert (facts.height, facts.width) == (height, width)
    clip = fit_clip(data, Bucket(height, width, 9), ClipsConfig(frames=[9]), ())
    assert np.abs(clip.frames[5].astype(int) - upright).mean() < 4


def test_pixels_that_are_not_square_are_made_square():
    data = video(9, pixel_aspect=Fraction(2))
    facts = probe_clip(data, ClipsConfig(frames=[9]), ())
    assert (facts.height, facts.width) == (48, 128)
    clip = fit_clip(data, Bucket(48, 128, 9), ClipsConfig(frames=[9]), ())
    assert number_of(clip.frames[3]) == 3
    assert clip.crop.right == pytest.approx(128)


@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [
        *(("libx264", name) for name in ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuv420p10le")),
        ("libx264rgb", "rgb24"),
        ("ffv1", "bgra"),
    ],
)
def test_pixel_formats_give_the_same_colors(codec, pix_fmt):
    frames = np.stack([numbered(number, color=(0.9, 0.5, 0.25)) for number in range(9)])
    data = video(frames, container="matroska", codec=codec, pix_fmt=pix_fmt)
    clip = fit_clip(data, Bucket(48, 64, 9), ClipsConfig(frames=[9]), ())
    error = clip.frames.astype(float) - frames
    assert np.abs(error).mean() < 4
    assert np.abs(error.mean((0, 1, 2))).max() < 2.5


def test_gray_videos_are_read():
    clip = fit_clip(video(9, pix_fmt="gray"), Bucket(48, 64, 9), ClipsConfig(frames=[9]), ())
    assert [number_of(frame) for frame in clip.frames] == list(range(9))
    assert np.ptp(clip.frames, axis=-1).max() == 0


def test_high_dynamic_range_is_dropped_with_its_reason():
    data = video(
        9,
        container="matroska",
        codec="libx265",
        pix_fmt="yuv420p10le",
        color_trc=16,
        **{"x265-params": "log-level=none:transfer=smpte2084"},
    )
    with pytest.raises(ImageError) as caught:
        fit_clip(data, Bucket(48, 64, 9), ClipsConfig(frames=[9]), ())
    assert caught.value.reason == HDR


def test_scaling_covers_the_bucket_and_crops_its_center():
    wide = np.zeros((9, 60, 200, 3), np.uint8)
    wide[:, :, 70:130] = 200  # the middle 60 columns
    data = video(wide, pix_fmt="yuv444p")
    clip = fit_clip(data, Bucket(30, 30, 9), ClipsConfig(frames=[9]), ())
    assert clip.frames.shape == (9, 30, 30, 3)
    assert clip.frames[:, 3:-3, 3:-3].min() > 190
    assert clip.crop.left == pytest.approx(70, abs=1)
    assert clip.crop.right == pytest.approx(130, abs=1)


def test_motion_and_jumps_are_measured_in_levels():
    still = np.full((9, 64, 64, 3), 100, np.uint8)
    assert measure_motion(still) == (0.0, 0.0)
    cut = still.copy()
    cut[4:] = 180
    motion, jump = measure_motion(cut)
    assert jump == pytest.approx(80)
    assert motion == pytest.approx(10)


def test_animations_are_clips_and_single_frames_are_not():
    frames = np.stack([numbered(number) for number in range(9)])
    animated = encode_clip(frames, 20, "webp")
    assert is_clip(animated)
    clip = fit_clip(animated, Bucket(48, 64, 5), ClipsConfig(frames=[5], fps=10, start="start"), ())
    assert np.array_equal(clip.frames, frames[::2])
    assert clip.choice.fps == pytest.approx(10)
    assert not is_clip(encode_clip(frames[:1], 20, "webp"))
