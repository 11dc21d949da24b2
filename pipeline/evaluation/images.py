"""First stage of a public benchmark: generate images, in the layout that the benchmark's own tools read.

`plan.json` lists the images and the settings that they are generated with. An image is done once its file
exists. A process that was killed can be started again and generates only what is missing. Images of other
weights or settings are never mixed.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from model.common.errors import UserError
from model.common.files import write_atomic
from model.common.records import canonical_json, checked, read_record
from pipeline.evaluation.common import BenchImage, Plan
from pipeline.inference.generate import generate_images
from pipeline.inference.images import save_png
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.runtime.settings_record import record_settings

PLAN, IMAGES, UNFINISHED = "plan.json", "images", ".unfinished"
HASHED_VALUES = 64
"""Values of each parameter that go into the hash of the weights. One training step changes all of them."""


def hash_weights(sampler: Sampler) -> str:
    """Return a hash of some values of each parameter of the network."""
    digest = hashlib.sha256()
    # by name, so that the order in which modules were made does not matter
    for name, parameter in sorted(sampler.network.named_parameters()):
        digest.update(name.encode())
        # partitioned parameters are gathered one at a time
        with sampler.partitioned.whole(parameter) if sampler.partitioned else nullcontext():
            digest.update(parameter.detach().flatten()[:HASHED_VALUES].float().cpu().numpy().tobytes())
    return f"sampled-sha256:{digest.hexdigest()}"


def write_plan(out: Path, plan: Plan, settings: Mapping[str, Any]) -> None:
    """Write `plan.json`, and the text files that the benchmark's own tools expect next to the images.

    Raises:
        UserError: if the folder has another plan.
    """
    record_settings(out / PLAN, {**settings, "pictures": [asdict(image) for image in plan.images]})
    for name, text in plan.files.items():
        path = out / IMAGES / name
        # existing files stay: other shares may be writing or reading them
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)


def read_plan(out: Path) -> tuple[list[BenchImage], dict[str, Any]]:
    """Return the images of `plan.json`, and the settings that they are generated with.

    Raises:
        UserError: if no images were generated in this folder.
    """
    try:
        settings = read_record(out / PLAN, dict[str, Any], "use another folder")
    except FileNotFoundError as error:
        raise UserError(f"{out}: no {PLAN}, so it has no images: run with --stage images first") from error
    try:
        images = checked(list[BenchImage], canonical_json(settings.pop("pictures", None)))
        for image in images:
            check_inside(image.file)
    except ValueError as error:
        raise UserError(f"{out / PLAN}: damaged: its list of images: {error}: use another folder") from error

    return images, settings


def check_inside(file: str) -> None:
    """Check that the path of an image stays inside the folder of the images.

    Raises:
        ValueError: if it does not.
    """
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"{file!r} is not a path inside {IMAGES}/")


def generate_missing(
    sampler: Sampler,
    images: Sequence[BenchImage],
    params: SamplingParams,
    batch: int,
    out: Path,
    about: Mapping[str, Any],
    shows: bool,
) -> int:
    """Generate those of this process's images that do not exist yet.

    Args:
        sampler: the network.
        images: images of this process.
        params: sampling settings.
        batch: about how many images (cells of a grid) to generate at once.
        out: folder of the evaluation.
        about: facts to store in each image.
        shows: show a progress bar.

    Returns:
        The number of images that were missing.
    """
    # a file has its final name only once it is complete, so its existence is enough
    missing = [image for image in images if not (out / IMAGES / image.file).is_file()]
    # all prompts are read first, so that the LLMs can be freed before the first image
    sampler.reader.of(params.frames).read(
        [params.negative, *(image.prompt for image in missing)], keep_llms=False
    )
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)

    chunks = _batches(missing, batch)
    batches: list[list[tuple[str, int]]] = []
    for chunk in chunks:
        batches.append([])
        for image in chunk:
            batches[-1] += [(image.prompt, seed) for seed in image.seeds]

    # the generator comes first, so that `zip` exhausts it
    for generated, chunk in zip(generate_images(sampler, batches, params, shows), chunks, strict=True):
        cells = iter(generated)
        for image in chunk:
            grid = _grid([next(cells) for _ in image.seeds])
            record = {"prompt": image.prompt, "seeds": image.seeds, **params.record(), **about}
            save_image(grid, out, image.file, record)

    return len(missing)


def _batches(images: Sequence[BenchImage], batch: int) -> list[list[BenchImage]]:
    """Group whole images into batches of about `batch` cells."""
    batches: list[list[BenchImage]] = []
    room = 0
    for image in images:
        if room < len(image.seeds):
            batches.append([])
            room = batch
        batches[-1].append(image)
        room -= len(image.seeds)

    return batches


def _grid(cells: Sequence[Image.Image]) -> Image.Image:
    """Return a single cell as it is, and up to four as a 2x2 grid, row by row."""
    if len(cells) == 1:
        return cells[0]
    width, height = cells[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for index, cell in enumerate(cells):
        grid.paste(cell, (index % 2 * width, index // 2 * height))
    return grid


def save_image(image: Image.Image, out: Path, name: str, record: dict[str, Any]) -> None:
    """Write an image of an evaluation; JPEG with Pillow's defaults, as the benchmarks' own programs do."""
    final = out / IMAGES / name
    final.parent.mkdir(parents=True, exist_ok=True)

    # not `atomic_path`: the benchmarks' own tools read every file of the image folders,
    # so a killed process must not leave a part of a file there
    unfinished = out / UNFINISHED / f"{secrets.token_hex(8)}{final.suffix}"
    if final.suffix == ".png":
        save_png(image, unfinished, record)
    else:
        image.save(unfinished)
    # both are in the evaluation's folder: a rename is atomic within one file system only
    unfinished.rename(final)
