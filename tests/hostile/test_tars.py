"""Hostile tars: a bad member costs one row, and nothing hangs or is read unbounded."""

import bz2
import gzip
import io
import lzma
import tarfile

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.images.images import MAX_FILE_BYTES
from data_prep.sources.sample import (
    CUT_SHORT,
    NO_IMAGE,
    UNREADABLE,
)
from data_prep.sources.webdataset import APART, SEVERAL, read_tar
from model.common.errors import UserError
from tests.helpers.raw_material import (
    png,
    rows_of,
    sample_members,
    tar_bytes,
)

PNG = png(1)


def header(name, size, kind=tarfile.REGTYPE):
    """Return a tar header that announces any size, also a negative one."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


GOOD = sample_members("good", PNG, {"caption": "a good one"})
WHOLE = tar_bytes(GOOD, end=False)


@pytest.mark.parametrize(
    "bad",
    [
        header("x.png", -512),
        header("x.png", -1),
        header("x.png", -len(WHOLE) - 512),
        header("x", 1 << 40, tarfile.XHDTYPE),
        header("x", 1 << 40, tarfile.XGLTYPE),
        header("x", 1 << 40, tarfile.GNUTYPE_LONGNAME),
        header("x", 1 << 40, tarfile.GNUTYPE_LONGLINK),
        header("x", 10, tarfile.GNUTYPE_LONGNAME) * 5000,
        (header("x", 20, tarfile.XHDTYPE) + b"20 size=-1000000000\n".ljust(512, b"\0")) * 2,
        (header("x", 1, tarfile.GNUTYPE_LONGNAME) + bytes(512)) * 5000,
    ],
    ids=range(10),
)
def test_headers_of_tars_cannot_lie_about_sizes(bad):
    rows = []
    for row in read_tar(io.BytesIO(WHOLE + bad + WHOLE)):
        rows.append(row)
        assert len(rows) < 10, "the tar does not end"
    assert rows[0].image == PNG
    assert rows[-1].reason == CUT_SHORT
    # As the first member, it makes the whole tar unreadable.
    assert [row.reason for row in read_tar(io.BytesIO(bad + WHOLE))][-1] in (CUT_SHORT, UNREADABLE)


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        ("gzip", gzip.compress(WHOLE)),
        ("zstd", pa.compress(WHOLE, "zstd", asbytes=True)),
        ("xz", lzma.compress(WHOLE)),
        ("bzip2", bz2.compress(WHOLE)),
    ],
)
def test_a_compressed_tar_is_one_row_that_names_the_way_out(tmp_path, codec, data):
    (row,) = read_tar(io.BytesIO(data))
    assert (row.reason, row.detail) == (UNREADABLE, f"compressed with {codec}: decompress it")

    # By its name it is not read at all.
    suffix = {"gzip": "gz", "zstd": "zst", "xz": "xz", "bzip2": "bz2"}[codec]
    (tmp_path / f"a.tar.{suffix}").write_bytes(data)
    for place, line in (
        (tmp_path / f"a.tar.{suffix}", rf"tar\.{suffix}: a compressed file, not a \.tar file: decompress it"),
        (tmp_path, rf"there are: 1 \.tar\.{suffix}\): decompress them, or check"),
    ):
        with pytest.raises(UserError, match=line):
            rows_of("webdataset", place)


def test_a_sparse_member_whose_map_is_cut_ends_the_tar():
    info = tarfile.TarInfo("x")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[156:157], block[482] = tarfile.GNUTYPE_SPARSE, 1
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    assert [row.reason for row in read_tar(io.BytesIO(bytes(block)))] == [UNREADABLE]
    assert [row.reason for row in read_tar(io.BytesIO(WHOLE + block))] == ["", CUT_SHORT]


class BrokenDisk(io.BytesIO):
    """A file whose second half cannot be read."""

    def read(self, size=-1, /):
        if self.tell() + max(0, size) > len(self.getbuffer()) // 2:
            raise OSError(5, "Input/output error")
        return super().read(size)


def test_a_fault_of_the_disk_stops_the_scan_and_costs_no_rows():
    with pytest.raises(OSError, match="Input/output error"):
        list(read_tar(BrokenDisk(WHOLE * 4)))


class CountingReader(io.BytesIO):
    """A file that remembers the largest read."""

    largest = 0

    def read(self, size=-1, /):
        self.largest = max(self.largest, 1 << 62 if size is None or size < 0 else size)
        return super().read(size)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1535), st.integers(0, 255)), max_size=6), st.integers(0, 1536))
@example([(124, 0x80)], 1536)
@example([(124, 0xFF), (125, 0xFF)], 1536)
def test_tars_of_any_headers_end_and_read_little(changes, cut):
    data = bytearray(tar_bytes([("a.png", PNG[:100]), ("a.txt", b"text")]))
    for place, value in changes:
        data[place] = value
    # With a right checksum, the header's other fields are believed.
    data[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[:512]))[0]
    file = CountingReader(bytes(data[: len(data) - cut]))
    rows = []
    for row in read_tar(file):
        rows.append(row)
        assert len(rows) < 50
    assert file.largest <= MAX_FILE_BYTES


def test_members_that_are_no_data_never_part_a_sample():
    (image, document), other = GOOD, sample_members("next", png(2), {"caption": "next"})
    between = [
        ("._good.png", b"apple"),
        (".hidden/x.png", PNG),
        ("README.md", b"notes"),
        ("good.npy", b"array"),
    ]
    for extra in between:
        rows = list(read_tar(io.BytesIO(tar_bytes([image, extra, document, *other]))))
        good = [row for row in rows if not row.reason]
        assert [row.record["caption"] for row in good] == ["a good one", "next"]
        assert [row.reason for row in rows if row.reason] == ([NO_IMAGE] if extra[0] == "README.md" else [])


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        (["7.image.jpg", "7.caption.txt"], ["text"]),
        (["7.jpg", "7.mask.png", "7.txt"], ["text"]),
        (["7.mask.png", "7.jpg", "7.meta.json"], ["json"]),
        (["photo v1.0.png", "photo v1.0.txt"], ["text"]),
        (["a/b.x.png", "a/b.txt", "a/c.x.png", "a/c.txt"], ["text", "text"]),
        (["7.heic", "7.txt", "8.png", "8.txt"], ["text"]),
    ],
)
def test_the_last_part_of_a_suffix_says_what_a_member_is(names, texts):
    contents = {"txt": b"text", "json": b'{"caption": "json"}'}
    members = [(name, contents.get(name.rpartition(".")[2], PNG)) for name in names]
    rows = list(read_tar(io.BytesIO(tar_bytes(members))))
    assert [row.record["caption"] for row in rows if not row.reason] == texts


def test_a_setting_names_the_image_among_several():
    members = [("0.input.png", PNG), ("0.mask.png", png(2)), ("0.output.txt", b"text")]
    (row,) = read_tar(io.BytesIO(tar_bytes(members)), "mask.png")
    assert (row.image, row.record["caption"], row.record["output.txt"]) == (png(2), "text", "text")
    rows = list(read_tar(io.BytesIO(tar_bytes(members))))
    assert [row.reason for row in rows] == [SEVERAL] * 2
    assert "input.png, mask.png, output.txt: name one in `sources.image`" in rows[0].detail


def test_dots_in_names_cost_a_row_for_each_image():
    members = []
    for n in range(4):
        members += [(f"photo v1.{n}.png", png(n)), (f"photo v1.{n}.txt", b"text")]
    rows = list(read_tar(io.BytesIO(tar_bytes(members))))
    assert [row.reason for row in rows] == [SEVERAL] * 4
    assert len({row.key for row in rows}) == 4


def test_tars_that_are_not_sorted_say_so():
    members = [(f"{n}.png", PNG) for n in range(3)] + [(f"{n}.txt", b"text") for n in range(3)]
    rows = list(read_tar(io.BytesIO(tar_bytes(members))))
    assert [row.reason for row in rows[3:]] == [APART] * 3
    assert "sort the tar by name" in rows[3].detail
