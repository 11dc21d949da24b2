"""What the ranks of the tests of drawing do."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist

from pipeline import diffusers_pipeline, evaluate, sample
from pipeline.inference import sampler, source
from pipeline.inference.elastic import ChosenParts
from pipeline.inference.sampler import Sampler, SamplingParams
from tests.helpers.fake_snapshot import DOWN, WIDTHS
from tests.helpers.tiny_sampler import WIDTHS as LETTERS
from tests.helpers.tiny_sampler import LetterLLM, make_sampler


def draw(*arguments):
    """`python -m pipeline.sample` on this rank, in the process group that it already has; names of the files
    that it wrote."""
    files = []

    def save_png(image, path, settings):
        files.append(path.name)
        real(image, path, settings)

    real = sample.save_png
    with (
        patch.object(sys, "argv", ["sample", "run", *map(str, arguments)]),
        patch.object(sample, "load_source", lambda *_: make_sampler()),
        patch.object(sample, "save_png", save_png),
        patch.object(dist, "destroy_process_group"),
    ):
        sample.main()
    return files


def partition_all(build, weights, dtype, settings):
    """`sampler.partition`, which leaves small parameters whole, for a network all of whose parameters are
    small."""
    return sampler.partition(
        build, weights, dtype, replace(settings, persistence_threshold=0, max_live_parameters=0)
    )


def draw_export(program, *arguments):
    """`python -m pipeline.<program>` on this rank with an exported folder; bytes of it that this rank holds,
    and all."""
    used = []

    def load_export(*given):
        used.append(load(*given))
        return used[-1]

    load = source.load_export
    with (
        patch.object(sys, "argv", [program, *map(str, arguments)]),
        patch.object(diffusers_pipeline, "load_llm", lambda family, device: LetterLLM(LETTERS[family.name])),
        patch.object(source, "partition", partition_all),
        patch.object(source, "load_export", load_export),
        patch.object(dist, "destroy_process_group"),
    ):
        {"sample": sample, "evaluate": evaluate}[program].main()
    return used[0].partitioned.bytes() if used[0].partitioned else None


def latents_of_run(run, shards, prompts, parts=None):
    """Latents that this rank draws with the newest checkpoint of a run on the fake snapshot."""
    loaded = Sampler.from_run(Path(run), "ema", torch.device("cpu"), torch.float32, shards)
    loaded._load_vae = lambda: SimpleNamespace(downsampling=DOWN)
    for name, (width, _) in WIDTHS.items():
        rng = torch.Generator().manual_seed(width)
        loaded.reader.known[name] = {
            prompt: torch.randn(len(prompt), width, generator=rng) for prompt in prompts
        }
    drawing = SamplingParams(2, 3.0, 8 * DOWN, 4 * DOWN, parts=parts or ChosenParts())
    latents = [loaded.latents([prompt], [len(prompt)], drawing) for prompt in prompts]
    loaded.keep_pace(drawing)
    return torch.cat(latents)
