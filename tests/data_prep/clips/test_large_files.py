"""Videos that are larger than memory may hold: read in ranges, with the same clips."""

import functools
import io
import pickle
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.clips import large_file
from data_prep.clips.clips import fit_clip, is_clip, probe_clip
from data_prep.clips.large_file import BUFFER_BYTES, LargeFile, media_hash
from data_prep.config import BucketConfig, ClipsConfig
from data_prep.dataset.schema import Bucket
from data_prep.images.images import MAX_FILE_BYTES, ImageError
from data_prep.pairs.pairs import read_clip
from data_prep.sources import files as source_files
from data_prep.sources import media, webdataset
from data_prep.sources.sample import TOO_LARGE
from data_prep.sources.source import open_source
from tests.helpers.raw_material import all_pairs, config_of, prepare, reasons_of
from tests.helpers.videos import video

CLIPS = ClipsConfig(frames=[9], min_motion=0.0, max_jump=255.0, format="webp")
SETTINGS = {"clips": CLIPS, "buckets": BucketConfig(resolution=32, max_aspect=2.0, step=16), "part_rows": 2}


class CountedFile(io.BytesIO):
    """Bytes that record the sizes of all reads."""

    def __init__(self, data, reads):
        super().__init__(data)
        self.reads = reads

    def read(self, size=-1):
        data = super().read(size)
        self.reads.append(len(data))
        return data


@settings(max_examples=10, deadline=None)
@given(
    container=st.sampled_from(["mp4", "matroska", "webm"]), before=st.integers(0, 9), after=st.integers(0, 9)
)
def test_a_file_read_in_ranges_gives_the_same_clip(container, before, after):
    data = video(40, container=container, codec="libx264" if container != "webm" else "libvpx-vp9")
    within = bytes(range(before)) + data + bytes(after)
    large = LargeFile.of(functools.partial(io.BytesIO, within), len(data), before)
    assert is_clip(large)
    assert probe_clip(large, CLIPS, (0, 1)) == probe_clip(data, CLIPS, (0, 1))
    bucket = Bucket(24, 32, 9)
    whole, ranged = fit_clip(data, bucket, CLIPS, (0, 1)), fit_clip(large, bucket, CLIPS, (0, 1))
    assert np.array_equal(whole.frames, ranged.frames)
    assert (whole.choice, whole.crop) == (ranged.choice, ranged.crop)


def test_memory_does_not_grow_with_the_length_of_a_file():
    noise = np.random.default_rng(0).integers(0, 255, (300, 256, 192, 3), np.uint8)
    data = video(noise, container="matroska", codec="ffv1", pix_fmt="yuv444p")
    assert len(data) > 8 * BUFFER_BYTES
    peaks = {}
    for name, frames in (("short", 30), ("long", 300)):
        part = data if name == "long" else video(noise[:frames], "matroska", "ffv1", pix_fmt="yuv444p")
        reads = []
        file = LargeFile.of(lambda part=part, reads=reads: CountedFile(part, reads), len(part))
        reads.clear()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        assert probe_clip(file, CLIPS, (0, 1)).frames == frames
        fit_clip(file, Bucket(32, 32, 9), CLIPS, (0, 1))
        # BytesIO shares the bytes that it is made of.
        peaks[name] = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        assert max(reads) <= BUFFER_BYTES
    assert peaks["long"] < peaks["short"] + BUFFER_BYTES / 4 < 4 * BUFFER_BYTES


def test_the_hash_follows_size_and_content_and_reads_little():
    data, reads = np.random.default_rng(0).bytes(10 << 20), []

    def of(data):
        return LargeFile.of(lambda: CountedFile(data, reads), len(data))

    first = of(data)
    reads.clear()
    assert media_hash(first) == media_hash(of(data))
    reads.clear()
    media_hash(first)
    assert sum(reads) <= 2 * large_file.HASH_BLOCKS * large_file.HASH_BLOCK_BYTES
    for other in (data[:-1], data + b"x", b"x" + data[1:], data[:-1] + bytes([data[-1] ^ 1])):
        assert media_hash(of(other)) != media_hash(first)


def test_a_large_file_can_be_sent_to_a_worker():
    file = LargeFile.of(functools.partial(io.BytesIO, video(20)), len(video(20)))
    sent = pickle.loads(pickle.dumps(file))
    assert media_hash(sent) == media_hash(file)
    assert probe_clip(sent, CLIPS, (0, 1)).frames == 20


def padded(data, size):
    """The header of an mp4's `free` box that makes the file `size` bytes long."""
    return data + struct.pack(">I4sQ", 1, b"free", size - len(data))


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_video_of_more_than_256_mb_goes_through_the_commands(tmp_path, kind):
    """A sparse file: nothing of its 300 MB of padding is on the disk, or is read."""
    size, data = MAX_FILE_BYTES + (44 << 20), padded(video(40), MAX_FILE_BYTES + (44 << 20))
    raw = tmp_path / "raw"
    raw.mkdir()
    if kind == "folder":
        with (raw / "a.mp4").open("wb") as file:
            file.write(data)
            file.truncate(size)
        (raw / "a.txt").write_text("a long video")
    else:
        write_sparse_tar(raw / "0.tar", data, size)

    config = config_of(tmp_path, (kind, raw, {"captions": {"original": "txt"}}.items()), **SETTINGS)
    tracemalloc.start()
    dataset = prepare(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert reasons_of(dataset) == {}
    (pair,) = all_pairs(dataset)
    expected = fit_clip(video(40), Bucket(pair.height, pair.width, 9), CLIPS, (0, 0))
    assert np.array_equal(read_clip(pair), expected.frames)


def write_sparse_tar(path, data, size):
    """Write a tar of a video that begins with `data` and is `size` bytes long, and of its caption."""
    text = b"a long video"
    with path.open("wb") as file:
        for name, length, content in (("a.mp4", size, data), ("a.txt", len(text), text)):
            member = tarfile.TarInfo(name)
            member.size = length
            file.write(member.tobuf())
            start = file.tell()
            file.write(content)
            file.seek(start + -(-length // 512) * 512)
        file.write(bytes(1024))


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_file_beyond_the_bound_is_left_out_with_the_reason(tmp_path, monkeypatch, kind):
    for module, name in ((source_files, "MAX_FILE_BYTES"), (webdataset, "MAX_FILE_BYTES")):
        monkeypatch.setattr(module, name, 1000)
    for module in (media, webdataset):
        monkeypatch.setattr(module, "MAX_VIDEO_BYTES", len(video(20)) + 10)
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, frames in (("kept", 20), ("left", 60)):
        data = video(frames)
        if kind == "folder":
            (raw / f"{name}.mp4").write_bytes(data)
            (raw / f"{name}.txt").write_text(name)
        else:
            write_sparse_tar(raw / f"{name}.tar", data, len(data))
    monkeypatch.setattr(source_files.SourceFiles.read, "__defaults__", (1000,))
    config = config_of(tmp_path, (kind, raw, {"captions": {"original": "txt"}}.items()), **SETTINGS)
    dataset = prepare(config)
    assert len(all_pairs(dataset)) == 1
    reason = TOO_LARGE if kind == "folder" else webdataset.IMAGE_TOO_LARGE
    assert reasons_of(dataset) == {reason: 1}


def test_large_and_small_videos_of_a_tar_are_fetched_at_their_places(tmp_path, monkeypatch):
    small, large = video(20), video(np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8))
    monkeypatch.setattr(webdataset, "MAX_FILE_BYTES", (len(small) + len(large)) // 2)
    raw = tmp_path / "raw"
    raw.mkdir()
    with tarfile.open(raw / "0.tar", "w") as tar:
        for number, data in enumerate((small, large, small, large)):
            member = tarfile.TarInfo(f"{number}.mp4")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

    config = config_of(tmp_path, ("webdataset", raw, {"captions": {"original": "txt"}}.items()), **SETTINGS)
    source = open_source(config, config.sources[0])
    places = [sample.place for sample in source.read("0.tar", [])][::-1]
    fetched = dict(source.fetch("0.tar", places))
    assert sorted(fetched) == [0, 1, 2, 3]
    assert [isinstance(fetched[place], LargeFile) for place in range(4)] == [True, False, True, False]
    for place, data in enumerate((large, small, large, small)):
        found = fetched[place]
        assert (found if isinstance(found, bytes) else found.open().read()) == data


def test_a_large_video_in_a_bucket_is_read_by_ranged_requests(s3, tmp_path, monkeypatch):
    from data_prep.store.store import open_store

    monkeypatch.setattr(source_files.SourceFiles.read, "__defaults__", (1000,))
    data = video(np.random.default_rng(0).integers(0, 255, (40, 128, 128, 3), np.uint8))
    store = open_store(s3, create=True)
    store.put("raw/a.mp4", data)
    store.put("raw/a.txt", b"a video")
    ranges = []
    read_range = source_files.SourceFiles.read_range

    def recorded(self, name, start, length):
        ranges.append(length)
        return read_range(self, name, start, length)

    monkeypatch.setattr(source_files.SourceFiles, "read_range", recorded)
    config = config_of(
        tmp_path, ("folder", f"{s3}/raw", {"captions": {"original": "txt"}}.items()), **SETTINGS
    )
    dataset = prepare(config)
    (pair,) = all_pairs(dataset)
    expected = fit_clip(data, Bucket(pair.height, pair.width, 9), CLIPS, (0, 0))
    assert np.array_equal(read_clip(pair), expected.frames)
    assert ranges
    assert max(ranges) <= large_file.BUFFER_BYTES


def test_what_only_has_the_name_of_a_video_is_refused():
    file = LargeFile.of(functools.partial(io.BytesIO, bytes(5000)), 5000)
    with pytest.raises(ImageError, match="unknown kind of file"):
        probe_clip(file, CLIPS, (0, 1))
