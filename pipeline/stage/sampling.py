"""Settings of sampling: `sample` of a stage."""

from dataclasses import dataclass, field

from data_prep.scenes.grammar import SceneStyle
from model.common.settings import MAX_SEED, bounded


@dataclass
class AdaptiveConfig:
    """Settings of the schedulers `dual_loop` and `look_ahead`, which follow the difficulty of patches."""

    easy: float = bounded(0.4, 0.0, 1.0)
    """Share of an image's patches that count as easy: those of the smallest expected error."""
    inner: int = bounded(4, 1, 1_000)
    """`dual_loop`: steps of the hard patches, each one evaluation, in one step of the easy ones."""
    ratio: float = bounded(1.4, 1.0, 1_000.0)
    """`look_ahead`: the easy patches that the hard ones see are further from noise by this factor."""
    unguided: float = bounded(0.95, 0.0, 2.0)
    """`look_ahead`: no guidance at times from this one on; above 1 = always guidance."""


@dataclass
class SamplingConfig:
    """The grid of images or clips during training, and the defaults of sampling."""

    every_samples: int = bounded(0, 0, 10**12)
    """0 = no grids while training."""
    prompts: list[str] = field(default_factory=list)
    """Prompts of the grid."""
    scenes: int = bounded(0, 0, 100_000)
    """Held-out scenes that are sampled and scored too (`data_prep/scenes/`), which gives a curve."""
    scenes_scale: float = bounded(1.0, 0.5, 3.0)
    """Size of the scenes' objects: `scenes.scale` of the dataset."""
    scenes_plain: bool = False
    """Plain scenes: `scenes.plain` of the dataset."""
    scenes_objects: int | None = bounded(None, 1, 8)
    """Maximum number of the scenes' objects: `scenes.objects` of the dataset."""
    steps: int = bounded(30, 1, 10_000)
    """Steps of the solver."""
    guidance: float = bounded(4.0, 0.0, 1_000.0)
    """Scale of classifier-free guidance; 1 = none."""
    scheduler: str = ""
    """flow: `euler`, `dpm`, and with a difficulty head `dual_loop`, `look_ahead`; ddpm: `dpm`, `ddim`; empty
    = the first."""
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    """Settings of `dual_loop` and `look_ahead`."""
    seed: int = bounded(0, 0, MAX_SEED)
    """Seed of the images."""
    height: int = bounded(256, 1, 65_536)
    """Pixels."""
    width: int = bounded(256, 1, 65_536)
    """Pixels."""
    frames: int = bounded(1, 1, 100_000)
    """Frames of a clip; 1 = images."""
    fps: float = bounded(8.0, 0.01, 1_000.0)
    """Frames per second of the files of clips."""

    @property
    def scenes_style(self) -> SceneStyle:
        """The style of the dataset's scenes."""
        return SceneStyle(self.scenes_scale, self.scenes_plain, self.scenes_objects)
