"""GGUF files of strangers: parts of a model, types that are not known, damaged headers. One line each."""

import struct
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.common.errors import UserError
from model.config import TextConfig
from model.encoders.gguf import GGUFFile, count_blocks
from model.encoders.language_model import load_language_model

WORD = b"general.word"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a small file, whose only missing thing is a whole model."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_uint32("split.count", 1)
    writer.add_string(WORD.decode(), "kept")
    writer.add_token_list(["<unk>", "<s>", "a"])
    writer.add_token_scores([0.0, 0.0, -1.0])
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight"):
        writer.add_tensor(name, np.ones((4, 32), np.float32))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    return path.read_bytes()


def replaced(content, name, old, new):
    """Replace a number that follows a name; both are little-endian and of 32 bits."""
    at = content.index(name) + len(name)
    at = content.index(struct.pack("<I", old), at)
    return content[:at] + struct.pack("<I", new) + content[at + 4 :]


def opened(tmp_path, content):
    path = tmp_path / "odd.gguf"
    path.write_bytes(content)
    return GGUFFile(path)


def test_the_small_file_is_read(tmp_path, whole):
    file = opened(tmp_path, whole)
    assert count_blocks(file) == 2
    assert file.tensor("token_embd.weight").shape == (4, 32)


def test_what_cannot_be_read_is_named(tmp_path, whole):
    # behind the name: the number of dimensions, two of 64 bits, and the type
    place = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    unknown_type = whole[:place] + struct.pack("<I", 77) + whole[place + 4 :]
    cases = {
        "an empty file": b"",
        "`git lfs pull` gets it": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "not a GGUF file: give a": b"PK\3\4" * 10,
        "part 1 of 3 of a model: join them": replaced(whole, b"split.count", 1, 3),
        "metadata of type 99 is not known": replaced(whole, WORD, 8, 99),
        "token_embd.weight is of type 77, which this version": unknown_type,
        "the file ends early": whole[:-100],
    }
    for says, content in cases.items():
        with pytest.raises(UserError, match=says):
            opened(tmp_path, content)


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path, whole):
    kind = gguf.GGMLQuantizationType.Q8_K
    file = opened(tmp_path, whole)
    info = file.tensors["token_embd.weight"]
    file.tensors["token_embd.weight"] = type(info)((1, 256), kind, 0, gguf.GGML_QUANT_SIZES[kind][1])
    with pytest.raises(UserError, match=r"token_embd\.weight is stored as Q8_K, which cannot be read"):
        file.tensor("token_embd.weight")


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        (b"llama.block_count", 2, 0, "0 blocks in 3 tensors"),
        (b"llama.block_count", 2, 2**31, "2147483648 blocks in 3 tensors"),
        (b"tokenizer.ggml.tokens", 9, 9, "metadata"),
    ],
)
def test_metadata_that_describe_no_model_are_one_line(tmp_path, whole, name, old, new, says):
    path = tmp_path / "odd.gguf"
    path.write_bytes(replaced(whole, name, old, new))
    with pytest.raises(UserError, match=says):
        load_language_model(TextConfig(llm=str(path), layer="-1"), torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"no `general\.nothing` in its metadata"):
        opened(tmp_path, whole).metadata["general.nothing"]


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 1000),
)
def test_any_damage_of_a_header_is_one_line_or_another_header(tmp_path_factory, whole, flips, cut):
    content = bytearray(whole)
    for at, value in flips:
        content[at % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content[:cut])
    with suppress(UserError):
        count_blocks(GGUFFile(path))
