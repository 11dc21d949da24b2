"""Videos and animations that are broken, absurd or made to harm: each is dropped with its reason."""

import io
import struct
import time

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.clips import animation
from data_prep.clips import video as video_file
from data_prep.clips.clips import CUT, TOO_STILL, fit_clip, is_clip, probe_clip
from data_prep.clips.media import encode_clip
from data_prep.clips.timing import BAD_TIMES
from data_prep.clips.video import BROKEN, CUT_SHORT, NO_FRAMES, NO_KEYFRAME, UNKNOWN_CODEC
from data_prep.config import BucketConfig, ClipsConfig, DedupeConfig, FilterConfig
from data_prep.dataset.schema import Bucket
from data_prep.images.buckets import TOO_SHORT, TOO_SMALL
from data_prep.images.images import DAMAGED, TOO_LARGE, UNKNOWN, ImageError
from tests.helpers.raw_material import all_pairs, config_of, encoded, png, prepare, reasons_of
from tests.helpers.videos import numbered, video

CLIPS = ClipsConfig(frames=[9])


def numbers(count, height=48, width=64):
    return np.stack([numbered(number, height, width) for number in range(count)])


def reason_of(data):
    """Return the reason why a file gives no clip, at any of the two looks at it; empty if it gives one."""
    try:
        probe_clip(data, CLIPS, (0, 1), ends_side=16)
        fit_clip(data, Bucket(24, 32, 9), CLIPS, (0, 1))
    except ImageError as error:
        return error.reason
    return ""


def half(data):
    return data[: len(data) // 2]


def no_frames():
    """The header of a video in fragments, none of which follows."""
    data = video(20, container_options={"movflags": "frag_keyframe+empty_moov"})
    return data[: data.index(b"moof") - 4]


def box(data, kind):
    """Return the place of an mp4 box's content."""
    return data.index(kind) + 4


def absurd_duration(data):
    """Announce a last frame of many days: the last entry of the table of durations."""
    place = box(data, b"stts")
    entries = int.from_bytes(data[place + 4 : place + 8])
    count, delta = struct.unpack_from(">II", data, place + 8 * entries)
    table = struct.pack(">II", count, 1 << 30 if delta else 0)
    return data[: place + 8 * entries] + table + data[place + 8 * entries + 8 :]


def huge_size(data):
    """Announce 65535 x 65535 pixels where mp4 itself says it."""
    place = box(data, b"avc1") + 24
    return data[:place] + struct.pack(">HH", 65535, 65535) + data[place + 4 :]


HOSTILE = {
    "truncated": (lambda: half(video(20)), {BROKEN, CUT_SHORT}),
    "only its start": (lambda: video(20)[:200], {BROKEN}),
    "fragments, truncated": (
        lambda: video(20, container_options={"movflags": "frag_keyframe+empty_moov"})[:900],
        {BROKEN, CUT_SHORT, ""},
    ),
    "Matroska, truncated": (lambda: half(video(20, container="matroska")), {BROKEN, CUT_SHORT}),
    "no frames": (no_frames, {NO_FRAMES}),
    "codec that is not read": (
        lambda: video(9, container="matroska", codec="mpeg1video"),
        {UNKNOWN_CODEC},
    ),
    "random bytes": (lambda: b"\x00\x00\x00\x18ftypmp42" + np.random.default_rng(0).bytes(5000), {BROKEN}),
    "random Matroska": (lambda: b"\x1aE\xdf\xa3" + np.random.default_rng(1).bytes(5000), {BROKEN}),
    "playlist": (lambda: b"\x00\x00\x00\x18ftypmp42#EXTM3U\nfile:///etc/passwd\n", {BROKEN}),
    "a second per frame for days": (
        lambda: video(9, container="matroska", times=[0, 40, 80, 120, 160, 200, 240, 280, 10**9]),
        {BAD_TIMES},
    ),
    "GIF with one frame said to be two": (
        lambda: encoded(Image.new("RGB", (64, 48)), "GIF", save_all=True)[:-1] + b"\x2c",
        {DAMAGED, UNKNOWN, BROKEN},
    ),
    "WebP, truncated": (lambda: encode_clip(numbers(9), 24, "webp")[:-300], {DAMAGED}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_dropped_with_its_reason(name):
    make, reasons = HOSTILE[name]
    assert reason_of(make()) in reasons


def test_absurd_durations_and_sizes_in_the_header_are_refused():
    data = video(20)
    assert reason_of(data) == ""
    assert reason_of(absurd_duration(data)) in {BAD_TIMES, CUT_SHORT}
    # The codec's own header has the right size, so either is an answer.
    assert reason_of(huge_size(data)) in {TOO_LARGE, ""}


def test_a_video_of_too_many_pixels_or_frames_is_refused(monkeypatch):
    monkeypatch.setattr(video_file, "MAX_FRAME_PIXELS", 47 * 64)
    assert reason_of(video(20)) == TOO_LARGE
    monkeypatch.setattr(video_file, "MAX_FRAME_PIXELS", 48 * 64)
    assert reason_of(video(20)) == ""
    monkeypatch.setattr(video_file, "MAX_FRAMES", 19)
    assert reason_of(video(20)) == video_file.TOO_MANY
    monkeypatch.setattr(video_file, "MAX_FILE_BYTES", 1000)
    assert reason_of(video(20)) == TOO_LARGE


def test_a_clip_far_from_a_keyframe_is_refused(monkeypatch):
    """One group of many frames, each of which is decoded before the clip."""
    monkeypatch.setattr(video_file, "MAX_DECODED_PIXELS", 30 * 48 * 64)
    assert reason_of(video(200, g="1000", bf="0")) == video_file.TOO_FAR
    assert reason_of(video(200, g="10", bf="0")) == ""


def test_a_video_without_keyframe_is_refused():
    """A stream whose first keyframe was cut off, so that every other frame refers to what is not there."""

    data = video(20, container="matroska", g="1000", bf="0")
    output = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(output, "w", format="matroska") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None and not packet.is_keyframe:
                packet.stream = stream
                target.mux(packet)
    assert reason_of(output.getvalue()) in {NO_KEYFRAME, BROKEN}


@given(st.sampled_from(["mp4", "mkv", "webp", "gif"]), st.data())
@settings(max_examples=120, deadline=None)
def test_flipped_bytes_give_a_clip_or_a_reason(form, data):
    """No other exception, no crash, no endless loop; the clip has the size that was asked for."""
    file = bytearray(ORIGINALS[form])
    for _ in range(data.draw(st.integers(1, 6))):
        # Headers are small, so half of the changes are at the start or end.
        limit = data.draw(st.sampled_from([100, len(file)]))
        place = data.draw(st.integers(0, min(limit, len(file)) - 1))
        file[-place - 1 if data.draw(st.booleans()) else place] = data.draw(st.integers(0, 255))
    changed = bytes(file)
    start = time.monotonic()
    try:
        if is_clip(changed):
            facts = probe_clip(changed, CLIPS, (0, 1), ends_side=16)
            if facts.frames >= 9:
                clip = fit_clip(changed, Bucket(24, 32, 9), CLIPS, (0, 1))
                assert clip.frames.shape == (9, 24, 32, 3)
    except ImageError:
        pass
    assert time.monotonic() - start < 30


ORIGINALS = {
    "mp4": video(12),
    "mkv": video(12, container="matroska"),
    "webp": encode_clip(numbers(12), 24, "webp"),
    "gif": encoded(
        Image.fromarray(numbers(1)[0]),
        "GIF",
        save_all=True,
        append_images=[Image.fromarray(frame) for frame in numbers(12)[1:]],
        duration=40,
    ),
}


def test_an_animation_of_too_many_frames_or_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(animation, "MAX_FRAMES", 8)
    assert reason_of(ORIGINALS["gif"]) == animation.TOO_LONG
    monkeypatch.setattr(animation, "MAX_FRAMES", 100)
    monkeypatch.setattr(animation, "MAX_PIXELS", 5 * 48 * 64)
    assert reason_of(ORIGINALS["webp"]) == animation.TOO_LONG


def test_every_file_of_a_folder_is_a_pair_or_has_its_reason(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    still = np.repeat(numbers(1), 20, axis=0)
    cut = np.concatenate([np.full((10, 48, 64, 3), 30, np.uint8), np.full((10, 48, 64, 3), 220, np.uint8)])
    files = {
        "good.mp4": (video(20), ""),
        "good.webm": (video(20, container="webm", codec="libvpx-vp9", deadline="realtime"), ""),
        "good.mkv": (video(numbers(20)[::-1], container="matroska"), ""),
        "good.gif": (ORIGINALS["gif"], ""),
        "good.webp": (encode_clip(numbers(16)[::-1], 24, "webp"), ""),
        "image.png": (png(1, 64, 64), ""),
        "short.mp4": (video(8), TOO_SHORT),
        "small.mp4": (video(numbers(20, 16, 16)), TOO_SMALL),
        "still.mp4": (video(still), TOO_STILL),
        "cut.mp4": (video(cut), CUT),
        "slow.mp4": (video(numbers(21)[::-1], fps=5), "expression false: fps is None or fps >= 8"),
        "truncated.mp4": (half(video(21)), BROKEN),
        "noise.mp4": (np.random.default_rng(0).bytes(3000), UNKNOWN),
        "copy.mp4": (video(20), "dedupe: same file"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
        (folder / f"{name}.txt").write_text(f"caption of {name}")
    config = config_of(
        tmp_path,
        ("folder", folder),
        clips=ClipsConfig(frames=[9], min_motion=0.5, max_jump=150.0, format="webp"),
        buckets=BucketConfig(resolution=32, max_aspect=1.0, step=16),
        filters=[FilterConfig("expression", "fps is None or fps >= 8")],
        dedupe=DedupeConfig(exact=True),
    )
    dataset = prepare(config)
    good = {name for name, (_, reason) in files.items() if reason == ""} - {"good.mp4"} | {"copy.mp4"}
    assert {pair.key for pair in all_pairs(dataset)} == good
    reasons = reasons_of(dataset)
    assert sum(reasons.values()) == len(files) - len(good)
    for name, (_, reason) in files.items():
        assert reason is None or not reason or reason in reasons, name
    assert any(reason.startswith("clip: ") for reason in reasons)
