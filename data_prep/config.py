"""The settings of a dataset: one YAML, checked against these dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.scenes.captions import CAPTION_KINDS
from model.common.errors import UserError
from model.common.settings import read_settings
from model.config import TextConfig


@dataclass
class ScenesConfig:
    """A set of drawn scenes, see `data_prep/scenes/grammar.py`; their size and aspect ratios are those of the buckets."""

    count: int = 0
    seed: int = 0
    file_rows: int = 4096
    """Scenes that count as one file: a task scans whole files."""


@dataclass
class SourceConfig:
    """Where image-caption pairs come from."""

    kind: Literal["webdataset", "parquet", "folder", "mds", "openmoji", "scenes"] = "webdataset"
    path: str = ""
    """Local path or s3:// URI, globs allowed; empty for sources that are packages."""
    captions: dict[str, str] = field(default_factory=dict)
    """Caption kind -> field or column that holds it (a string or a list of strings). `txt` is the text file beside an
    image (webdataset, folder); it also stands in for a missing `caption`. Empty = original: caption; of scenes, all kinds."""
    image: str = "image"
    """Column with image bytes or a path (parquet), with image bytes (MDS)."""
    limit: int | None = None
    """Take only the first rows of each file; for trials."""
    scenes: ScenesConfig | None = None
    """Of the kind `scenes`."""

    def __post_init__(self) -> None:
        """Fill in the captions that each kind of source has."""
        if not self.captions:
            self.captions = {"original": "caption"} if self.scenes is None else {kind: kind for kind in CAPTION_KINDS}


@dataclass
class FilterConfig:
    """One named predicate and its arguments: `{name: min_side, value: 256}`. The names are in `data_prep/plan/filters.py`."""

    name: str = ""
    value: Any = None
    column: str | None = None


@dataclass
class DedupeConfig:
    """Duplicates across the whole dataset; of several, the first in the order of the source files stays."""

    exact: bool = True
    near: int | None = None
    """Largest Hamming distance of 64-bit perceptual hashes that counts as a duplicate; None = no such test."""


@dataclass
class BucketConfig:
    """Equal-area aspect-ratio buckets."""

    resolution: int = 256
    max_aspect: float = 2.0
    step: int = 32
    """Sides are multiples of this (VAE downsampling x patch)."""
    max_upscale: float = 1.0
    """Images that would have to grow by more than this are dropped."""
    max_crop: float = 0.5
    """Images that would lose more than this share of their area to the centre crop are dropped."""


@dataclass
class LatentsConfig:
    """A latents family: the latent space that the pairs are encoded in."""

    name: str = "latents"
    vae: str = ""
    """Local folder or hub name of a diffusers AutoencoderKL, or of what else `space` loads."""
    revision: str | None = None
    space: str = ""
    """Name of a registered latent space (`model/encoders/latent_spaces.py`); empty = the class that `vae`'s config.json names."""
    batch: int = 16


@dataclass
class DatasetConfig:
    """One dataset: from sources to families."""

    name: str = ""
    store: str = ""
    sources: list[SourceConfig] = field(default_factory=list)
    caption_kinds: list[str] = field(default_factory=lambda: ["original"])
    filters: list[FilterConfig] = field(default_factory=list)
    dedupe: DedupeConfig = field(default_factory=DedupeConfig)
    buckets: BucketConfig = field(default_factory=BucketConfig)
    part_rows: int = 1024
    shuffle_window: int = 65536
    """Rows over which the plan shuffles inside a bucket (source files are shuffled first)."""
    image_format: Literal["jpeg", "png", "webp"] = "jpeg"
    image_quality: int = 95
    seed: int = 0
    workers: int = 2
    """Processes that decode images, beside the one that reads; 0 = no process of their own."""
    latents: list[LatentsConfig] = field(default_factory=list)
    text: list[TextConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the fields against one another.

        Raises:
            UserError: a caption kind is not declared, or a number is out of range.
        """
        for number, source in enumerate(self.sources):
            if (source.kind == "scenes") != (source.scenes is not None):
                raise UserError(f"sources[{number}]: `scenes` and kind=scenes go together: give both, or neither")
            if not source.path and source.kind not in ("openmoji", "scenes"):
                raise UserError(f"sources[{number}].path is empty: give a local path or an s3:// URI")
            for kind in source.captions:
                if kind not in self.caption_kinds:
                    raise UserError(
                        f"sources[{number}].captions: kind {kind!r} is not in caption_kinds={self.caption_kinds}: add it"
                    )
        if len(self.caption_kinds) > 255 or len(set(self.caption_kinds)) < len(self.caption_kinds):
            raise UserError("caption_kinds: give at most 255 different names")
        for name, least in (("part_rows", 1), ("shuffle_window", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: set at least {least}")
        if self.dedupe.near is not None and not 0 <= self.dedupe.near <= 16:
            raise UserError(f"dedupe.near={self.dedupe.near}: set 0 to 16 bits of 64, or leave it out")


def load_dataset(path: Path, overrides: list[str]) -> DatasetConfig:
    """Read a dataset's YAML.

    Raises:
        UserError: see `read_settings`; also a missing name or store.
    """
    config: DatasetConfig = read_settings(DatasetConfig, path, overrides)
    for name in ("name", "store"):
        if not getattr(config, name):
            raise UserError(f"{path}: `{name}` is empty: set it in the file, or give {name}=... on the command line")
    return config
