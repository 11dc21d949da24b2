"""The settings of a dataset: one YAML, checked against these dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.config import TextConfig
from model.errors import UserError
from model.settings import read_settings


@dataclass
class SourceConfig:
    """Where image-caption pairs come from."""

    kind: Literal["webdataset", "parquet", "folder", "mds", "openmoji"] = "webdataset"
    path: str = ""
    """Local path or s3:// URI, globs allowed; empty for sources that are packages."""
    captions: dict[str, str] = field(default_factory=lambda: {"original": "caption"})
    """Caption kind -> field or column that holds it (a string or a list of strings)."""
    image: str = "image"
    """Column with image bytes or a path (parquet, folder)."""
    limit: int | None = None
    """Take only the first samples; for trials."""


@dataclass
class FilterConfig:
    """One named predicate and its arguments: `{name: min_side, value: 256}`."""

    name: str = ""
    value: Any = None
    column: str | None = None


@dataclass
class DedupeConfig:
    """Duplicates across the whole dataset."""

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


@dataclass
class LatentsConfig:
    """A latents family: which VAE encodes the pairs."""

    name: str = "latents"
    vae: str = ""
    """Local folder or hub name of a diffusers AutoencoderKL."""
    revision: str | None = None
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
    shuffle_window: int = 262144
    """Rows over which the plan shuffles inside a bucket (source files are shuffled first)."""
    image_format: Literal["jpeg", "png", "webp"] = "jpeg"
    image_quality: int = 95
    seed: int = 0
    workers: int = 2
    latents: list[LatentsConfig] = field(default_factory=list)
    text: list[TextConfig] = field(default_factory=list)


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
