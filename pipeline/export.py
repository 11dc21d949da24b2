"""A run as a diffusers folder: `python -m pipeline.export RUN OUT`.

The folder holds the network as safetensors shards, scheduler and VAE as diffusers writes them, what all
captions share under each LLM, and the LLMs by name, revision and fingerprint, not their weights.
"""

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.adapter import is_adapter
from model.common.dtypes import DTYPES
from model.common.errors import UserError, command
from model.common.files import atomic_path
from model.elastic.weights import plain_network
from model.encoders.vae import VAE
from model.encoders.video_vae import VideoVAE
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.checkpoint.manifest import read_manifest
from pipeline.diffusers_pipeline import LIDiTModel, LIDiTPipeline, LIDiTText
from pipeline.diffusers_video_pipeline import LIDiTVideoPipeline
from pipeline.diffusion.adaptive import ADAPTIVE
from pipeline.diffusion.solvers import make_scheduler
from pipeline.inference.adapter_files import save_adapters
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.runtime.run_log import read_reports
from pipeline.stage.config import CheckpointConfig, StageConfig, dump_stage, load_run
from pipeline.stage.corpus import resolve


def build_pipeline(sampler: Sampler) -> LIDiTPipeline:
    """Return a sampler's parts as a diffusers pipeline.

    Raises:
        UserError: if its latent space is not one that diffusers can save.
    """
    # other latent spaces have no class that diffusers could name in the folder
    space = sampler.vae
    if not isinstance(space, VAE | VideoVAE):
        raise UserError(
            f"latent space `{space.name}`: an export holds a diffusers AutoencoderKL or video VAE: sample "
            "from the run itself"
        )

    network = sampler.network
    # the config has only what JSON can hold, so that `from_pretrained` can build the network from it
    widths = [constants.width for constants in sampler.reader.constants.values()]
    sizes = asdict(network.sizes)
    if sizes["position_scale"] == 1:
        # Folders of networks that do not need it are as they were before there was one.
        del sizes["position_scale"]
    transformer: Any = LIDiTModel(sizes, asdict(network.fusion.config), widths)
    nn.Module.to(
        transformer, sampler.dtype
    )  # diffusers' own `to` warns of modules to keep in fp32, of which there are none
    # Adapters have files of their own.
    base = {name: value for name, value in network.state_dict().items() if not is_adapter(name)}
    transformer.load_state_dict(base)
    text = LIDiTText.from_reader(sampler.reader)
    # the objective decides the scheduler; another one would read the predictions wrongly
    defaults, objective = sampler.defaults, sampler.objective
    if objective.shift_positions is not None:
        # A scheduler has one shift: that of the default size.
        size = SamplingParams(height=defaults.height, width=defaults.width, frames=defaults.frames)
        objective = objective.at_size(math.prod(sampler.latent_shape(size)[1:]))
    scheduler = make_scheduler(objective)
    follows, times = defaults.scheduler in ADAPTIVE, sampler.objective.patch_times
    kind: type[LIDiTPipeline] = LIDiTPipeline
    of_clips: dict[str, Any] = {}
    if space.encodes_clips:
        kind, of_clips = LIDiTVideoPipeline, {"frames": defaults.frames, "fps": defaults.fps}
    return kind(
        transformer.eval(), scheduler, space.module, text,
        defaults.height, defaults.width, defaults.steps, defaults.guidance, objective=sampler.objective.name,
        # only what differs from the defaults, so that other networks' folders stay as they were
        patch_times=asdict(times) if times.kind != "shared" else None,
        **({"solver": defaults.scheduler, "adaptive": asdict(defaults.adaptive)} if follows else {}),
        **of_clips,
    )  # fmt: skip


def export(
    run: Path,
    out: Path,
    weights: str,
    precision: str,
    shard: str,
    depth: int | None = None,
    patch: int | None = None,
) -> None:
    """Write the folder, which appears complete or not at all.

    Args:
        run: a run's folder.
        out: the folder to write.
        weights: `ema`, `raw`, or the decay of an average.
        precision: `bf16` or `fp32`.
        shard: largest file of weights.
        depth: blocks of the part of an elastic network to export; None = all.
        patch: side of a patch of that part; None = the full network's.

    Raises:
        UserError: if `out` exists, or the run cannot be read.
    """
    # before the network is loaded, which takes long for a large one
    if out.exists():
        raise UserError(f"{out} exists: remove it or name another folder")
    # on the CPU: an export computes nothing, and login nodes have no GPU
    sampler = Sampler.from_run(run, weights, torch.device("cpu"), DTYPES[precision])
    # an export has no parts: it is the plain network that a part is
    sampler.network = plain_network(sampler.network, depth, patch)
    pipeline = build_pipeline(sampler)
    pipeline.card = make_card(run, sampler, weights, precision)
    with atomic_path(out) as unfinished:
        pipeline.save_pretrained(unfinished, safe_serialization=True, max_shard_size=shard)
        save_adapters(unfinished, sampler.network)


def make_card(run: Path, sampler: Sampler, weights: str, precision: str) -> dict[str, bytes]:
    """Return README.md and, if the run has sampled images, samples.png: from the run's own record."""
    stage, corpus = resolve(load_run(run))

    # the facts come from the checkpoint and the log, so that no one has to fill them in by hand
    newest = Checkpoints(run / "checkpoints", CheckpointConfig()).newest()
    manifest = (read_manifest(newest) if newest else None) or {}
    reports = read_reports(run)
    parameters = sum(parameter.numel() for parameter in sampler.network.parameters())
    rows = sum(corpus.rows.values())
    readers = {"": sampler.reader, ", for clips": sampler.reader.clips}
    llms = []

    for what, reader in readers.items():
        for name, family in (reader.families if reader else {}).items():
            llms.append(f"- `{name}`{what}: {_llm(family.identity)}")
    samples, steps = manifest.get("samples", 0), manifest.get("step", 0)
    loss = reports[-1].get("loss") if reports else None

    facts = {
        "Parameters trained": f"{parameters:,}",
        "Objective": stage.objective.name,
        "Samples seen": f"{samples:,} in {steps:,} steps of {stage.global_batch}",
        "Weights": f"{weights}, {precision}",
        "Training pairs": f"{rows:,} in {len(corpus.rows)} buckets: {corpus}",
        "Last training loss": "not recorded" if loss is None else f"{loss:.4f}",
    }
    # the newest grid of the training, else the one of `pipeline.sample`
    grids = [*sorted((run / "grids").glob("*.png"))[-1:], *(run / "samples").glob("grid.png")]
    lines = [
        # not `diffusers`: hubs would show a DiffusionPipeline.from_pretrained, which does not know the class
        "---", "library_name: li-dit", "pipeline_tag: text-to-image", "license: other",
        # licenses of data and LLMs cannot be known from the run
        "license_name: TO FILL IN", "license_link: TO FILL IN", "---", "",
        f"# {stage.name}", "",
        "LI-DiT: a diffusion transformer on the fused states of frozen LLMs "
        "(Ma et al., NeurIPS 2024, arXiv 2406.11831).", "",
        *(["![samples](samples.png)", ""] if grids else []),
        "```python", "from pipeline.diffusers_pipeline import LIDiTPipeline", "",
        'pipeline = LIDiTPipeline.from_pretrained("FOLDER")',
        'pipeline("a red apple", seed=0).images[0].save("apple.png")',
        "```", "",
        "Language models, not part of this folder, each under its own license:", "", *llms, "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), "",
        "License of the training data: TO FILL IN. Intended use and limits: TO FILL IN.", "",
        "## Stage", "", "```yaml", dump_stage(without_folders(stage)).rstrip(), "```", "",
    ]  # fmt: skip
    card = {"README.md": "\n".join(lines).encode()}
    if grids:
        card["samples.png"] = grids[0].read_bytes()
    return card


def without_folders(stage: StageConfig) -> StageConfig:
    """Return the stage as others may read it: absolute paths are cut to their last name."""

    def name(path: str) -> str:
        # an export may be published, and paths reveal users and clusters
        return Path(path).name if path.startswith(("/", "~")) else path

    return replace(
        stage,
        runs=name(stage.runs),
        start_from=name(stage.start_from),
        vae=name(stage.vae),
        data=replace(
            stage.data,
            store=name(stage.data.store),
            cache=name(stage.data.cache),
            datasets={
                dataset: replace(share, store=name(share.store))
                for dataset, share in stage.data.datasets.items()
            },
        ),
        checkpoint=replace(stage.checkpoint, upload=name(stage.checkpoint.upload)),
    )


def _llm(identity: dict[str, Any]) -> str:
    revision = f" at `{identity['revision']}`" if identity.get("revision") else ""
    prefix = json.dumps(identity.get("prefix", ""), ensure_ascii=False)
    return f"`{identity.get('llm')}`{revision}, layer {identity.get('layer')}, prefix `{prefix}`"


@command
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.export", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument(
        "--weights", default="ema", metavar="ema|raw|DECAY", help="ema = the run's first average"
    )
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--depth", type=int, help="blocks of the part of an elastic network; default: all")
    parser.add_argument("--patch", type=int, help="side of a patch of that part; default: model.patch")
    parser.add_argument("--shard", default="5GB", help="largest file of weights")
    arguments = parser.parse_args()
    part = arguments.depth, arguments.patch
    export(arguments.run, arguments.out, arguments.weights, arguments.precision, arguments.shard, *part)
    print(
        f"{arguments.out}: load it with LIDiTPipeline.from_pretrained, or draw with python -m "
        f"pipeline.sample {arguments.out}"
    )


if __name__ == "__main__":
    main()
