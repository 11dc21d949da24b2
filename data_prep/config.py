"""The settings of a dataset: one YAML, checked against these dataclasses."""

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.clips.media import CRF, ClipFormat
from data_prep.clips.timing import Start
from data_prep.model_settings import AnnotatorConfig, CaptionsConfig
from data_prep.scenes.captions import CAPTION_KINDS
from data_prep.scenes.grammar import SceneStyle
from data_prep.scenes.moving import MOVING_CAPTION_KINDS
from model.common.errors import UserError
from model.common.settings import MAX_SEED, bounded, read_settings, within
from model.config import TextConfig

MAX_CAPTION_KINDS = 255
"""The number of a kind is stored as one byte."""
# The passes of the search grow steeply with the distance, and unrelated images differ by about 32 bits.
MAX_NEAR_BITS = 16
MAX_CLIP_FRAMES = 1025
MAX_EVALUATION_SETS = 100
"""The plan's verdict on a row is one byte, which also names the evaluation set."""


RENDERED: dict[str, tuple[str, ...]] = {"scenes": CAPTION_KINDS, "moving_scenes": MOVING_CAPTION_KINDS}
"""Kinds of sources that are rendered, and the kinds of their captions."""


@dataclass
class ScenesConfig:
    """A set of scenes (`data_prep/scenes/grammar.py`), rendered at the sizes of the buckets."""

    count: int = bounded(0, 0, 10**12)
    """Number of scenes."""
    seed: int = bounded(0, 0, MAX_SEED)
    """Seed of the scenes; another one gives other scenes."""
    file_rows: int = bounded(4096, 1, 10**9)
    """Number of scenes per "file": a task scans whole files."""
    scale: float = bounded(1.0, 0.5, 3.0)
    """Size of the objects: 1 = 11 and 16 pixels of 64, and room for 8 objects; 1.6 leaves room for 4."""
    plain: bool = False
    """All objects large and without texture on white: only colors, shapes, places and motions, which a small
    network learns soonest."""
    objects: int | None = bounded(None, 1, 8)
    """Maximum number of objects; None = as many as there is room for."""

    @property
    def style(self) -> SceneStyle:
        """The style of all scenes of the set."""
        return SceneStyle(self.scale, self.plain, self.objects)


@dataclass
class SourceConfig:
    """A source of image-caption pairs."""

    kind: Literal["webdataset", "parquet", "folder", "mds", "openmoji", "scenes", "moving_scenes"] = (
        "webdataset"
    )
    """Layout of the files at the path. Moving scenes need `clips`."""
    path: str = ""
    """Local path, s3:// URI, or `hf://OWNER/NAME@COMMIT/path` for a dataset of the Hugging Face hub, which is
    streamed; globs allowed. Empty for sources that are packages."""
    captions: dict[str, str] = field(default_factory=dict)
    """Caption kind -> name of its field or column (a string or a list of strings). `txt` is the text file
    next to an image (webdataset, folder), which also replaces a missing `caption`; `a.b` is field `b` of a
    record `a`. Empty = `original: caption`; for scenes, all kinds."""
    image: str = "image"
    """Column of image bytes or paths (parquet), of image bytes (MDS), or of paths (metadata of a folder); the
    suffix of the images, if samples have several (webdataset)."""
    limit: int | None = bounded(None, 1, 10**12)
    """Number of rows to read from the start of each file, for trials; None = all."""
    scenes: ScenesConfig | None = None
    """Settings of the kinds `scenes` and `moving_scenes`."""

    def __post_init__(self) -> None:
        """Fill in the default captions of each kind of source."""
        if not self.captions:
            own = RENDERED.get(self.kind, ())
            self.captions = {kind: kind for kind in own} or {"original": "caption"}


@dataclass
class FilterConfig:
    """One named predicate and its arguments, such as `{name: min_side, value: 256}`.

    The names are in `data_prep/plan/filters.py`.
    """

    name: str = ""
    """Name of the filter, or `expression`."""
    value: Any = None
    """Its bound, list or expression."""
    column: str | None = None
    """Column that it reads, if its name does not say so."""


@dataclass
class SemanticConfig:
    """Semantic duplicates, by embeddings of the images; see `data_prep/plan/semantic.py`."""

    annotation: str = "clip"
    """Name of the annotation that has the embeddings."""
    column: str = "clip_embedding"
    """Its column: a list of numbers of fixed size per row."""
    threshold: float = bounded(0.95, 0.0, 1.0)
    """Minimum cosine of the embeddings of duplicates."""
    clusters: int | None = bounded(None, 1, 65_536)
    """Clusters of the k-means, of which only rows of the same one are compared; None = one per 4,096 rows."""


@dataclass
class DedupeConfig:
    """Duplicates across the whole dataset; the first in the order of the source files is kept."""

    exact: bool = True
    """True if images with equal bytes are duplicates."""
    near: int | None = bounded(None, 0, MAX_NEAR_BITS)
    """Maximum Hamming distance between 64-bit perceptual hashes of duplicates; None = no such test."""
    against: list[SourceConfig] | None = None
    """Evaluation sets, written like `sources`; their captions are not read. Pairs whose image is in one of
    them are dropped: those with equal bytes always, those that look the same if `near` is set."""
    semantic: SemanticConfig | None = None
    """Pairs whose images mean the same, by embeddings that an annotation has; None = no such test."""
    drop: str | None = None
    """Parquet file (local path or s3:// URI) with a column `id`: rows that another program found, which are
    dropped after all other tests. The ids are those of the pairs."""

    def __post_init__(self) -> None:
        """Check the evaluation sets and the list.

        Raises:
            UserError: if a list or a path is empty, there are too many sets, or one has no path.
        """
        if self.against is not None and not 0 < len(self.against) <= MAX_EVALUATION_SETS:
            raise UserError(
                f"dedupe.against: {len(self.against)} sources: give 1 to {MAX_EVALUATION_SETS}, or leave the "
                "key out"
            )
        for number, source in enumerate(self.against or []):
            _check_source(f"dedupe.against[{number}]", source)
        if self.drop is not None and not self.drop.endswith(".parquet"):
            raise UserError(f"dedupe.drop={self.drop!r}: name a .parquet file, or leave the key out")


@dataclass
class BucketConfig:
    """Equal-area aspect-ratio buckets."""

    resolution: int = bounded(256, 1, 65_536)
    """Side of the square bucket, in pixels; all buckets have about its area."""
    max_aspect: float = bounded(2.0, 1.0, 1_000.0)
    """Largest long side / short side of a bucket."""
    step: int = bounded(32, 1, 65_536)
    """Sides are multiples of this (VAE downsampling x patch size)."""
    max_upscale: float = bounded(1.0, 0.01, 1e9)
    """Images that would have to grow by a larger factor are dropped."""
    max_crop: float = bounded(0.5, 0.0, 1.0)
    """Images that would lose a larger share of their area to the center crop are dropped."""


@dataclass
class ClipsConfig:
    """Clips of videos (mp4, WebM, Matroska) and animations (WebP, GIF), one of each file.

    Without this key, an animation is an image, its first frame, and videos are not read.
    """

    frames: list[int] = field(default_factory=lambda: [17], metadata=within(5, MAX_CLIP_FRAMES))
    """Numbers of frames of a clip, each 4 k + 1, as video VAEs compress 1 + 4 k frames to 1 + k. A video gets
    the largest one for which it is long enough; each has buckets of its own, such as `256x256x17`."""
    fps: float = bounded(24.0, 0.1, 1_000.0)
    """Wanted frames per second. A clip is every n-th frame of its video, with the n that comes nearest; its
    own rate is stored."""
    start: Start = "middle"
    """Position of a clip in its video: in the middle, at the start, or random (a function of `seed` and the
    file's content)."""
    format: ClipFormat = "mp4"
    """Format of the stored clips: H.264 (needs the extra `video`), or animated WebP without loss."""
    crf: int = bounded(CRF, 0, 51)
    """Constant rate factor of H.264: smaller is better and larger."""
    min_motion: float = bounded(0.0, 0.0, 255.0)
    """Clips whose neighboring frames differ by less on average are dropped, in levels of luma at 64 px."""
    max_jump: float = bounded(255.0, 0.0, 255.0)
    """Clips in which two neighboring frames differ by more are dropped, likewise: they have a cut."""

    def __post_init__(self) -> None:
        """Check the numbers of frames.

        Raises:
            UserError: if one is not 4 k + 1, or there are none.
        """
        for number in self.frames:
            if not 5 <= number <= MAX_CLIP_FRAMES or number % 4 != 1:
                raise UserError(
                    f"clips.frames: {number} is not 4 k + 1, from 5 to {MAX_CLIP_FRAMES}: change it"
                )
        if not self.frames or len(set(self.frames)) < len(self.frames):
            raise UserError("clips.frames: give at least one number, and each once")


@dataclass
class LatentsConfig:
    """A latents family: the latent space that the pairs are encoded in."""

    name: str = "latents"
    """Name of the family, which a stage's `data.latents` gives."""
    vae: str = ""
    """Local folder or hub name of a diffusers AutoencoderKL, or of what else `space` loads."""
    revision: str | None = None
    """Commit hash of a hub name."""
    space: str = ""
    """Registered name of the latent space (`model/encoders/latent_spaces.py`).

    Empty = the class that the config.json of `vae` names.
    """
    batch: int = bounded(16, 1, 1_000_000)
    """Images or clips that are encoded at a time."""
    moments: Literal["mean_std", "mean"] = "mean_std"
    """`mean` = store the means alone, which are half the bytes; training then reads no noise of the VAE's
    posterior. How large that is, is counted in each part (`posterior_std`)."""
    tiling: bool = False
    """True = encode large clips in overlapping tiles, which needs less memory and changes the latents a
    little; part of the family's identity."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the VAE. `bf16` takes a third to half of the time on a GPU; the first part of each task
    is compared with fp32, and a large error refused. Part of the family's identity."""


@dataclass
class TextFamilyConfig(TextConfig):
    """A text family of a dataset: the encoder, and the captions that it reads."""

    captions: list[str] = field(default_factory=list)
    """Captions families whose captions are encoded too, besides those of the sources."""


def captions_of(text: TextConfig) -> list[str]:
    """Return the names of the captions families that a text family reads."""
    return text.captions if isinstance(text, TextFamilyConfig) else []


@dataclass
class UserColumnConfig:
    """Users: who made or chose an image, for stages that learn an embedding of each user."""

    column: str = ""
    """Field or column of the sources with the user's name; empty = no users."""
    min_images: int = bounded(1, 1, 10**12)
    """Users with fewer pairs count as nobody: their pairs stay, without a user."""
    max_images: int | None = bounded(None, 1, 10**12)
    """Pairs of a user beyond this number have no user; the first ones in the order of their ids count. None =
    no limit."""


@dataclass
class DatasetConfig:
    """One dataset, from its sources to its families."""

    name: str = ""
    """Name of the dataset in the store."""
    store: str = ""
    """Local folder or s3:// URI of the store."""
    sources: list[SourceConfig] = field(default_factory=list)
    caption_kinds: list[str] = field(default_factory=lambda: ["original"])
    """All kinds of captions that the sources have."""
    annotations: list[AnnotatorConfig] = field(default_factory=list)
    filters: list[FilterConfig] = field(default_factory=list)
    dedupe: DedupeConfig = field(default_factory=DedupeConfig)
    buckets: BucketConfig = field(default_factory=BucketConfig)
    clips: ClipsConfig | None = None
    part_rows: int = bounded(1024, 1, 10**9)
    """Rows per part, the unit of work and of commits."""
    shuffle_window: int = bounded(65536, 1, 10**12)
    """Number of rows that the plan shuffles at a time inside a bucket (source files are shuffled first)."""
    image_format: Literal["jpeg", "png", "webp"] = "jpeg"
    """Format of the stored images."""
    image_quality: int = bounded(95, 1, 100)
    """Quality of JPEG and WebP."""
    seed: int = bounded(0, 0, MAX_SEED)
    """Seed of the order of rows."""
    workers: int = bounded(2, 0, 1_024)
    """Processes that decode images, besides the one that reads; 0 = decode in that one."""
    latents: list[LatentsConfig] = field(default_factory=list)
    captions: list[CaptionsConfig] = field(default_factory=list)
    text: list[TextFamilyConfig] = field(default_factory=list)
    users: UserColumnConfig = field(default_factory=UserColumnConfig)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: if a caption kind is not declared, or an evaluation set is one of the sources.
        """
        for number, source in enumerate(self.sources):
            _check_source(f"sources[{number}]", source)
            self._check_kinds(number, source)
            if source.kind == "moving_scenes" and self.clips is None:
                raise UserError(f"sources[{number}]: moving scenes are clips: set `clips`")
        for number, source in enumerate(self.dedupe.against or []):
            self._check_evaluation_set(number, source)

        # equal names would be one kind with two numbers
        kinds = self.caption_kinds
        if len(kinds) > MAX_CAPTION_KINDS or len(set(kinds)) < len(kinds):
            raise UserError(f"caption_kinds: give at most {MAX_CAPTION_KINDS} different names")
        for text in self.text:
            self._check_generated(text)

        columns = list(itertools.chain.from_iterable(entry.types for entry in self.annotations))
        twice = [name for name in columns if columns.count(name) > 1 or name in ("id", "hash", "")]
        if twice:
            raise UserError(f"annotations: column {twice[0]!r} is given twice or has no name: rename one")

    @property
    def annotation_columns(self) -> dict[str, str]:
        """Columns of all annotations, and their types: number, text or embedding."""
        columns: dict[str, str] = {}
        for entry in self.annotations:
            columns |= entry.types
        return columns

    def _check_generated(self, text: TextConfig) -> None:
        """Check the captions families that a text family reads."""
        names = [captions.name for captions in self.captions]
        for name in captions_of(text):
            if name not in names:
                raise UserError(
                    f"text family {text.name}: captions {name!r} is not in the dataset's YAML (it has: "
                    f"{', '.join(names) or 'none'}): add it to `captions`"
                )
        if len(self.kinds_of(text)) > MAX_CAPTION_KINDS:
            raise UserError(f"text family {text.name}: more than {MAX_CAPTION_KINDS} kinds of captions")

    def kinds_of(self, text: TextConfig) -> list[str]:
        """Return the kinds of the captions that a text family has, by their number in it."""
        read = captions_of(text)
        generated = [captions.kinds for captions in self.captions if captions.name in read]
        return list(dict.fromkeys([*self.caption_kinds, *itertools.chain.from_iterable(generated)]))

    @property
    def clip_frames(self) -> list[int]:
        """Numbers of frames of clips; empty for a dataset of images."""
        return self.clips.frames if self.clips else []

    def _check_kinds(self, number: int, source: SourceConfig) -> None:
        """Check the caption kinds of source `number`."""
        # The rows of all sources share one list of kinds, so that a kind has one number.
        for kind in source.captions:
            if kind not in self.caption_kinds:
                raise UserError(
                    f"sources[{number}].captions: kind {kind!r} is not in "
                    f"caption_kinds={self.caption_kinds}: add it"
                )

    def _check_evaluation_set(self, number: int, source: SourceConfig) -> None:
        """Check that evaluation set `number` is no source of pairs, all of which it would drop."""
        for other, pairs in enumerate(self.sources):
            if _place(pairs) == _place(source):
                raise UserError(
                    f"dedupe.against[{number}] is sources[{other}] ({source.path or source.kind}), so no "
                    "pair of it would be left: remove it from one of the two lists"
                )


def _check_source(name: str, source: SourceConfig) -> None:
    """Check one entry of a list of sources; `name` is the entry's, for the message."""
    # Other code asks only for `source.scenes`, so the two must agree.
    if (source.kind in RENDERED) != (source.scenes is not None):
        raise UserError(f"{name}: `scenes` and kind=scenes go together: give both, or neither")
    if not source.path and source.kind not in ("openmoji", *RENDERED):
        raise UserError(f"{name}.path is empty: give a local path or an s3:// URI")


def _place(source: SourceConfig) -> tuple[str, int]:
    """Return what two sources with the same images have in common: the path, or the seed of the scenes."""
    if source.scenes is not None:
        return source.kind, source.scenes.seed
    if not source.path:
        return source.kind, 0
    is_uri = "://" in source.path
    return source.path.rstrip("/") if is_uri else os.path.realpath(os.path.expanduser(source.path)), 0


def load_dataset(path: Path, overrides: list[str]) -> DatasetConfig:
    """Read a dataset's YAML.

    Args:
        path: the file.
        overrides: `key=value` settings that replace those of the file.

    Raises:
        UserError: if the file is missing or has an unknown key or a bad value, or the name or the store is
            empty.
    """
    config: DatasetConfig = read_settings(DatasetConfig, path, overrides)
    for name in ("name", "store"):
        if not getattr(config, name):
            raise UserError(
                f"{path}: `{name}` is empty: set it in the file, or give {name}=... on the command line"
            )
    return config
