"""The whole weights of a checkpoint or an export, read without a process group, each when it is accessed."""

import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from model.common.errors import UserError
from pipeline.checkpoint.files import RankFiles
from pipeline.checkpoint.manifest import REPLICATED, read_manifest, refuse_other_format
from pipeline.engine.layout import Layout


class CheckpointWeights(Mapping[str, Tensor]):
    """The whole weights of a checkpoint, fp32, each put together from the rank files when it is accessed."""

    def __init__(self, folder: Path, which: str) -> None:
        """Read the manifest.

        Args:
            folder: a checkpoint.
            which: `raw` = the trained weights, `ema` = the first average, or the decay of an average, such as
                `0.9999`.

        Raises:
            UserError: if `folder` is not a checkpoint, or does not contain that average.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            refuse_other_format(folder)
            raise UserError(f"{folder} is no checkpoint: name a run's folder, or one of its checkpoints")
        self._kind = _kind(folder, which, manifest["ema"])
        self._layout = Layout.from_json(manifest["layout"])
        self._files = RankFiles(folder)
        # Small: buffers and frozen parameters. The others are too large to be kept.
        self._replicated = {name: value.float() for name, value in load_file(folder / REPLICATED).items()}

        self.shapes = dict(self._layout.shapes)
        for name, value in self._replicated.items():
            self.shapes[name] = tuple(value.shape)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._replicated:
            return self._replicated[name]
        # The extents cover every element, so the memory needs no zeros.
        whole = torch.empty(self.shapes[name], dtype=torch.float32)
        flat = whole.view(-1)
        for extent in self._layout.extents(name):
            tensor, stop = f"{self._kind}.{extent.group}", extent.offset + extent.length
            values = self._files.read(extent.rank, tensor, extent.offset, stop)
            flat[extent.start : extent.start + extent.length] = values
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _kind(folder: Path, which: str, decays: Sequence[float]) -> str:
    """Return the prefix of these weights' tensors in the rank files."""
    if which == "raw":
        return "master"
    try:
        return f"ema_{0 if which == 'ema' else decays.index(float(which))}"
    except ValueError as error:
        known = ", ".join(map(str, decays))
        raise UserError(
            f"{folder}: no weights `{which}` there: choose raw, ema, or the decay of an average: {known}"
        ) from error


class ExportedWeights(Mapping[str, Tensor]):
    """The weights of safetensors files, as fp32."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read names and shapes.

        Raises:
            UserError: if a file is damaged.
        """
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping: it cannot be iterated)
                        # Only names and shapes are read here; the tensors follow one by one.
                        self._files[name] = path
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except SafetensorError as error:
                raise UserError(f"{path}: damaged: {error}: export again") from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def apply_umask(folder: Path) -> None:
    """Give the weights in a folder the mode of any new file; safetensors lets only their owner read them."""
    # The umask can only be read by changing it, for all threads. A new file shows its effect instead.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mode") as temporary:
        new = Path(temporary, "new")
        new.touch()
        mode = stat.S_IMODE(new.stat().st_mode)
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)
