"""Settings of the network: plain dataclasses that the model reads and that a stage's YAML fills in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from model.attention_config import AttentionConfig
from model.common.errors import UserError
from model.common.settings import bounded

INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "and spatial relationships of the objects:"
)
"""The paper's instruction (section 3.1)."""


@dataclass
class FusionConfig:
    """Settings of the fusion: from the LLMs' hidden states to the text tokens that the DiT attends to (paper
    section 3.1).

    Every row of the paper's tables 2, 3, 5 and 6 is one setting of these fields; with or without the
    instruction is a choice of text family, since the hidden states of a caption depend on the text before it.
    """

    families: list[str] = field(default_factory=list)
    """Text families to fuse, in order; the order fixes the order of branches in the weights."""
    clip_families: list[str] = field(default_factory=list)
    """Families that batches of clips read, one in place of each of `families`: of the same LLM behind an
    instruction about clips. Empty = clips read `families`, as images do."""
    mode: Literal["none", "concat", "collaborative"] = "collaborative"
    """`none`: one LLM alone; `concat`: branches side by side; `collaborative`: the paper's refiner across
    branches."""
    refiner: Literal["none", "full", "causal"] = "full"
    """Linguistic token refiner: absent, full attention (the paper's), or causal (the paper's
    counter-test)."""
    refiner_blocks: int = bounded(2, 0, 1_000)
    """Blocks of each LLM's own refiner."""
    collaborative_blocks: int = bounded(1, 0, 1_000)
    """Blocks of the refiner across LLMs."""
    gate: bool = True
    """Adaptive gates on the refiner's sub-layers; off = plain residual connections (table 5)."""
    time: bool = True
    """True if the timestep conditions the refiners, in addition to the pooled text."""
    width: int | None = bounded(None, 1, 1_000_000)
    """Width of the refiners; None = the DiT's. At the LLM's 4,096 they would cost as much as the 1B DiT
    itself."""
    heads: int | None = bounded(None, 1, 10_000)
    """Attention heads of the refiners; None = the DiT's."""
    crop: Literal["after", "before"] = "after"
    """Cut off the prefix after both refiners (the paper) or before them."""
    pool: Literal["caption", "all", "none"] = "caption"
    """Tokens averaged into the pooled text: the caption's alone, or the prefix's too (the paper does not
    say); `none`: neither the refiners nor the DiT are conditioned on the text, as a counter-test."""
    pooled: int = bounded(0, 0, 100)
    """Number of families, the last ones, that give one vector each, the state of their last token, such as
    CLIP's pooled text in HunyuanVideo: it is added to the condition, and their tokens are not attended to."""
    expect: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Family -> fields that its identity must have, such as `{llm: ..., layer: "-3"}`; one made in another
    way is refused."""
    encode: Literal["families", "online"] = "families"
    """Read the states from text families, or run the LLMs in the trainer, with the settings in the stage's
    `text`."""

    def __post_init__(self) -> None:
        """Check the fields against one another.

        Raises:
            UserError: if the settings contradict one another.
        """
        if self.clip_families and len(self.clip_families) != len(self.families):
            raise UserError(
                f"fusion.clip_families has {len(self.clip_families)} families and fusion.families "
                f"{len(self.families)}: name one for each"
            )
        # `TextFusion` checks the branches that it is given; this check refuses the YAML before any data or
        # model is loaded.
        if self.mode == "none" and len(self.families) - self.pooled > 1:
            raise UserError(
                f"fusion.mode=none takes one LLM, not {len(self.families)}: set fusion.mode=concat or "
                "collaborative"
            )
        if self.families and self.pooled >= len(self.families):
            raise UserError(
                f"fusion.pooled={self.pooled} leaves none of the {len(self.families)} families to attend to: "
                "lower it"
            )
        if self.refiner != "none" and self.refiner_blocks < 1:
            raise UserError(
                f"fusion.refiner_blocks={self.refiner_blocks}: set at least 1, or fusion.refiner=none"
            )
        if self.mode == "collaborative" and self.collaborative_blocks < 1:
            raise UserError(
                f"fusion.collaborative_blocks={self.collaborative_blocks}: set at least 1, or "
                "fusion.mode=concat"
            )

    def families_of(self, clips: bool) -> list[str]:
        """Return the text families that batches of clips, or those of images, read, in order."""
        return self.clip_families if clips and self.clip_families else self.families


@dataclass
class DiTConfig:
    """Sizes of the DiT (paper section 3.2 and table 7)."""

    depth: int = bounded(28, 1, 1_000)
    """Number of blocks."""
    width: int = bounded(1152, 1, 1_000_000)
    """Channels of a token."""
    heads: int = bounded(16, 1, 10_000)
    """Attention heads; they divide the width."""
    patch: int = bounded(2, 1, 1_024)
    """Side of a patch, in latent positions."""
    patch_frames: int = bounded(1, 1, 1_024)
    """Frames of a patch, where the latents have a time axis."""
    axes: int = bounded(2, 2, 3)
    """Axes of the latents after the channels: 2 = [h, w], 3 = [T, h, w]."""
    channels: int = bounded(16, 1, 65_536)
    """Latent channels of the VAE."""
    mlp_ratio: float = bounded(4.0, 0.01, 100.0)
    """Width of the feed-forward layer as a multiple of `width`."""
    frequency_width: int = bounded(256, 2, 65_536)
    """Width of the sinusoidal timestep embedding before its MLP."""
    block: str = "dit"
    """Type of the blocks, a name of `model.blocks.BLOCKS`."""
    position: Literal["convolution", "rope"] = "convolution"
    """Source of a patch's place: convolutions over neighbors (the paper's), or rotary positions in
    self-attention over frames, rows and columns, a choice for new networks. Rotary positions are relative:
    with them alone no patch knows its place in the image, where the convolutions see the border."""
    position_scale: int = bounded(1, 1, 1_024)
    """With `rope`: rotary positions that a patch takes along rows and columns; its own is their mean.
    An exported part of an elastic network has its patch / `model.patch` here."""
    conditions: list[str] = field(default_factory=list)
    """Conditions beside timestep and text, names of `model.conditions.CONDITIONS`."""
    predicts: Literal["target", "clean"] = "target"
    """Prediction of the last layer: the objective's target; or, for `flow`, the clean latents, from which the
    velocity follows, as large patches of pixels need it (arXiv 2511.13720)."""
    difficulty: Literal["none", "attached", "detached"] = "none"
    """Head that predicts each patch's error: none; one that also trains the layers below it; or one that does
    not. `objective.difficulty` trains it, and adds an attached one to `none`."""
    time_levels: int = bounded(1, 1, 1_024)
    """Times of a sample in training, which its patches share; given by `objective.patch_times`."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Self-attention of the blocks."""

    def __post_init__(self) -> None:
        """Check the fields against one another.

        Raises:
            UserError: if the heads do not divide the width, or the latents have another number of axes than 2
            or 3.
        """
        # Presets and the configs of exports have it as a mapping.
        if not isinstance(self.attention, AttentionConfig):
            self.attention = AttentionConfig(**self.attention)
        # Attention gives each head an equal slice of the channels.
        if self.width % self.heads:
            raise UserError(
                f"model.width={self.width} is not a multiple of model.heads={self.heads}: change one of them"
            )
        if self.position == "rope" and (self.width // self.heads % 2 or self.attention.sparse):
            raise UserError(
                f"model.position=rope turns pairs of channels in dense attention: {self.width} / "
                f"{self.heads} has to be even and model.attention.kind dense, or set "
                "model.position=convolution"
            )
        # Not only a setting: the axes are those of the data.
        if self.axes not in (2, 3):
            raise UserError(f"model.axes={self.axes}: latents are [C, h, w] or [C, T, h, w], so set 2 or 3")

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Latent positions of a patch along each axis of the latents."""
        # Frames come first, as in latents [C, T, h, w]; images have none, so `patch_frames` is not read for
        # them.
        return (self.patch, self.patch) if self.axes == 2 else (self.patch_frames, self.patch, self.patch)

    def with_patch(self, patch: int) -> "DiTConfig":
        """Return the sizes with larger patches, a multiple of these, around the same blocks."""
        # The blocks know distances in units of these patches.
        scale = self.position_scale * (patch // self.patch) if self.position == "rope" else 1
        return replace(self, patch=patch, position_scale=scale)

    @property
    def patch_values(self) -> int:
        """Latent values of a patch."""
        return self.channels * math.prod(self.patch_shape)

    @property
    def needs_grid(self) -> bool:
        """True if the blocks read the grid of patches, or what follows from it."""
        return self.attention.sparse or self.position == "rope"

    def patch_grid(self, latents: Sequence[int]) -> tuple[int, ...]:
        """Return how many patches latents of `latents` = (h, w) or (T, h, w) positions have along each axis.

        Raises:
            UserError: if the latents do not divide into patches, or have too few for the attention.
        """
        shape = self.patch_shape
        if len(latents) != len(shape) or any(size % side for size, side in zip(latents, shape, strict=True)):
            sizes, sides = (" x ".join(map(str, numbers)) for numbers in (latents, shape))
            raise UserError(
                f"latents of {sizes} do not divide into patches of {sides}: choose a multiple of it"
            )
        grid = tuple(size // side for size, side in zip(latents, shape, strict=True))
        self.attention.check(grid)
        return grid


# Their names are in the record of every family, so none can be renamed.
TEXT_IDENTITY = (
    "llm",
    "revision",
    "encoder",
    "layer",
    "suffix",
    "max_tokens",
    "dtype",
    "reuse_prefix",
    "quantisation",
)
"""Settings of a text family that decide the numbers, besides the prefix."""


@dataclass
class TextConfig:
    """Settings of a text family: which LLM reads the captions, how, and what is stored."""

    name: str = ""
    """Name of the family, which a stage's `fusion.families` gives."""
    llm: str = ""
    """Local folder, hub name, `.gguf` file, or `package:<python package that ships a GGUF file>`."""
    revision: str | None = None
    """Commit hash of a hub name."""
    encoder: str = "causal"
    """Kind of model, a name of `model.encoders.encoder_kinds.ENCODERS`: `causal` (a decoder-only LLM), `t5`,
    `clip`."""
    layer: str = "-3"
    """`-3` = output of the third-to-last block (the paper's); any other index; `norm_mean`; or `10,20,30` =
    concatenated."""
    prefix: str = "{instruction} "
    """Text before the caption: system prompt, chat markup; `{instruction}` is filled in."""
    instruction: str = INSTRUCTION
    """Text that replaces `{instruction}` in the prefix; the default is the paper's."""
    suffix: str = ""
    """Text after the caption, such as the end-of-turn markup; the null caption needs at least one token
    here."""
    max_tokens: int = bounded(256, 1, 1_000_000)
    """Most tokens of a caption (suffix included, prefix not)."""
    # The spelling is that of the families on disk: under another name their identity would be another one.
    quantisation: Literal["int8", "int6", "int4", "bf16"] = "int8"
    """Format of the stored states."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type that the LLM computes in."""
    reuse_prefix: bool = True
    """True if the prefix is run once for all captions, which needs causal attention."""
    tokens_per_batch: int | None = bounded(None, 1, 10**9)
    """Tokens that the LLM reads at a time; None = 16,384 on a GPU, which fewer do not fill, else 4,096."""
    device_map: str | None = None
    """For a model folder larger than one GPU: `auto`, `balanced`, `sequential`, as accelerate distributes it;
    None = one device."""

    @property
    def full_prefix(self) -> str:
        """The prefix with the instruction filled in."""
        return self.prefix.replace("{instruction}", self.instruction)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide the numbers; a family's identity has these and the hash of the weights."""
        return {**{name: getattr(self, name) for name in TEXT_IDENTITY}, "prefix": self.full_prefix}
