"""What the web page draws: requests checked against limits, drawn one at a time, kept as PNG with their settings."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from model.common.errors import UserError
from pipeline.inference.attention_maps import overlay
from pipeline.inference.images import save_png, to_images
from pipeline.inference.sampler import Sampler, SamplingParams

MAX_PROMPT_LENGTH = 4000
MAX_WORDS = 40
NOTHING = "nothing"
OTHER = "the other weights"
NO_INSTRUCTION = "no instruction"
WITHOUT = "without "


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    side: int = 1024
    steps: int = 100
    images: int = 8


@dataclass(frozen=True)
class GenerationRequest:
    """What the page sends."""

    prompt: str
    negative: str
    height: int
    width: int
    steps: int
    guidance: float
    seed: int
    images: int
    scheduler: str
    compare: str = NOTHING
    attention: int = 0
    """Step at which to look at the attention per word; 0 = do not look."""


@dataclass(frozen=True)
class Column:
    """What one column of the page shows."""

    files: list[Path]
    words: list[tuple[Image.Image, str]]
    """Attention of the first picture: for each word an overlay, and the word with its mean share of the attention."""


class InteractiveSampler:
    """Draws requests, one at a time, and keeps the pictures."""

    def __init__(self, samplers: Mapping[str, Sampler], out: Path, limits: Limits) -> None:
        """Prepare the folder.

        Args:
            samplers: by name; the first draws, the second, if there is one, is to compare with.
            out: folder of the pictures.
            limits: of a request.
        """
        self.samplers = dict(samplers)
        self.out = out
        self.limits = limits
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    @property
    def comparisons(self) -> list[str]:
        """What a second column can show."""
        llms = list(next(iter(self.samplers.values())).reader.families)
        without = [f"{WITHOUT}{llm}" for llm in llms] if len(llms) > 1 else []
        return [NOTHING, *([OTHER] if len(self.samplers) > 1 else []), NO_INSTRUCTION, *without]

    def draw(self, request: GenerationRequest) -> list[Column]:
        """Draw a request and, if it asks for that, the same changed in one thing to compare with.

        Raises:
            UserError: the request is out of bounds or cannot be drawn; nothing was drawn then.
        """
        self._check(request)
        (name, sampler), *others = self.samplers.items()
        drawing = SamplingParams(
            request.steps, request.guidance, request.height, request.width, request.scheduler, request.negative.strip()
        )
        columns = [(name, sampler, drawing)]
        if request.compare == OTHER:
            columns.append((*others[0], drawing))
        elif request.compare == NO_INSTRUCTION:
            columns.append((name, sampler, replace(drawing, instruction=False)))
        elif request.compare != NOTHING:
            without = (request.compare.removeprefix(WITHOUT),)
            columns.append((name, sampler, replace(drawing, without=without)))
        for _, each, settings in columns:
            each.check(settings)
        with self._lock:
            return [self._draw_column(*column, request) for column in columns]

    def _check(self, request: GenerationRequest) -> None:
        limits = self.limits
        for what, least, most in (
            ("height", 1, limits.side),
            ("width", 1, limits.side),
            ("steps", 1, limits.steps),
            ("images", 1, limits.images),
            ("seed", 0, 2**53 - 1),
            ("attention", 0, request.steps),
        ):
            value = getattr(request, what)
            if not isinstance(value, int) or not least <= value <= most:
                raise UserError(f"{what}={value}: choose a whole number from {least} to {most}")
        if not request.prompt.strip():
            raise UserError("the prompt is empty: say what to draw")
        if max(len(request.prompt), len(request.negative)) > MAX_PROMPT_LENGTH:
            raise UserError(f"the prompt has more than {MAX_PROMPT_LENGTH:,} characters: shorten it")
        if not 0 <= request.guidance <= 30:
            raise UserError(f"guidance={request.guidance}: choose 0 to 30")
        if request.compare not in self.comparisons:
            raise UserError(f"compare={request.compare}: choose {', '.join(self.comparisons)}")

    def _draw_column(self, name: str, sampler: Sampler, drawing: SamplingParams, request: GenerationRequest) -> Column:
        prompt = request.prompt.strip()
        seeds = [request.seed + number for number in range(request.images)]
        latents, maps = sampler.latents_and_words([prompt] * len(seeds), seeds, drawing, request.attention)
        images = to_images(sampler.pixels(latents))
        files: list[Path] = []
        for seed, image in zip(seeds, images, strict=True):
            path = self.out / f"{time.time_ns()}_{seed}.png"
            save_png(image, path, {"prompt": prompt, "seed": seed, "source": Path(name).absolute().name, **drawing.record()})
            files.append(path)
        words = [(overlay(images[0], each.shares), f"{each.word} {each.shares.mean().item():.1%}") for each in maps[:MAX_WORDS]]
        return Column(files, words)
