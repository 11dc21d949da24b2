"""Hostile input: each row ends up in a pair or in a table with its reason, and nothing stops a task."""

import io
import tarfile

import pytest

from data_prep.config import FilterConfig
from data_prep.dataset.accounts import account
from data_prep.images.images import DAMAGED, EMPTY, FORMATS, TOO_LARGE, UNKNOWN
from data_prep.sources.sample import CUT_SHORT, NO_IMAGE, UNREADABLE
from data_prep.sources.webdataset import BAD_JSON, LINK, TWICE, UNSAFE
from tests.helpers.raw_material import (
    all_pairs,
    bomb,
    config_of,
    encoded,
    png,
    prepare,
    reasons_of,
    sample_members,
    smooth_image,
    tar_bytes,
    write_parquet,
    write_tar,
)

GOOD = sample_members("good", png(100), {"caption": "a good one"})


def member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def prepared(tmp_path, source=("webdataset", "in"), **settings):
    """Prepare `tmp_path/in`; return the captions of the pairs, and the number of dropped rows by reason."""
    dataset = prepare(config_of(tmp_path, (source[0], tmp_path / source[1]), **settings))
    for file in account(dataset):
        assert file.read == file.dropped_by_plan + file.written + file.dropped_in_parts
    captions = []
    for pair in all_pairs(dataset):
        captions += [text for _, text in pair.captions]
    return sorted(captions), reasons_of(dataset)


def test_bad_images_of_every_kind(tmp_path):
    flipped = bytearray(png(5))
    flipped[60] ^= 0xFF
    hostile = {
        "empty": (b"", EMPTY),
        "text": (b"hello", UNKNOWN),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UNKNOWN),
        "bomb": (bomb(), TOO_LARGE),
        "half_png": (png(1)[: len(png(1)) // 2], DAMAGED),
        "half_jpeg": (encoded(smooth_image(2), "JPEG")[:400], DAMAGED),
        "half_webp": (encoded(smooth_image(3), "WEBP")[:100], DAMAGED),
        "flipped": (bytes(flipped), DAMAGED),
        "one_pixel": (png(4, 1, 1), "bucket: would grow too much"),
        "long": (encoded(smooth_image(6, 1, 30000)), "bucket: would grow too much"),
        "strip": (encoded(smooth_image(7, 40, 4000)), "bucket: crop would lose too much"),
    }
    members = []
    for name, (data, _) in hostile.items():
        members += sample_members(name, data, {"caption": name})
    write_tar(tmp_path / "in", "a.tar", members + GOOD)
    captions, reasons = prepared(tmp_path)
    assert captions == ["a good one"]
    expected = [reason for _, reason in hostile.values()]
    assert reasons == {reason: expected.count(reason) for reason in expected}


@pytest.mark.parametrize("image_format", FORMATS)
def test_truncated_and_flipped_images_of_each_format(tmp_path, image_format):
    whole = encoded(smooth_image(1), image_format)
    members = []
    for n in range(24):
        flipped = bytearray(whole)
        flipped[len(whole) * n // 24] ^= 1 << n % 8
        members += sample_members(f"flipped{n}", bytes(flipped), {"caption": f"flipped {n}"})
        if n < 12:
            members += sample_members(f"cut{n}", whole[: len(whole) * n // 12], {"caption": f"cut {n}"})
    write_tar(tmp_path / "in", "a.tar", members + GOOD)
    captions, reasons = prepared(tmp_path)
    assert "a good one" in captions
    assert len(captions) + sum(reasons.values()) == 24 + 12 + 1
    known = {EMPTY, UNKNOWN, DAMAGED, TOO_LARGE}
    assert all(reason in known or reason.startswith("bucket:") for reason in reasons)
    assert not [caption for caption in captions if caption.startswith("cut")]


def test_tar_with_evil_names_links_and_repeats(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(member("folder", tarfile.DIRTYPE))
        unsafe = sample_members("../up", png(1), {"caption": "x"}) + sample_members(
            "/abs", png(2), {"caption": "x"}
        )
        for name, data in unsafe:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(member("link.png", tarfile.SYMTYPE, "/etc/passwd"))
        tar.addfile(member("hard.png", tarfile.LNKTYPE, "../up.png"))
        tar.addfile(member("pipe.png", tarfile.FIFOTYPE))
        first = sample_members("twice", png(3), {"caption": "first"})
        second = sample_members("twice", png(4), {"caption": "second"})
        bad = [("bad.json", b"[1]"), ("bad.png", png(5)), ("deep.png", png(6)), ("deep.json", b"[" * 100000)]
        for name, data in [*first, *GOOD, *second, *bad]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(buffer.getvalue())
    captions, reasons = prepared(tmp_path)
    assert captions == ["a good one", "first"]
    assert reasons == {UNSAFE: 2, LINK: 3, TWICE: 1, BAD_JSON: 2}


@pytest.mark.parametrize("cut", ["member", "middle", "header"])
def test_cut_tars_say_so(tmp_path, cut):
    members = []
    for n in range(4):
        members += sample_members(f"{n}", png(n), {"caption": f"caption {n}"})
    data = tar_bytes(members, end=False)
    if cut == "middle":
        data = data[:-700]
    elif cut == "header":
        broken = bytearray(tar_bytes(members))
        broken[len(tar_bytes(members[:6], end=False)) + 150] ^= 0xFF
        data = bytes(broken)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(data)
    captions, reasons = prepared(tmp_path)
    whole = 4 if cut == "member" else 3
    assert captions == [f"caption {n}" for n in range(whole)]
    assert reasons[CUT_SHORT] == 1


def test_files_that_are_not_what_they_are_called(tmp_path):
    write_tar(tmp_path / "in", "good.tar", GOOD)
    for name, data in (
        ("a.tar", b""),
        ("b.tar", b"no tar" * 500),
        ("c.tar", bytes(10240)),
        ("d.tar", png(1) * 9),
    ):
        (tmp_path / "in" / name).write_bytes(data)
    captions, reasons = prepared(tmp_path)
    assert captions == ["a good one"]
    assert reasons == {UNREADABLE: 3}


def test_hostile_captions(tmp_path):
    texts = {
        "nul": ("a\0b", "caption: control characters"),
        "surrogate": ("a\ud800b", "caption: not UTF-8"),
        "huge": ("x" * (1 << 20), "caption: over 65536 bytes"),
        "number": (7, "caption: not text"),
        "none": (None, "caption: missing"),
        "spaces": (" \n ", "caption: empty"),
        "rtl": ("קשת בענן \u202eabc", ""),
        "cjk": ("雪中的红狐狸", ""),
        "emoji": ("👩‍🚀 in space", ""),
    }
    members = []
    for n, (key, (text, _)) in enumerate(texts.items()):
        members += sample_members(key, png(n), {"caption": text})
    write_tar(tmp_path / "in", "a.tar", [*members, ("latin.png", png(50)), ("latin.txt", b"caf\xe9")])
    captions, reasons = prepared(tmp_path)
    assert captions == sorted(text for text, reason in texts.values() if not reason)
    expected = [reason for _, reason in texts.values() if reason] + ["caption: not UTF-8"]
    assert reasons == {reason: expected.count(reason) for reason in expected}


def test_hostile_parquet(tmp_path):
    rows = [{"image": png(1), "caption": "good"}, {"image": None, "caption": "no image"}]
    write_parquet(tmp_path / "in/a.parquet", rows)
    write_parquet(tmp_path / "in/b.parquet", [{"caption": "no column"}] * 3)
    write_parquet(tmp_path / "in/c.parquet", [{"image": png(2), "other": "no caption column"}])
    write_parquet(tmp_path / "in/d.parquet", [{"image": 5, "caption": "a number"}])
    whole = (tmp_path / "in/a.parquet").read_bytes()
    (tmp_path / "in/e.parquet").write_bytes(whole[:-20])
    (tmp_path / "in/f.parquet").write_bytes(b"")
    broken = bytearray(whole)
    broken[20:200] = bytes(180)
    (tmp_path / "in/g.parquet").write_bytes(bytes(broken))
    captions, reasons = prepared(tmp_path, ("parquet", "in"))
    assert captions[0] == "good"
    assert reasons["source: no image column"] == 3
    assert reasons["caption: missing"] == 1
    assert reasons[NO_IMAGE] >= 1
    assert reasons["source: image is neither bytes nor a path"] == 1
    assert reasons[UNREADABLE] >= 2


def test_columns_of_mixed_types_stop_nothing(tmp_path):
    scores = [5, "5", None, [1], {"a": 1}, 4.0, True, 10**400, 6.5]
    members = []
    for n, score in enumerate(scores):
        members += sample_members(str(n), png(n), {"caption": f"c{n}", "score": score})
    write_tar(tmp_path / "in", "a.tar", members)
    captions, reasons = prepared(tmp_path, filters=[FilterConfig("expression", "score >= 4.5")])
    assert captions == ["c0", "c8"]
    assert reasons == {"expression false: score >= 4.5": 1, "expression without a value: score >= 4.5": 6}
