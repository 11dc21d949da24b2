"""Images for the web page: requests are checked against limits, sampled one at a time, and saved as PNG with
their settings."""

import reprlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from model.common.errors import UserError
from pipeline.inference.attention_maps import overlay
from pipeline.inference.clips import save_clip, to_clips
from pipeline.inference.difficulty_maps import check_maps, difficulty_maps
from pipeline.inference.elastic import part_choices
from pipeline.inference.images import save_png, to_images
from pipeline.inference.sampler import Sampler, SamplingParams

MAX_PROMPT_LENGTH = 4000
MAX_WORDS = 40
NOTHING = "nothing"
OTHER = "the other weights"
NO_INSTRUCTION = "no instruction"
WITHOUT = "without "
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
"""Types of a request's fields."""


@dataclass(frozen=True)
class Limits:
    """Upper limits of a request."""

    side: int = 1024
    steps: int = 100
    images: int = 8


@dataclass(frozen=True)
class GenerationRequest:
    """A request of the page."""

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
    """Step whose attention per word is shown; 0 = none."""
    difficulty: bool = False
    """Show the expected error of the first image's patches."""
    part: str = ""
    """Part of an elastic network, a name of `parts`; empty = as trained for."""
    user: str = ""
    """A name or number of `users`; empty = nobody."""
    user_guidance: float | None = None
    """Scale of the user by itself; None = that of the text, 0 = nobody."""


@dataclass(frozen=True)
class Column:
    """One column of the page."""

    files: list[Path]
    maps: list[tuple[Image.Image, str]]
    """Overlays on the first image, each with a label: its attention to each word, with the word's mean share,
    and the expected error of its patches, with the time."""


class InteractiveSampler:
    """Samples the images of requests, one request at a time, and saves them."""

    def __init__(self, samplers: Mapping[str, Sampler], out: Path, limits: Limits) -> None:
        """Prepare the folder.

        Args:
            samplers: by name; the first one samples, the second, if there is one, is for comparison.
            out: folder of the images.
            limits: of a request.
        """
        self.samplers = dict(samplers)
        self.out = out
        self.limits = limits
        # The web server answers each request in a thread; the device has memory for one at a time.
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    @property
    def comparisons(self) -> list[str]:
        """Choices for a second column."""
        llms = list(next(iter(self.samplers.values())).reader.families)
        without = [f"{WITHOUT}{llm}" for llm in llms] if len(llms) > 1 else []
        return [NOTHING, *([OTHER] if len(self.samplers) > 1 else []), NO_INSTRUCTION, *without]

    @property
    def parts(self) -> list[str]:
        """Parts of the first sampler's network, the default first; empty if it is not elastic."""
        return list(part_choices(next(iter(self.samplers.values())).network))

    @property
    def users(self) -> list[str]:
        """Users of the first sampler's network; empty if it has none."""
        return next(iter(self.samplers.values())).users.choices()

    def generate(self, request: GenerationRequest) -> list[Column]:
        """Sample a request's images and, if it asks for that, a second column that differs in one setting.

        Raises:
            UserError: if the request is out of bounds or cannot be sampled; nothing is sampled then.
        """
        self._check(request)
        (name, sampler), *others = self.samplers.items()
        params = SamplingParams(
            request.steps,
            request.guidance,
            request.height,
            request.width,
            request.scheduler,
            request.negative.strip(),
            frames=sampler.defaults.frames,
        )
        if request.user:
            params = replace(params, user=request.user, user_guidance=request.user_guidance)
            # Images outlive the list of names, from which a user can be deleted.
            params = sampler.resolve(params)
        if request.part:
            params = replace(params, parts=part_choices(sampler.network)[request.part])

        columns = [(name, sampler, params)]
        if request.compare == OTHER:
            columns.append((*others[0], params))
        elif request.compare == NO_INSTRUCTION:
            columns.append((name, sampler, replace(params, instruction=False)))
        elif request.compare != NOTHING:
            without = (request.compare.removeprefix(WITHOUT),)
            columns.append((name, sampler, replace(params, without=without)))

        if params.frames > 1 and (request.attention or request.difficulty):
            raise UserError("attention and difficulty are shown of images: set attention=0, difficulty=false")
        for _, column_sampler, column_params in columns:
            column_sampler.check(column_params)
            if request.difficulty:
                check_maps(column_sampler)
        with self._lock:
            return [self._generate_column(*column, request) for column in columns]

    def _check(self, request: GenerationRequest) -> None:
        # Scripts send any JSON, and the page's own fields can be sent with any value too.
        for field in fields(request):
            value, kind = getattr(request, field.name), field.type
            if kind == float | None:
                kind, value = float, 0.0 if value is None else value
            accepted = (int, float) if kind is float else kind
            # A bool is an int in Python.
            wrong_bool = isinstance(value, bool) and kind is not bool
            if wrong_bool or not isinstance(value, accepted):  # type: ignore[arg-type]
                raise UserError(f"{field.name}={reprlib.repr(value)}: give {KINDS[kind]}")  # type: ignore[index]

        limits = self.limits
        for what, least, most in (
            ("height", 1, limits.side),
            ("width", 1, limits.side),
            ("steps", 1, limits.steps),
            ("images", 1, limits.images),
            # JavaScript's largest exact integer: the page could not show or repeat a larger seed.
            ("seed", 0, 2**53 - 1),
            ("attention", 0, request.steps),
        ):
            value = getattr(request, what)
            if not least <= value <= most:
                raise UserError(f"{what}={value}: choose a whole number from {least} to {most}")
        # An empty prompt is the null caption and would work, but nobody asks for it on purpose.
        if not request.prompt.strip():
            raise UserError("the prompt is empty: describe an image")
        if max(len(request.prompt), len(request.negative)) > MAX_PROMPT_LENGTH:
            raise UserError(f"the prompt has more than {MAX_PROMPT_LENGTH:,} characters: shorten it")
        if not 0 <= request.guidance <= 30:
            raise UserError(f"guidance={request.guidance}: choose 0 to 30")
        if request.part and request.part not in self.parts:
            known = ", ".join(self.parts) or "none"
            raise UserError(f"part={reprlib.repr(request.part)}: the network has {known}: choose one of them")
        if request.user_guidance is not None and not 0 <= request.user_guidance <= 30:
            raise UserError(f"user_guidance={request.user_guidance}: choose 0 to 30")
        # Checked against the list, since a path in its place would be read as a user's file.
        if request.user and request.user not in self.users:
            raise UserError(f"user={reprlib.repr(request.user)}: choose one of the page's list")
        if request.compare not in self.comparisons:
            raise UserError(f"compare={request.compare}: choose {', '.join(self.comparisons)}")

    def _generate_column(
        self, name: str, sampler: Sampler, params: SamplingParams, request: GenerationRequest
    ) -> Column:
        prompt = request.prompt.strip()
        seeds = [request.seed + number for number in range(request.images)]
        latents, maps = sampler.latents_and_words([prompt] * len(seeds), seeds, params, request.attention)
        clips, pixels = params.frames > 1, sampler.pixels(latents)
        images: list[Any] = to_clips(pixels) if clips else to_images(pixels)
        save: Callable[[Any, Path, dict[str, Any]], None] = save_clip if clips else save_png
        files: list[Path] = []
        for seed, image in zip(seeds, images, strict=True):
            # The time makes the name unique, also for the same seed with other settings.
            path = self.out / f"{time.time_ns()}_{seed}{'.webp' if clips else '.png'}"
            source = Path(name).absolute().name
            settings = {**params.record(), "evaluations": sampler.evaluations(params)}
            if clips:
                settings["fps"] = sampler.defaults.fps
            save(image, path, {"prompt": prompt, "seed": seed, "source": source, **settings})
            files.append(path)

        overlays = []
        # Each overlay is an image of its own, sent to the browser.
        for word in maps[:MAX_WORDS]:
            overlays.append((overlay(images[0], word.shares), f"{word.word} {word.shares.mean().item():.1%}"))
        if request.difficulty:
            _, difficulty = difficulty_maps(sampler, prompt, request.seed, params)
            overlays += [(overlay(images[0], each.log_variance), each.label) for each in difficulty]
        return Column(files, overlays)
