"""A stage: one YAML under `pipeline/stages/`, or anywhere, checked against these dataclasses.

Progress, schedules and intervals are counted in samples, so they keep their meaning when the batch size
changes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from model.adapters.config import LoRAConfig, UsersConfig
from model.common.errors import UserError
from model.common.files import cache_folder
from model.common.registry import unknown
from model.common.settings import MAX_SEED, bounded, check_name, read_settings, within
from model.config import DiTConfig, FusionConfig, TextConfig
from model.elastic.config import ElasticConfig
from model.presets import PRESETS
from pipeline.stage.adapters import check_adapters
from pipeline.stage.engine import EngineConfig
from pipeline.stage.objective import ObjectiveConfig
from pipeline.stage.sampling import SamplingConfig

STAGES = Path(__file__).parents[1] / "stages"


@dataclass
class DatasetShare:
    """One dataset of a mixture."""

    weight: float = bounded(1.0, 0.0, 1e9)
    """Samples are taken from each dataset in proportion to its weight; small ones are read several times."""
    store: str = ""
    """Empty = `data.store`."""
    snapshot: str = "latest"
    """Id of a snapshot of this dataset, or `latest`."""


@dataclass
class DataConfig:
    """The data that a stage reads."""

    store: str = ""
    """Local folder or s3:// URI of the store."""
    dataset: str = ""
    """Name of the dataset in the store."""
    snapshot: str = "latest"
    """Id of a snapshot, or `latest`: the newest when the run starts; the run then keeps to it."""
    datasets: dict[str, DatasetShare] = field(default_factory=dict)
    """A mixture, instead of `dataset` and `snapshot`: name -> weight, and its own store and snapshot if they
    differ. The constants of the first one's text families apply to all, so add others after it."""
    latents: str = "latents"
    """Name of the latents family."""
    cache: str = ""
    """Local directory for downloaded shards; empty = `$XDG_CACHE_HOME/li-dit` (s3 stores only)."""
    cache_limit_gb: float | None = bounded(None, 0.1, 1e9)
    """Size at which the oldest shards are removed from the cache; None = no limit."""
    workers: int = bounded(2, 0, 256)
    """Loader processes per rank."""
    caption_weights: dict[str, float] = field(default_factory=dict, metadata=within(0.0, 1e9))
    """Caption kind -> weight when a sample's caption is picked; empty = all captions alike."""
    caption_drop: float = bounded(0.1, 0.0, 1.0)
    """Share of samples whose caption is the null caption, for classifier-free guidance."""
    canonical_nodes: int = bounded(1, 1, 65_536)
    """Each node of a run reads for whole canonical nodes, so it downloads only its own parts."""
    shuffle_parts: int = bounded(8, 1, 1_000_000)
    """Parts per canonical node whose rows are shuffled together."""
    tokens_per_batch: int | None = bounded(None, 1, 10**12)
    """Latent positions (height x width) of a global batch: a bucket of larger latents then gets fewer samples
    per step than `global_batch`, the largest number. None = `global_batch` samples of every bucket."""
    batch_multiple: int = bounded(1, 1, 10_000_000)
    """With `tokens_per_batch`: each bucket's batch is a multiple of this, such as the most processes that the
    run may have."""
    seed: int = bounded(0, 0, MAX_SEED)
    """Seed of the order of samples, of noise and of the choice of captions."""
    validation_parts: int = bounded(0, 0, 1_000_000)
    """Parts at the end of the snapshot's largest bucket held out from training for the validation loss."""


@dataclass
class ModelConfig(DiTConfig):
    """The DiT: the sizes of a preset, with any field of `DiTConfig` set over them."""

    preset: str = "tiny"
    """A name of `model/presets.py`."""
    checkpoint_every: int = bounded(0, 0, 1_000)
    """Activation checkpointing: 0 none, 1 every block, n every n-th block."""
    compile: bool = False
    """`torch.compile` each block's forward, for all buckets before the first step."""
    activation_memory_budget: float = bounded(1.0, 0.6, 1.0)
    """With `compile`: below 1 the backward pass recomputes all but matrix products and attention, which
    keeps 16 and not 27 values per patch and channel; 0.7 is a good value."""

    @classmethod
    def of_preset(cls, name: str) -> "ModelConfig":
        """Return the sizes of a preset.

        Raises:
            UserError: if there is no such preset.
        """
        if name not in PRESETS:
            raise UserError(unknown("model.preset", name, list(PRESETS)))
        return cls(preset=name, **asdict(PRESETS[name]))


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = "adamw"
    """An optimizer registered in `pipeline/engine/`. `muon`: Muon for the matrices of the blocks, AdamW for
    the rest, with one learning rate and decay for both."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the optimizer that are not among the fields below; `muon` has `iterations` (5) of
    Newton-Schulz per step."""
    momentum: float = bounded(0.95, 0.0, 1.0)
    """Momentum of Muon."""
    lr: float = bounded(1e-4, 0.0, 100.0)
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = bounded((0.9, 0.95), 0.0, 1.0)
    """Decays of AdamW's two moments."""
    eps: float = bounded(1e-8, 0.0, 1.0)
    """Added to AdamW's denominator."""
    weight_decay: float = bounded(0.01, 0.0, 1_000.0)
    """Decoupled weight decay of the matrices."""
    warmup_samples: int = bounded(0, 0, 10**12)
    """Samples in which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up."""
    final_lr: float = bounded(0.0, 0.0, 1_000.0)
    """End of cosine and linear, as a share of `lr`."""
    clip: float = bounded(1.0, 0.0, 1e30)
    """Largest norm of the gradient."""
    max_skipped_steps: int = bounded(20, 0, 1_000_000)
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    spike: float | None = bounded(None, 1.0, 1e30)
    """Skip a step whose gradient norm is above this multiple of its running mean; None = only non-finite
    steps."""


@dataclass
class CheckpointConfig:
    """Times at which checkpoints are written, and which of them are kept."""

    every_samples: int = bounded(100_000, 1, 10**12)
    """Samples between two checkpoints."""
    keep_last: int = bounded(2, 1, 1_000_000)
    """Newest checkpoints that are kept."""
    keep_every_samples: int | None = bounded(None, 1, 10**12)
    """Checkpoints at multiples of this are kept forever."""
    upload: str = ""
    """A store URI that gets a copy of each checkpoint; empty = none."""


@dataclass
class LogConfig:
    """The metrics that are written during training."""

    every_steps: int = bounded(10, 1, 1_000_000)
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """True if metrics are also written for TensorBoard."""
    wandb: str = ""
    """W&B project; empty = off."""
    validate_every_samples: int = bounded(0, 0, 10**12)
    """Samples between two validation losses; 0 = none."""
    peak_tflops: float | None = bounded(None, 0.001, 1e9)
    """Device's dense bf16 peak for MFU; None = known devices by name, else no MFU."""


@dataclass
class StageConfig:
    """One stage of pretraining."""

    name: str = ""
    """Name of the run; empty = the file's."""
    runs: str = "runs"
    """Folder of runs; this one's is `<runs>/<name>`."""
    start_from: str = ""
    """Run folder or exported weights of an earlier stage to start from; empty = fresh weights."""
    start_weights: str = "ema"
    """`ema` = the earlier stage's first average, `raw`, or the decay of an average."""
    freeze: Literal["none", "base"] = "none"
    """`base` = the weights that the stage starts from stay as they are, and only `users` and `lora` are
    trained."""
    samples: int = bounded(1_000_000, 1, 10**12)
    """Length of the stage."""
    global_batch: int = bounded(256, 1, 10_000_000)
    """Samples per step, over all processes."""
    vae: str = ""
    """Folder or hub name of the VAE that decodes images; empty = the one that the latents family names."""
    data: DataConfig = field(default_factory=DataConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    text: list[TextConfig] = field(default_factory=list)
    """With `fusion.encode: online`: the encoder behind each of `fusion.families`, as a dataset's YAML
    describes it. The captions come from the pairs, so the dataset needs pairs and latents alone."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig.of_preset("tiny"))
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    """Depths and sizes of patches that one set of weights is trained for; none by default."""
    users: UsersConfig = field(default_factory=UsersConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: list[float] = field(default_factory=lambda: [0.9999], metadata=within(0.0, 1.0))
    """Decays of the averages to keep; the first is the one that is sampled and exported by default."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SamplingConfig = field(default_factory=SamplingConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        """Check the fields against one another.

        Raises:
            UserError: if a setting is out of range or contradicts another.
        """
        # Empty is allowed, since `load_stage` then takes the file's name.
        if self.name:
            check_name("name", self.name)
        if self.samples < self.global_batch:
            raise UserError(
                f"samples={self.samples} is less than one global batch of {self.global_batch}: raise samples"
            )
        if any(not 0 < decay < 1 for decay in self.ema) or not self.ema:
            raise UserError(f"ema={self.ema}: name at least one decay between 0 and 1")
        if self.sample.every_samples and not (self.sample.prompts or self.sample.scenes):
            raise UserError(
                "sample.every_samples asks for images, and there are no prompts: set sample.prompts or "
                "sample.scenes"
            )

        self._check_elastic()
        self._check_prediction()
        check_adapters(self.freeze, self.start_from, self.users, self.lora, self.elastic.elastic)
        self._check_encoders()
        self._check_data()
        self._check_mixture()

    def _check_elastic(self) -> None:
        """Check the parts of an elastic network."""
        self.elastic.check(self.model)
        # Places of levels, and the errors that a solver follows, belong to patches of one size.
        if len(self.elastic.patches) > 1 and self.objective.patch_times.kind != "shared":
            raise UserError(
                "objective.patch_times has times of patches of one size: leave it out, or elastic.patches"
            )
        if len(self.elastic.patches) > 1 and self.objective.first_frame:
            raise UserError(
                "objective.first_frame gives patches of one size a time: leave it out, or elastic.patches"
            )
        # The head is compared with the errors of the same patches at all times.
        if self.elastic.segments and self.objective.difficulty:
            raise UserError(
                "objective.difficulty is measured on patches of one size at all times: leave it out, or "
                "elastic.segments"
            )

    def _check_prediction(self) -> None:
        """Check that a velocity follows from clean latents, if those are what the network predicts."""
        objective = self.objective
        if self.model.predicts == "clean" and (
            objective.name != "flow" or objective.time_levels > 1 or objective.difficulty
        ):
            raise UserError(
                "model.predicts=clean gives the velocity of objective.name=flow with one time per sample "
                "and no difficulty head: set that, or model.predicts=target"
            )

        mixed = objective.name != "flow" or objective.patch_times.kind != "shared"
        if objective.first_frame and (mixed or self.model.patch_frames > 1):
            raise UserError(
                "objective.first_frame gives single frames of latents to objective.name=flow without "
                "objective.patch_times: set model.patch_frames=1, or leave it out"
            )

    def _check_encoders(self) -> None:
        """Check the settings of a run that encodes its captions itself."""
        if self.fusion.encode != "online":
            return
        if lacking := {*self.fusion.families, *self.fusion.clip_families} - {text.name for text in self.text}:
            raise UserError(
                f"fusion.encode=online: text has no encoder named {', '.join(sorted(lacking))}: describe it"
            )
        # Online encoders are described by the stage itself: there is nothing to compare.
        if self.fusion.expect:
            raise UserError("fusion.expect is about stored families: leave it out with fusion.encode=online")

    def _check_data(self) -> None:
        """Check that the global batch fits the settings of the data."""
        batch, data = self.global_batch, self.data
        # Each canonical node gives the same number of samples to every batch.
        if batch % data.canonical_nodes:
            raise UserError(
                f"global_batch={batch} is not a multiple of data.canonical_nodes={data.canonical_nodes}: "
                "change one"
            )
        # The largest bucket trains with `global_batch` itself, which must divide like the others.
        if batch % data.batch_multiple:
            raise UserError(
                f"global_batch={batch} is not a multiple of data.batch_multiple={data.batch_multiple}: "
                "change one"
            )

    def _check_mixture(self) -> None:
        """Check the datasets of a mixture."""
        mixed = self.data.datasets
        # `latest` is the default, so any other snapshot was set on purpose.
        if mixed and (self.data.dataset or self.data.snapshot != "latest"):
            raise UserError(
                "data.datasets replaces data.dataset and data.snapshot: empty data.dataset, or name one "
                "dataset only"
            )
        if len(mixed) == 1:
            raise UserError(
                f"data.datasets names {next(iter(mixed))} alone: give data.dataset, or several to be mixed"
            )
        for name, share in mixed.items():
            # NaN fails this comparison too.
            if not 0 < share.weight < math.inf:
                raise UserError(f"data.datasets.{name}.weight={share.weight}: set a number above 0")

    @property
    def run(self) -> Path:
        """Folder of this run."""
        return Path(self.runs) / self.name

    @property
    def text_folder(self) -> Path:
        """Folder of the constants that all captions share, in a run that encodes online."""
        return self.run / "text"

    def batch(self, positions: int) -> int:
        """Return the samples of a global batch of a bucket; 0 = not one fits.

        Args:
            positions: positions of a sample's latents, such as height x width.
        """
        if self.data.tokens_per_batch is None:
            return self.global_batch
        # A multiple of both: nodes take equal shares, and processes take equal shares of those.
        multiple = math.lcm(self.data.canonical_nodes, self.data.batch_multiple)
        # `global_batch` is the upper limit, since the engine is made for batches of that size.
        return min(self.global_batch, self.data.tokens_per_batch // positions // multiple * multiple)

    def dit(self, channels: int, axes: int = 2) -> DiTConfig:
        """Return the sizes of the DiT.

        Args:
            channels: of the latents.
            axes: of the latents after the channels.

        Raises:
            UserError: if `model` sets what the data or the objective decide, and to another value.
        """
        # `ModelConfig` has further fields; channels and axes come from the data, not from the stage.
        sizes = {field.name: getattr(self.model, field.name) for field in fields(DiTConfig)}
        decided = {"channels": channels, "axes": axes, "time_levels": self.objective.time_levels}
        for name, value in decided.items():
            if sizes[name] not in (getattr(DiTConfig, name), value):
                raise UserError(
                    f"model.{name}={sizes[name]}: the data and the objective say {value}: leave it out"
                )
        sizes |= decided
        if self.objective.difficulty and self.model.difficulty == "none":
            sizes["difficulty"] = "attached"
        return DiTConfig(**sizes)


def _over_preset(given: Any) -> StageConfig:
    """Return the default stage with the sizes of the preset that the settings name."""
    model = given.get("model") or {}
    # runs of earlier versions recorded every size that was not set over the preset as null
    for key in [key for key in model if model[key] is None]:
        del model[key]
    return StageConfig(model=ModelConfig.of_preset(model.get("preset", "tiny")))


def load_stage(stage: str, overrides: Sequence[str] = ()) -> StageConfig:
    """Read a stage by the name of a shipped one or by the path of a YAML, and apply `key=value` overrides.

    Raises:
        UserError: if there is no such stage, a key is unknown (the message names the nearest right one), a
        type is wrong, or settings contradict one another.
    """
    path = Path(stage)
    # A name without a suffix is that of a shipped stage.
    if not stage.endswith((".yaml", ".yml")):
        path = STAGES / f"{stage}.yaml"
        if not path.exists():
            raise UserError(unknown("stage", stage, [file.stem for file in STAGES.glob("*.yaml")]))
    config: StageConfig = read_settings(StageConfig, path, list(overrides), _over_preset)
    # After the overrides, so that `name=...` on the command line counts.
    config.name = config.name or path.stem
    return config


def check_start_from(stage: StageConfig) -> None:
    """Check before a run that what it starts from is there.

    Raises:
        UserError: if it is not.
    """
    if stage.start_from and "://" not in stage.start_from and not Path(stage.start_from).exists():
        raise UserError(f"start_from={stage.start_from}: no such run or file")


def load_run(run: Path) -> StageConfig:
    """Read the stage of a run from its folder.

    Raises:
        UserError: if the folder is not a run's.
    """
    if not (run / "stage.yaml").exists():
        raise UserError(
            f"{run}: no stage.yaml there, so this is not a run's folder: give one such as runs/demo"
        )
    # Checked like a new stage: an unknown key shows that another version made the run.
    return read_settings(StageConfig, run / "stage.yaml", [], _over_preset)


def dump_stage(config: StageConfig) -> str:
    """Return the resolved stage as YAML, as `--dry-run` prints it and a run's folder has it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def cache_root(config: DataConfig) -> Path:
    """Return the folder in which shards of remote stores are cached."""
    return Path(config.cache or cache_folder())
