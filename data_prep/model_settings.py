"""Settings of the models that look at a dataset's images: annotators before the plan, captioners after it."""

from dataclasses import dataclass, field
from typing import Literal

from model.common.errors import UserError
from model.common.settings import MAX_SEED, bounded


@dataclass
class HeadConfig:
    """A head on CLIP's embedding of an image, such as LAION's aesthetic predictor."""

    column: str = ""
    """Name of its column."""
    weights: str = ""
    """Local safetensors file: linear layers in the order of the numbers in their names."""
    activation: Literal["none", "relu"] = "none"
    """Function between the layers; LAION's aesthetic predictor has none."""
    output: Literal["none", "sigmoid"] = "none"
    """Function of the last layer."""


@dataclass
class AnnotatorConfig:
    """A model that looks at all scanned images before the plan is finished, and gives columns for filters."""

    name: str = ""
    """Name, with which the columns of CLIP begin; of `language`, the column."""
    kind: Literal["clip", "classifier", "language", "function"] = "clip"
    """CLIP with `heads`; an image classifier of transformers; the language of the first caption; a function
    of yours."""
    model: str = ""
    """Local folder or hub name of the model."""
    revision: str | None = None
    """Commit hash of a hub name; of a function, any text that names its version."""
    heads: list[HeadConfig] = field(default_factory=list)
    """Heads on CLIP's embedding, besides the column NAME_score: the cosine of image and first caption."""
    embedding: bool = False
    """True if the embedding itself is stored, as NAME_embedding."""
    labels: dict[str, str] = field(default_factory=dict)
    """Label of a classifier -> the column that gets its probability."""
    function: str = ""
    """`module:function`: gets a list of images and a list of their captions, returns a list per column. It
    runs only with `--allow-functions`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of a function, and their types: `number` or `text`."""
    batch: int = bounded(64, 1, 100_000)
    """Images that are looked at at a time."""

    def __post_init__(self) -> None:
        """Check that the fields fit the kind.

        Raises:
            UserError: if one is missing.
        """
        needed = {"clip": "model", "classifier": "model", "language": "name", "function": "function"}
        for name in ("name", needed[self.kind]):
            if not getattr(self, name):
                raise UserError(f"annotations {self.name or self.kind}: `{name}` is empty: set it")
        if self.kind in ("classifier", "function") and not (self.labels or self.columns):
            name = "labels" if self.kind == "classifier" else "columns"
            raise UserError(f"annotations {self.name}: `{name}` is empty: name what it is to give")

        for column, kind in self.columns.items():
            if kind not in ("number", "text"):
                raise UserError(f"annotations {self.name}: columns.{column}={kind}: set number or text")

    @property
    def types(self) -> dict[str, str]:
        """Its columns and their types: number, text or embedding."""
        if self.kind == "language":
            return {self.name: "text"}
        if self.kind == "function":
            return dict(self.columns)
        if self.kind == "classifier":
            return dict.fromkeys(self.labels.values(), "number")
        heads = dict.fromkeys((head.column for head in self.heads), "number")
        embedding = {f"{self.name}_embedding": "embedding"} if self.embedding else {}
        return {f"{self.name}_score": "number", **heads, **embedding}


@dataclass
class PromptConfig:
    """A prompt for captions, which every image gets."""

    kind: str = ""
    """Kind of the captions that it gives; several prompts may give the same one."""
    text: str = ""
    """Instruction to the model; `{caption}` is replaced by the pair's first caption."""
    max_tokens: int = bounded(256, 1, 100_000)
    """Tokens at which an answer is cut; a cut answer is no caption."""


@dataclass
class CaptionsConfig:
    """A captions family: captions of the pairs that a vision-language model writes."""

    name: str = "captions"
    """Name of the family, which `text.captions` gives."""
    model: str = ""
    """Local folder or hub name of a vision-language model of transformers, or its name at the endpoint."""
    revision: str | None = None
    """Commit hash of a hub name; of a model behind an endpoint, any text that names its version."""
    endpoint: str = ""
    """Address of an endpoint with OpenAI's chat protocol, such as `http://localhost:8000/v1` (vLLM, SGLang).

    Empty = transformers in this process.
    """
    api_key_variable: str = ""
    """Environment variable that has the endpoint's key; empty = no key."""
    prompts: list[PromptConfig] = field(default_factory=list)
    """Questions to the model, each about every image."""
    temperature: float = bounded(0.0, 0.0, 100.0)
    """0 = the likeliest token each time."""
    top_p: float = bounded(1.0, 0.0, 1.0)
    """The likeliest tokens with this probability together can be picked."""
    seed: int = bounded(0, 0, MAX_SEED)
    """Seed of the answers' random numbers."""
    max_letters: int = bounded(4000, 1, 65_536)
    """Letters of a caption; longer answers are dropped."""
    refusals: list[str] = field(default_factory=list)
    """Starts of answers that are dropped, in any case, besides the usual ones ("I'm sorry", ...)."""
    template: str = ""
    """Whole input of a model whose processor has no chat template, such as `USER: <image>\\n{prompt}
    ASSISTANT:`."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type that a model in this process computes in."""
    batch: int = bounded(16, 1, 100_000)
    """Questions that a model in this process answers at a time."""
    concurrency: int = bounded(32, 1, 4_096)
    """Requests under way to the endpoint, per task."""
    timeout_seconds: float = bounded(120.0, 0.01, 86_400.0)
    """Time for one answer of the endpoint, after which it is asked again."""

    def __post_init__(self) -> None:
        """Check the prompts.

        Raises:
            UserError: if there are none, or one is incomplete.
        """
        where = f"captions {self.name}"
        if not self.model:
            raise UserError(f"{where}: `model` is empty: name a folder, a hub name, or the endpoint's model")
        if not self.prompts:
            raise UserError(f"{where}: no prompts: add {{kind: ..., text: ...}}")
        for number, prompt in enumerate(self.prompts):
            if not prompt.kind or not prompt.text.strip():
                raise UserError(f"{where}: prompts[{number}]: set both `kind` and `text`")
        if self.template and "{prompt}" not in self.template:
            raise UserError(f"{where}: template={self.template!r}: it needs {{prompt}}")

    @property
    def kinds(self) -> list[str]:
        """Kinds of its captions, in the order of the prompts."""
        return list(dict.fromkeys(prompt.kind for prompt in self.prompts))
