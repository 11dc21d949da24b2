"""LLMs in GGUF files: finding the file, reading it, and building a transformers model from it.

transformers can read GGUF by itself (`gguf_file=`), but it walks the metadata one Python object per byte string, several
times over: 13 s for SmolLM2-135M and 31 s for Gemma-3-270M on two cores, and the tokenizers that it builds for both cut
words wrongly. Here the metadata is read once, in C-speed slices, only the blocks that are run are dequantised, and the
tokenizer is built from the file's own vocabulary (`model/encoders/gguf_tokenizer.py`).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import importlib
import importlib.util
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType
from gguf.quants import dequantize
from gguf.tensor_mapping import TensorNameMap
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from model.common.errors import UserError
from model.common.files import atomic_path, cache_folder

PACKAGE = "package:"
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""GGUF architecture -> transformers' model type; those whose every number is in the metadata."""
_MAGIC = b"GGUF"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type -> struct code; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class _TensorInfo:
    """Where a tensor lies in the file."""

    shape: tuple[int, ...]
    """Row-major: GGUF writes the fastest dimension first, this has it last."""
    kind: GGMLQuantizationType
    offset: int
    bytes: int


class GGUFFile:
    """A GGUF file: its metadata, read at once, and its tensors, dequantised when asked for."""

    def __init__(self, path: Path) -> None:
        """Read the header of `path`.

        Raises:
            UserError: it is not a GGUF file of version 2 or 3, or it ends early.
        """
        self.path = path
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_header()
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged GGUF file ({error}): download it again") from error

    def _read_header(self) -> None:
        if self._bytes[:4] != _MAGIC:
            raise UserError(f"{self.path}: not a GGUF file: give a `.gguf` file, a model folder or a hub name")
        version, tensors, entries = struct.unpack_from("<IQQ", self._bytes, 4)
        if version not in (2, 3):
            raise UserError(f"{self.path}: GGUF version {version} is not read here: convert it to version 3")
        self._at = 24
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._number("I"))
        self.tensors: dict[str, _TensorInfo] = {}
        for _ in range(tensors):
            name = self._string()
            sizes = [self._number("Q") for _ in range(self._number("I"))]
            kind = GGMLQuantizationType(self._number("I"))
            block, block_bytes = GGML_QUANT_SIZES[kind]
            count = int(np.prod(sizes))
            self.tensors[name] = _TensorInfo(tuple(reversed(sizes)), kind, self._number("Q"), count // block * block_bytes)
        alignment = self.metadata.get("general.alignment", 32)
        self._data_start = -(-self._at // alignment) * alignment
        end = max((self._data_start + info.offset + info.bytes for info in self.tensors.values()), default=0)
        if end > len(self._bytes):
            raise UserError(f"{self.path}: the file ends early, {len(self._bytes)} bytes of {end}: download it again")

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
            return self._number(_NUMBERS[kind])
        kind, length = self._number("I"), self._number("Q")
        if kind in _NUMBERS:
            values = np.frombuffer(self._bytes, np.dtype("<" + _NUMBERS[kind]), length, self._at)
            self._at += values.nbytes
            return values
        return [self._value(kind) for _ in range(length)]

    @property
    def architecture(self) -> str:
        """GGUF's name of the architecture, such as `llama`."""
        return self.metadata["general.architecture"]

    def tensor(self, name: str) -> Tensor:
        """Dequantise one tensor to fp32."""
        info = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, info.bytes, self._data_start + info.offset)
        if info.kind is GGMLQuantizationType.Q8_0:
            return _dequantize_q8_0(raw).reshape(info.shape)
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        blocks = info.bytes // block_bytes
        # gguf-py works on 16 rows at a time in Python: rows of about 64k values instead of one matrix row each.
        rows = next(rows for rows in range(max(1, blocks * block // 65536), 0, -1) if blocks % rows == 0)
        values = dequantize(raw.reshape(rows, -1), info.kind)
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(info.shape))


def _dequantize_q8_0(raw: np.ndarray) -> Tensor:
    """Blocks of an fp16 scale and 32 int8 values; written out because vocabulary tables are kept so, and large."""
    blocks = torch.from_numpy(raw.reshape(-1, 34).copy())
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return blocks[:, 2:].contiguous().view(torch.int8) * scales


def find_gguf(llm: str) -> Path | None:
    """The GGUF file that `llm` names: a `.gguf` path or `package:<python package>`; None if it names something else.

    A package either holds one `.gguf` file, or has its file in parts and says which (`chunk_paths()`, `MODEL_NAME`,
    `EXPECTED_SHA256`); then the parts are put together in the cache folder, checked against the hash.

    Raises:
        UserError: no such file or package, or the package holds no GGUF file.
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
        raise UserError(f"{PACKAGE}{name}: no such package: pip install {name.replace('_', '-')}")
    files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if not files:
        package = importlib.import_module(name)
        if hasattr(package, "chunk_paths"):
            return _assemble(package.MODEL_NAME, package.chunk_paths(), package.EXPECTED_SHA256)
    raise UserError(f"{PACKAGE}{name}: {len(files)} GGUF files in the package, not one: give the file's path instead")


def _assemble(name: str, parts: list[Path], sha256: str) -> Path:
    """Join `parts` under the cache folder, in a folder named by the hash; safe against other processes and crashes."""
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
            raise UserError(f"{name}: its parts do not have the hash that their package states: reinstall the package")

    return target


def _blocks(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        if not path.is_file():
            raise UserError(f"{path.name}: a part of the model is missing: reinstall its package")
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                yield block


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_blocks(file: GGUFFile) -> int:
    """Transformer blocks in the file."""
    return int(file.metadata[f"{file.architecture}.block_count"])


def build_model(file: GGUFFile, blocks: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model (no LM head) with the first `blocks` blocks; only their weights are dequantised.

    Raises:
        UserError: an architecture that is not read here, rotary scaling that GGUF does not describe fully, or weights
            missing from the file.
    """
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{file.path}: GGUF of {file.architecture!r} is not read here ({known} are): use its safetensors")
    scaling = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise UserError(f"{file.path}: scaled rotary embedding is not read from GGUF: use the model's safetensors")
    settings = _settings(file) | {"num_hidden_layers": blocks}
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(AutoConfig.for_model(ARCHITECTURES[file.architecture], **settings))
    names = TensorNameMap(next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.architecture), blocks)
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=settings)
    state: dict[str, Tensor] = {}
    for ours in model.state_dict():
        module, _, leaf = ours.rpartition(".")
        theirs = f"{names.get_name('model.' + module)}.{leaf}"
        if theirs not in file.tensors:
            raise UserError(f"{file.path}: no tensor for {ours} ({theirs}): the file does not hold a whole model")
        weights = processor.process(weights=file.tensor(theirs).numpy(), name=theirs).weights
        state[ours] = torch.from_numpy(np.ascontiguousarray(weights)).to(device, dtype)
    model.load_state_dict(state, assign=True)
    return model.to(device)


def _settings(file: GGUFFile) -> dict[str, Any]:
    """Metadata -> arguments of the transformers config."""
    prefix = file.architecture + "."
    names = GGUF_CONFIG_MAPPING[file.architecture]
    found = {names[key.removeprefix(prefix)]: value for key, value in file.metadata.items() if key.removeprefix(prefix) in names}
    settings = {key: value for key, value in found.items() if key and key != -1}
    settings["vocab_size"] = len(file.metadata["tokenizer.ggml.tokens"])
    settings["pad_token_id"] = None
    return settings
