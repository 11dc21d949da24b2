"""Generate images or clips with a trained run: `python -m pipeline.sample RUN --prompt "a red apple"`.

A run on clips writes each as an animated WebP, and as mp4 too if PyAV is installed (extra `video`).

Started by torchrun or srun with several processes, each process generates its share of the images on its own
GPU. An image depends only on its prompt, its seed and the sampling settings. With --zero3 the processes also
share the network's weights, for a network that does not fit on one GPU.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image
from torch import Tensor

from data_prep.clips.media import decode_clip
from model.common.dtypes import DTYPES
from model.common.errors import UserError, command
from model.common.files import write_atomic
from pipeline.inference.clips import make_contact_sheet, make_moving_grid, save_clip, to_clips
from pipeline.inference.difficulty_maps import check_maps, show_difficulty, show_patches
from pipeline.inference.generate import generate
from pipeline.inference.images import make_grid, save_png, to_images
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.inference.source import (
    add_sampling_options,
    choose_precision,
    choose_sampling_params,
    join_ranks,
    load_source,
)
from pipeline.runtime.distributed import Distributed, ensure_process_group, gather

MAX_GRID = 64
"""Maximum number of images in `grid.png`."""
MAX_MOVING = 16
"""Maximum number of clips in `grid.webp`, each frame of which is a grid."""
MAX_FPS = 1000


@dataclass(frozen=True)
class SampleImage:
    """One image to generate."""

    file: str
    prompt: str
    seed: int


def plan_images(
    prompts: Sequence[str], images_per_prompt: int, seed: int, own_seeds: bool = False, suffix: str = ".png"
) -> list[SampleImage]:
    """Return the images to generate.

    Args:
        prompts: their prompts.
        images_per_prompt: how many of each.
        seed: of the first image; the j-th image of each prompt has seed + j.
        own_seeds: True = the seeds of the next prompt go on after those of the last one.
        suffix: of the files.
    """
    images: list[SampleImage] = []
    for number, prompt in enumerate(prompts):
        first = seed + number * images_per_prompt if own_seeds else seed
        for offset in range(images_per_prompt):
            # by name, the files are in the order of the prompts, which `pipeline.follow` relies on
            images.append(SampleImage(f"{number:05d}_{offset:02d}{suffix}", prompt, first + offset))
    return images


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Return the prompts of the command line and of a file with one prompt per line; empty lines are skipped.

    Raises:
        UserError: if the file does not exist, or there is no prompt at all.
    """
    prompts = list(given)
    if file is not None:
        try:
            # editors on Windows begin a file with a byte order mark, which is no part of the first prompt
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {file}: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]

    if not prompts:
        raise UserError('no prompt: give --prompt "..." or --prompts FILE')
    return prompts


def write_images(
    sampler: Sampler,
    images: Sequence[SampleImage],
    params: SamplingParams,
    batch: int,
    out: Path,
    about: dict[str, Any],
    shows: bool,
) -> list[dict[str, Any]]:
    """Generate and write this process's images or clips.

    Args:
        sampler: the network.
        images: images of this process.
        params: sampling settings.
        batch: number of images generated at once.
        out: folder to write to.
        about: facts to add to each record.
        shows: show a progress bar.

    Returns:
        A record per image, as `index.jsonl` has it.
    """
    chunks = [images[first : first + batch] for first in range(0, len(images), batch)]
    requests = [(image.prompt, image.seed) for image in images]
    batches = [requests[first : first + batch] for first in range(0, len(images), batch)]
    settings = {**params.record(), "evaluations": sampler.evaluations(params), **about}
    convert: Callable[[Tensor], list[Any]] = to_images
    save: Callable[[Any, Path, dict[str, Any]], None] = save_png
    if params.frames > 1:
        convert, save = to_clips, save_clip

    records: list[dict[str, Any]] = []
    # the generator comes first, so that `zip` exhausts it
    generated = generate(sampler, batches, params, shows, convert)
    for images_of_batch, chunk in zip(generated, chunks, strict=True):
        for image, entry in zip(images_of_batch, chunk, strict=True):
            records.append({**asdict(entry), **settings})
            save(image, out / entry.file, records[-1])
    return records


def gather_records(records: list[dict[str, Any]], ranks: Distributed) -> list[dict[str, Any]]:
    """Return the records of all processes by file, once all processes are done. Collective."""
    # without --zero3 the ranks have worked alone so far, and there is no process group yet
    ensure_process_group(ranks)
    return sorted(chain.from_iterable(gather(records)), key=lambda record: record["file"])


def write_overview(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Write `index.jsonl`, with one line per image, and `grid.png` with the first images; of clips, it shows
    some frames of each, and `grid.webp` moves."""
    # a grid of thousands of images would be too large to open
    first = records[:MAX_GRID]
    prompts = [record["prompt"] for record in first]
    if first and first[0].get("frames", 1) > 1:
        clips = [decode_clip((out / record["file"]).read_bytes(), record["frames"]) for record in first]
        make_contact_sheet(clips, prompts).save(out / "grid.png")
        moving = make_moving_grid(clips[:MAX_MOVING], prompts[:MAX_MOVING], first[0]["fps"])
        write_atomic(out / "grid.webp", moving)
    else:
        images = [Image.open(out / record["file"]) for record in first]
        make_grid(images, prompts).save(out / "grid.png")

    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True) for record in records]
    write_atomic(out / "index.jsonl", "\n".join(lines) + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.sample", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("source", type=Path, metavar="RUN|EXPORT", help="folder of a run or of an export")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line")
    parser.add_argument("--images", type=int, default=1, help="images per prompt")
    parser.add_argument(
        "--own-seeds",
        action="store_true",
        help="no two images share their noise; without it, each prompt has the same seeds, which looks alike "
        "but makes the score of many prompts depend on them",
    )
    add_sampling_options(parser)
    parser.add_argument("--fps", type=float, help="frames per second of clips; default: the run's")
    parser.add_argument(
        "--difficulty",
        action="store_true",
        help="also show, in files of their own, the expected error of each image's patches at several steps, "
        "and what the network reads on the way, where patches may be at different times",
    )
    parser.add_argument("--out", type=Path, help="default: samples/ in RUN")
    return parser.parse_args(arguments)


@command
def main() -> None:
    """Run the command line."""
    arguments = parse()
    if arguments.images < 1 or arguments.batch < 1:
        raise UserError(f"--images {arguments.images} --batch {arguments.batch}: both have to be at least 1")
    ranks = Distributed.from_environment()
    prompts = read_prompts(arguments.prompt, arguments.prompts)

    device = join_ranks(ranks, arguments.zero3)
    precision = choose_precision(arguments.precision, device)
    sampler = load_source(arguments.source, arguments.weights, device, DTYPES[precision], arguments.zero3)
    params = sampler.resolve(choose_sampling_params(sampler.defaults, arguments))
    # wrong settings are found before the LLMs are loaded, which can take minutes
    sampler.check(params)
    if arguments.difficulty:
        check_maps(sampler)
        if params.frames > 1:
            raise UserError("--difficulty shows maps of images: give --frames 1")
    fps = sampler.defaults.fps if arguments.fps is None else arguments.fps
    if not 0 < fps <= MAX_FPS:
        raise UserError(f"--fps {fps}: give a number above 0, and at most {MAX_FPS}")

    seed = sampler.defaults.seed if arguments.seed is None else arguments.seed
    # interleaved, so that the processes' shares differ by at most one image
    suffix = ".webp" if params.frames > 1 else ".png"
    planned = plan_images(prompts, arguments.images, seed, arguments.own_seeds, suffix)
    images = planned[ranks.rank :: ranks.world]
    out = arguments.out or arguments.source / "samples"
    out.mkdir(parents=True, exist_ok=True)

    # all prompts are read first, so that the LLMs can be freed before the first image
    sampler.reader.of(params.frames).read(
        [params.negative, *(image.prompt for image in images)], keep_llms=False
    )
    about = {"source": arguments.source.absolute().name, "weights": arguments.weights, "precision": precision}
    if params.frames > 1:
        about["fps"] = fps
    own_records = write_images(sampler, images, params, arguments.batch, out, about, shows=ranks.rank == 0)
    if arguments.difficulty:
        for image in images:
            for name, show in (("difficulty", show_difficulty), ("patches", show_patches)):
                shown = show(sampler, image.prompt, image.seed, params)
                shown.save(out / image.file.replace(".png", f"_{name}.png"))
    records = gather_records(own_records, ranks)

    # all images exist now, since each rank gave its records after its last image
    if ranks.rank == 0:
        write_overview(records, out)
        kind = "clips, grid.webp" if params.frames > 1 else "images"
        print(f"{out}: {len(records)} {kind}, grid.png, index.jsonl")
        if sampler.partitioned:
            own, total = (size / 2**20 for size in sampler.partitioned.bytes())
            print(f"each of {ranks.world} processes stored {own:,.1f} of the network's {total:,.1f} MiB")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
