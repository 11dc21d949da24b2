"""Clips from every kind of source, the same at any number of workers, and duplicates among them."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.clips.media import encode_clip
from data_prep.config import BucketConfig, ClipsConfig, DedupeConfig, FilterConfig
from data_prep.dataset.parts import committed, read_plan
from data_prep.dataset.schema import PAIRS
from data_prep.pairs.pairs import CLIP_COLUMNS, COLUMNS, read_clip
from data_prep.plan.budget import print_budget
from data_prep.plan.dedupe import clip_hash
from data_prep.plan.plan import check_settings
from data_prep.report import write_report
from data_prep.store.store import open_store
from model.common import extras
from model.common.errors import UserError
from tests.helpers.raw_material import (
    all_pairs,
    config_of,
    png,
    prepare,
    reasons_of,
    sample_members,
    smooth_image,
    write_mds_folder,
    write_parquet,
    write_tar,
)
from tests.helpers.videos import number_of, numbered, video


def moving(seed, frames=24, height=48, width=64):
    """Return a clip of a smooth image that moves, uint8 [T, H, W, 3]."""
    image = np.asarray(smooth_image(seed, height, 2 * width)) // 2 + 64
    return np.stack([image[:, 2 * shift : 2 * shift + width] for shift in range(frames)])


def clips_of(tmp_path, *sources, **settings):
    defaults = {
        "clips": ClipsConfig(frames=[5, 9], fps=24),
        "buckets": BucketConfig(resolution=32, max_aspect=2.0, step=16),
    }
    return config_of(tmp_path, *sources, **{**defaults, **settings})


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The same kinds of files in a folder, a tar, a parquet and shards of mosaicml-streaming."""
    root = tmp_path_factory.mktemp("raw")
    files = {
        "a.mp4": video(moving(0), bf="2"),
        "b.webm": video(moving(1), container="webm", codec="libvpx-vp9", deadline="realtime"),
        "c.mkv": video(moving(2, frames=7), container="matroska"),
        "d.webp": encode_clip(moving(3), 24, "webp"),
        "e.png": png(4, 48, 64),
    }
    (root / "folder").mkdir()
    for name, data in files.items():
        (root / "folder" / name).write_bytes(data)
        (root / "folder" / f"{name[0]}.txt").write_text(f"clip {name}")
    members = []
    for name, data in files.items():
        members += sample_members(f"t{name[0]}", data, {"caption": f"clip {name}"}, name[2:])
    write_tar(root / "tar", "a.tar", members)
    rows = [{"image": data, "caption": f"clip {name}"} for name, data in files.items()]
    write_parquet(root / "p/a.parquet", rows, 2)
    write_mds_folder(root / "m", rows, {"image": "bytes", "caption": "str"})
    return root


def payloads(config):
    """Return part -> the bytes of its files, by their name."""
    dataset = prepare(config)
    return dataset, {
        str(part): {file.key.rpartition("/")[2]: dataset.read(file.key) for file in commit.files}
        for part, commit in committed(dataset, PAIRS).items()
    }


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet", "mds"])
def test_each_kind_of_source_gives_the_same_clips(tmp_path, raw, kind):
    path = raw / {"folder": "folder", "webdataset": "tar", "parquet": "p", "mds": "m"}[kind]
    dataset = prepare(clips_of(tmp_path, (kind, path)))
    assert reasons_of(dataset) == {}
    pairs = {pair.captions[0][1]: pair for pair in all_pairs(dataset)}
    lengths = {name: pair.frames for name, pair in pairs.items()}
    expected = {"a.mp4": 9, "b.webm": 9, "c.mkv": 5, "d.webp": 9, "e.png": 1}
    assert lengths == {f"clip {name}": frames for name, frames in expected.items()}
    reference = prepare(clips_of(tmp_path / "reference", ("folder", raw / "folder")))
    for other in all_pairs(reference):
        assert np.array_equal(read_clip(pairs[other.captions[0][1]]), read_clip(other))


def test_clips_are_the_same_bytes_at_any_number_of_workers(tmp_path, raw):
    clips = ClipsConfig(frames=[5, 9], start="random")
    results = []
    for workers in (0, 1, 3):
        config = clips_of(tmp_path / str(workers), ("folder", raw / "folder"), workers=workers, clips=clips)
        results.append(payloads(config)[1])
    assert results[0] == results[1] == results[2]
    assert {part.partition("/")[0].count("x") for part in results[0]} == {1, 2}


def test_a_random_start_depends_on_the_content_and_not_on_the_list_of_files(tmp_path):
    first, second, both = tmp_path / "1", tmp_path / "2", tmp_path / "both"
    for folder, names in ((first, "a"), (second, "b"), (both, "ba")):
        folder.mkdir()
        for place, name in enumerate(names):
            data = video(np.stack([numbered(n + 100 * (name == "b")) for n in range(60)]))
            (folder / f"{place}{name}.mp4").write_bytes(data)
            (folder / f"{place}{name}.txt").write_text(name)

    def starts(folder, seed=0):
        clips = ClipsConfig(frames=[9], start="random", format="webp")
        config = clips_of(
            tmp_path / f"{folder.name}-{seed}",
            ("folder", folder),
            clips=clips,
            seed=seed,
            buckets=BucketConfig(resolution=48, max_aspect=2.0, step=16, max_upscale=2.0),
        )
        return {p.captions[0][1]: number_of(read_clip(p)[0]) for p in all_pairs(prepare(config))}

    assert starts(both) == {**starts(first), **starts(second)}
    assert len({tuple(starts(both, seed).values()) for seed in range(4)}) > 1


def test_parts_of_images_have_the_columns_and_settings_of_before(tmp_path, raw):
    """A dataset without `clips` records no such key, takes an animation's first frame, and reads no video."""
    config = clips_of(tmp_path, ("folder", raw / "folder"), clips=None)
    dataset = prepare(config)
    assert b"clips" not in dataset.read("dataset.json")
    assert reasons_of(dataset) == {"source: not an image file": 3}
    assert {pair.frames for pair in all_pairs(dataset)} == {1}
    clips = prepare(clips_of(tmp_path / "clips", ("folder", raw / "folder")))
    names = {1: COLUMNS.names, 2: CLIP_COLUMNS.names}
    for store, sides in ((dataset, {1}), (clips, {1, 2})):
        found = {}
        for part, commit in committed(store, PAIRS).items():
            key = next(file.key for file in commit.files if file.key.endswith("pairs.parquet"))
            found[part.bucket.count("x")] = pq.read_schema(io.BytesIO(store.read(key))).names
        assert found == {side: names[side] for side in sides}
    with pytest.raises(UserError, match="`clips` was"):
        check_settings(config, clips)


def test_near_duplicates_are_found_by_three_frames(tmp_path):
    """The same clip in another size, codec and quality is one; one with another start or end is none."""
    folder = tmp_path / "v"
    folder.mkdir()
    scenes = [moving(seed, 12, 96, 128) for seed in range(4)]
    small = np.stack([np.asarray(f)[::2, ::2] for f in scenes[0]])
    files = {
        "0.mp4": video(scenes[0]),
        "1.webm": video(small, container="webm", codec="libvpx-vp9", deadline="realtime"),
        "2.mp4": video(scenes[1], crf="30"),
        "3.mp4": video(np.concatenate([scenes[0][:4], scenes[2][4:]])),
        "4.mp4": video(np.concatenate([scenes[3][:8], scenes[0][8:]])),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / f"{name[0]}.txt").write_text(name)
    dataset = prepare(clips_of(tmp_path, ("folder", folder), dedupe=DedupeConfig(near=5)))
    assert reasons_of(dataset) == {"dedupe: looks the same": 1}
    assert {pair.key for pair in all_pairs(dataset)} == set(files) - {"1.webm"}


def test_a_clip_has_bits_of_all_three_frames():
    frames = [np.asarray(smooth_image(seed, 64, 64)) for seed in range(6)]
    base = clip_hash(frames[:3])
    assert 0 <= base < 1 << 64
    for place in range(3):
        changed = list(frames[:3])
        changed[place] = frames[3 + place]
        assert 3 <= (clip_hash(changed) ^ base).bit_count() <= 22


def test_clips_are_read_from_a_bucket(tmp_path, raw, s3):
    store = open_store(s3)
    for path in (raw / "folder").iterdir():
        store.put_new(path.name, path.read_bytes())
    dataset = prepare(clips_of(tmp_path, ("folder", s3)))
    assert reasons_of(dataset) == {}
    assert sorted(pair.frames for pair in all_pairs(dataset)) == [1, 5, 9, 9, 9]


def test_the_report_shows_clips_as_contact_sheets(tmp_path, raw):
    # Two of the five are left out, and shown by their first frame.
    clips = ClipsConfig(frames=[9], fps=24, max_jump=200.0)
    filters = [FilterConfig("min_value", 0, "fps")]
    config = clips_of(tmp_path, ("folder", raw / "folder"), clips=clips, filters=filters)
    dataset = prepare(config)
    assert reasons_of(dataset) == {"min_value: no fps": 1, "bucket: too short": 1}
    write_report(config, dataset, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for title in ("Length of clips, seconds", "Frames per second of clips", "Motion of clips"):
        assert title in page
    assert page.count("data:image/jpeg") == 5


def test_metadata_names_videos(tmp_path, raw):
    lines = [{"file_name": name, "caption": name, "fps_wanted": 3} for name in ("a.mp4", "b.webm")]
    folder = tmp_path / "v"
    folder.mkdir()
    for line in lines:
        (folder / line["file_name"]).write_bytes((raw / "folder" / line["file_name"]).read_bytes())
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = all_pairs(prepare(clips_of(tmp_path, ("folder", folder))))
    assert sorted(pair.captions[0][1] for pair in pairs) == ["a.mp4", "b.webm"]


def test_videos_without_the_setting_or_the_package_end_with_the_way_out(tmp_path, monkeypatch):
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(video(9))
    with pytest.raises(UserError, match=r"1 \.mp4.*set `clips` to read videos"):
        prepare(clips_of(tmp_path, ("folder", folder), clips=None))
    (folder / "a.txt").write_text("a caption")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package av is missing: install the extra.*\[video\]"):
        prepare(clips_of(tmp_path, ("folder", folder)))


def test_the_plan_prints_clips_by_their_length(tmp_path, raw, capsys):
    config = clips_of(tmp_path, ("folder", raw / "folder"), clips=ClipsConfig(frames=[5, 9, 33]))
    dataset = prepare(config)
    print_budget(config, dataset, read_plan(dataset), 100.0)
    assert "by number of frames: 1 of 1, 1 of 5, 3 of 9, 0 of 33" in capsys.readouterr().out
