"""First stage of a public benchmark: its prompts become pictures, in the layout that its own tools read.

`plan.json` says what belongs there and how it is drawn. A picture is there when its file is: a process that was killed may be run
again, and draws only what is missing; pictures of other weights or settings are never mixed.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress, TaskID
from torch import Tensor

from data_prep.dataset.schema import canonical_json
from model.common.errors import UserError
from pipeline.evaluation.common import BenchImage, Plan
from pipeline.inference.images import save_png, to_images
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.runtime.console import CONSOLE

PLAN, IMAGES, UNFINISHED = "plan.json", "images", ".unfinished"
_VALUES = 64
"""Of each parameter, that tell one set of weights from another: a step of training changes them all."""


def hash_weights(sampler: Sampler) -> str:
    """A hash of some values of each parameter of the network."""
    digest = hashlib.sha256()
    for name, parameter in sorted(sampler.network.named_parameters()):
        digest.update(name.encode())
        with sampler.sharded.whole(parameter) if sampler.sharded else nullcontext():
            digest.update(parameter.detach().flatten()[:_VALUES].float().cpu().numpy().tobytes())
    return f"sampled-sha256:{digest.hexdigest()}"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    unfinished.write_bytes(data)
    unfinished.rename(path)


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write down what a folder is made with; if that is written already, it has to be the same.

    Raises:
        UserError: it was made with other settings.
    """
    try:
        there: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        write_whole(path, canonical_json(settings))
        return
    wanted = json.loads(canonical_json(settings))
    differ = sorted(key for key in {*there, *wanted} if there.get(key) != wanted.get(key))
    if differ:
        raise UserError(f"{path.parent} was made otherwise ({', '.join(differ)} differ): take another folder, or remove it")


def write_plan(out: Path, plan: Plan, settings: Mapping[str, Any]) -> None:
    """`plan.json`, and the texts that the benchmark's tools expect beside the pictures.

    Raises:
        UserError: there is another plan.
    """
    keep_settings(out / PLAN, {**settings, "pictures": [asdict(picture) for picture in plan.pictures]})
    for name, text in plan.files.items():
        if not (out / IMAGES / name).is_file():
            write_whole(out / IMAGES / name, text.encode())


def read_plan(out: Path) -> tuple[list[BenchImage], dict[str, Any]]:
    """The pictures of `plan.json`, and how they are drawn.

    Raises:
        UserError: nothing was drawn there.
    """
    try:
        settings = json.loads((out / PLAN).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{out}: no {PLAN}, so nothing was drawn there: run with --stage images first") from error
    pictures = [BenchImage(**{**entry, "seeds": tuple(entry["seeds"])}) for entry in settings.pop("pictures")]
    return pictures, settings


def draw_missing(
    sampler: Sampler,
    pictures: Sequence[BenchImage],
    drawing: SamplingParams,
    batch: int,
    out: Path,
    about: Mapping[str, Any],
    shows: bool,
) -> int:
    """Draw this process's pictures that are not there; returns how many those were."""
    missing = [picture for picture in pictures if not (out / IMAGES / picture.file).is_file()]
    sampler.reader.read([drawing.negative, *(picture.prompt for picture in missing)], keep_llms=False)
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    with Progress(console=CONSOLE, disable=not (shows and CONSOLE.is_terminal)) as progress:
        task = progress.add_task("drawing", total=sum(len(each.seeds) for each in missing) * drawing.steps)
        for chunk in _batches(missing, batch):
            cells = [(picture.prompt, seed) for picture in chunk for seed in picture.seeds]
            latents = sampler.latents(
                [prompt for prompt, _ in cells],
                [seed for _, seed in cells],
                drawing,
                partial(_advance, progress, task, len(cells)),
            )
            images = iter(to_images(sampler.pixels(latents)))
            for picture in chunk:
                grid = _grid([next(images) for _ in picture.seeds])
                record = {"prompt": picture.prompt, "seeds": picture.seeds, **asdict(drawing), **about}
                _save(grid, out, picture.file, record)
        sampler.keep_pace(drawing)
    return len(missing)


def _batches(pictures: Sequence[BenchImage], batch: int) -> list[list[BenchImage]]:
    """Whole pictures, with about `batch` cells together."""
    batches: list[list[BenchImage]] = []
    room = 0
    for picture in pictures:
        if room < len(picture.seeds):
            batches.append([])
            room = batch
        batches[-1].append(picture)
        room -= len(picture.seeds)
    return batches


def _grid(cells: Sequence[Image.Image]) -> Image.Image:
    """One picture as it is; up to four as a 2x2 grid, row by row."""
    if len(cells) == 1:
        return cells[0]
    width, height = cells[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for index, cell in enumerate(cells):
        grid.paste(cell, (index % 2 * width, index // 2 * height))
    return grid


def _save(image: Image.Image, out: Path, name: str, record: dict[str, Any]) -> None:
    """Write a picture elsewhere and move it into place; JPEG with Pillow's defaults, as the benchmarks' programs do."""
    final = out / IMAGES / name
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out / UNFINISHED / f"{secrets.token_hex(8)}{final.suffix}"
    if final.suffix == ".png":
        save_png(image, unfinished, record)
    else:
        image.save(unfinished)
    unfinished.rename(final)


def _advance(progress: Progress, task: TaskID, pictures: int, _: int, latents: Tensor) -> Tensor:
    progress.advance(task, pictures)
    return latents
