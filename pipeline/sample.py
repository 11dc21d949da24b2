"""Draw pictures with a trained run: `python -m pipeline.sample RUN --prompt "a red apple"`.

Started by torchrun or srun with several processes, each draws its share of the pictures on its own GPU; a picture
depends on its prompt, its seed and the settings alone. With --zero3 the processes share the network's weights too, for one
that does not fit a GPU.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from rich.progress import Progress, TaskID
from torch import Tensor

from data_prep.dataset.schema import Bucket
from model.common.errors import UserError, command
from model.common.files import write_atomic
from pipeline.export import load_source
from pipeline.inference.images import make_grid, save_png, to_images
from pipeline.inference.sampler import DTYPES, Sampler, SamplingParams
from pipeline.runtime.console import CONSOLE
from pipeline.runtime.distributed import Distributed, gather
from pipeline.stage.config import SampleConfig

MAX_GRID = 64
TIMEOUT = 60
"""Minutes that ranks with shared weights wait for one another: as long as reading the prompts may take."""


@dataclass(frozen=True)
class SampleImage:
    """One picture to draw."""

    file: str
    prompt: str
    seed: int


def plan_pictures(prompts: Sequence[str], images: int, seed: int) -> list[SampleImage]:
    """`images` pictures of each prompt; the j-th has seed + j, whatever else is drawn."""
    return [
        SampleImage(f"{number:05d}_{image:02d}.png", prompt, seed + image)
        for number, prompt in enumerate(prompts)
        for image in range(images)
    ]


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Prompts from the command line and from a file with one a line; empty lines are passed over.

    Raises:
        UserError: the file does not exist, or there is no prompt at all.
    """
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {file}: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError('no prompt: give --prompt "..." or --prompts FILE')
    return prompts


def choose_sampling_params(defaults: SampleConfig, arguments: argparse.Namespace) -> SamplingParams:
    """The run's own settings of sampling, with what the command line sets over them.

    Raises:
        UserError: a size that is not HxW.
    """
    height, width = defaults.height, defaults.width
    if arguments.size is not None:
        try:
            bucket = Bucket.parse(arguments.size)
        except ValueError as error:
            raise UserError(f"--size {arguments.size}: write height x width, such as 256x192") from error
        height, width = bucket.height, bucket.width
    steps = defaults.steps if arguments.steps is None else arguments.steps
    guidance = defaults.guidance if arguments.guidance is None else arguments.guidance
    return SamplingParams(steps, guidance, height, width, arguments.scheduler, arguments.negative, arguments.quantised)


def draw_pictures(
    sampler: Sampler,
    pictures: Sequence[SampleImage],
    drawing: SamplingParams,
    batch: int,
    out: Path,
    about: dict[str, Any],
    shows: bool,
) -> list[dict[str, Any]]:
    """Draw and write this process's pictures; returns a record of each, as the index has it."""
    records: list[dict[str, Any]] = []
    with Progress(console=CONSOLE, disable=not (shows and CONSOLE.is_terminal)) as progress:
        task = progress.add_task("drawing", total=len(pictures) * drawing.steps)
        for start in range(0, len(pictures), batch):
            chunk = pictures[start : start + batch]
            latents = sampler.latents(
                [picture.prompt for picture in chunk],
                [picture.seed for picture in chunk],
                drawing,
                partial(_advance, progress, task, len(chunk)),
            )
            for picture, image in zip(chunk, to_images(sampler.pixels(latents)), strict=True):
                records.append({**asdict(picture), **asdict(drawing), **about})
                save_png(image, out / picture.file, records[-1])
        sampler.keep_pace(drawing)
    return records


def _advance(progress: Progress, task: TaskID, pictures: int, _: int, latents: Tensor) -> Tensor:
    progress.advance(task, pictures)
    return latents


def begin(ranks: Distributed, zero3: bool) -> torch.device:
    """This process's device; with `zero3` join the process group of the ranks that share the weights.

    Raises:
        UserError: this machine lacks what DeepSpeed needs.
    """
    if zero3:
        from pipeline.engine.processes import join_process_group  # imports deepspeed, for seconds

        join_process_group(timeout_minutes=TIMEOUT)
    return ranks.device


def gather_records(records: list[dict[str, Any]], ranks: Distributed) -> list[dict[str, Any]]:
    """The records of all processes in order of their files; waits until all have drawn."""
    if ranks.world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return sorted((record for share in gather(records) for record in share), key=lambda record: record["file"])


def write_overview(records: Sequence[dict[str, Any]], out: Path) -> None:
    """`index.jsonl`, a line a picture, and `grid.png` of the first ones."""
    first = records[:MAX_GRID]
    images = [Image.open(out / record["file"]) for record in first]
    make_grid(images, [record["prompt"] for record in first]).save(out / "grid.png")
    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True) for record in records]
    write_atomic(out / "index.jsonl", "\n".join(lines) + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.sample", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="RUN|EXPORT", help="folder of a run, or what pipeline.export wrote")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument("--negative", default="", help="prompt to steer away from")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, help="of the first picture of each prompt; the next have the next seeds")
    parser.add_argument("--images", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--size", metavar="HxW")
    parser.add_argument("--scheduler", default="", help="flow: euler, dpm; ddpm: dpm, ddim")
    parser.add_argument("--quantised", action="store_true", help="take LLM states through the family's quantisation")
    parser.add_argument("--weights", default="ema", metavar="ema|raw|DECAY", help="ema = the run's first average")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn at once")
    parser.add_argument("--zero3", action="store_true", help="share the weights out over the processes, as in training")
    parser.add_argument("--out", type=Path, help="default: samples/ in RUN")
    return parser.parse_args(arguments)


@command
def main() -> None:
    """Command line."""
    arguments = parse()
    if arguments.images < 1 or arguments.batch < 1:
        raise UserError(f"--images {arguments.images} --batch {arguments.batch}: both have to be at least 1")
    ranks = Distributed.from_environment()
    prompts = read_prompts(arguments.prompt, arguments.prompts)
    device = begin(ranks, arguments.zero3)
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    sampler = load_source(arguments.source, arguments.weights, device, DTYPES[precision], arguments.zero3)
    drawing = choose_sampling_params(sampler.defaults, arguments)
    sampler.check(drawing)
    seed = sampler.defaults.seed if arguments.seed is None else arguments.seed
    pictures = plan_pictures(prompts, arguments.images, seed)
    mine = pictures[ranks.rank :: ranks.world]
    out = arguments.out or arguments.source / "samples"
    out.mkdir(parents=True, exist_ok=True)
    sampler.reader.read([drawing.negative, *(picture.prompt for picture in mine)], keep_llms=False)
    about = {"source": arguments.source.absolute().name, "weights": arguments.weights, "precision": precision}
    records = gather_records(draw_pictures(sampler, mine, drawing, arguments.batch, out, about, ranks.rank == 0), ranks)
    if ranks.rank == 0:
        write_overview(records, out)
        print(f"{out}: {len(records)} pictures, grid.png, index.jsonl")
        if sampler.sharded:
            held, all_bytes = sampler.sharded.bytes()
            print(f"each of {ranks.world} processes held {held / 2**20:,.1f} of the network's {all_bytes / 2**20:,.1f} MiB")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
