"""Loading what a command samples from, a run or an export; and the options that such commands share."""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from data_prep.dataset.schema import Bucket
from model.adapters.lora import attach_lora_as_in
from model.common.dtypes import DTYPES
from model.common.errors import UserError
from model.common.extras import require
from model.common.settings import allowed_range, settings_from
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from pipeline.checkpoint.base import WithBase
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.checkpoint.weights import ExportedWeights
from pipeline.diffusers_pipeline import LIDiTModel, LIDiTPipeline
from pipeline.diffusers_video_pipeline import LIDiTVideoPipeline
from pipeline.inference.adapter_files import ADAPTER, LORA, USERS, load_user_adapter, read_lora
from pipeline.inference.call import objective_of
from pipeline.inference.elastic import ChosenParts
from pipeline.inference.sampler import Sampler, SamplingParams, partition
from pipeline.runtime.distributed import Distributed
from pipeline.stage.config import EngineConfig
from pipeline.stage.sampling import AdaptiveConfig, SamplingConfig

if TYPE_CHECKING:
    from pipeline.engine.inference import PartitionedNetwork

INDEX = "model_index.json"
TIMEOUT_MINUTES = 60
"""Longest wait of ranks with partitioned weights for each other: reading the prompts may take as long."""


def load_source(
    path: Path, weights: str, device: torch.device, dtype: torch.dtype, zero3: bool = False
) -> Sampler:
    """Load a run's folder or an exported folder.

    Args:
        path: the folder.
        weights: `ema`, `raw` or the decay of an average; an export has one set, which is `ema` here.
        device: device to sample on.
        dtype: precision of the network.
        zero3: partition the network over the processes.

    Raises:
        UserError: if the folder is neither, is damaged, or does not have these weights.
    """
    if not (path / INDEX).is_file():
        return Sampler.from_run(path, weights, device, dtype, zero3)
    if weights != "ema":
        raise UserError(
            f"{path} is an export, with one set of weights: leave out --weights {weights}, "
            "or give the run's folder"
        )
    return load_export(path, device, dtype, zero3)


def load_export(folder: Path, device: torch.device, dtype: torch.dtype, zero3: bool = False) -> Sampler:
    """Load an exported folder; with `zero3`, partition its network over the processes.

    Raises:
        UserError: if the folder contains another model or another format version, or is damaged.
    """
    # diffusers would show a progress bar for each part
    logging.disable_progress_bar()
    try:
        # with ZeRO-3 no process loads the whole network
        parts: dict[str, Any] = {"transformer": None} if zero3 else {}
        types = {"transformer": dtype, "default": torch.float32}
        kind = _pipeline_class(folder)
        pipeline = kind.from_pretrained(folder, torch_dtype=types, low_cpu_mem_usage=False, **parts)
        lora = read_lora(folder / LORA)
        partitioned = _partition_export(folder / "transformer", lora, dtype) if zero3 else None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: damaged or not complete: {error}") from error
    finally:
        logging.enable_progress_bar()

    config = pipeline.config
    defaults = SamplingConfig(
        **{name: config[name] for name in ("steps", "guidance", "height", "width")},
        scheduler=config["solver"],
        adaptive=settings_from(AdaptiveConfig, config["adaptive"], f"{folder}: adaptive"),
        **{name: config[name] for name in ("frames", "fps") if name in config},
    )

    # An export contains its own LLM and VAE, so it needs no run and no store.
    pipeline.vae.to(device)
    reader, vae = pipeline.text.to(device).reader, pipeline.space
    network = partitioned.module if partitioned else _with_lora(_plain_network(pipeline.transformer), lora)
    objective = objective_of(config, pipeline.scheduler)
    sampler = Sampler(network, reader, lambda: vae, objective, defaults, device, dtype, partitioned)
    _attach_users(sampler, folder / USERS)
    return sampler


def _pipeline_class(folder: Path) -> type[LIDiTPipeline]:
    """Return the class of an exported folder's pipeline, that of images or of clips; `from_pretrained` of
    either checks the folder."""
    try:
        index = json.loads((folder / INDEX).read_text())
    except ValueError:
        # the check names what is wrong
        return LIDiTPipeline
    is_video = isinstance(index, dict) and index.get("_class_name") == LIDiTVideoPipeline.__name__
    return LIDiTVideoPipeline if is_video else LIDiTPipeline


def _attach_users(sampler: Sampler, folder: Path) -> None:
    """Attach an export's adapter of users, if it has one; users have numbers there."""
    if not (folder / ADAPTER).exists():
        return
    if sampler.partitioned is None:
        adapter = load_user_adapter(folder / ADAPTER, sampler.network.sizes)
        sampler.network.adapters["users"] = nn.Module.to(adapter, sampler.device, sampler.dtype)
        sampler.users.folder = folder


def _with_lora(network: LIDiT, lora: Mapping[str, Tensor]) -> LIDiT:
    """Return the network with an export's LoRA attached, which is part of what its run computes."""
    try:
        attach_lora_as_in(network, lora).load_state_dict({**network.state_dict(), **lora})
    except RuntimeError as error:
        raise UserError(
            f"LoRA of another network than the export's: {error}: export the run again"
        ) from error
    return network


def _partition_export(folder: Path, lora: Mapping[str, Tensor], dtype: torch.dtype) -> "PartitionedNetwork":
    build, weights = _build_from(LIDiTModel.load_config(folder)), load_weights(folder, "ema")
    assert isinstance(weights, ExportedWeights)
    return partition(lambda: attach_lora_as_in(build(), lora), WithBase(lora, weights), dtype, EngineConfig())


def _plain_network(model: LIDiTModel) -> LIDiT:
    """Return a network on the same weights, which returns its prediction alone, as a run's does."""
    with torch.device("meta"):
        network = _build_from(model.config)()
    network.load_state_dict(model.state_dict(), assign=True)
    return network


def _build_from(config: Any) -> Callable[[], LIDiT]:
    # Built from the export's own config: the stage's YAML is not part of an export.
    dit, fusion = DiTConfig(**config["dit_config"]), FusionConfig(**config["fusion_config"])
    return partial(LIDiT, dit, fusion, config["text_widths"])


def join_ranks(ranks: Distributed, zero3: bool) -> torch.device:
    """Return this process's device; with `zero3`, first join the ranks that share the weights.

    Raises:
        UserError: if this machine lacks DeepSpeed or what it needs.
    """
    if zero3:
        require("train", "deepspeed")
        from pipeline.engine.processes import join_process_group  # imports deepspeed, which takes seconds

        join_process_group(TIMEOUT_MINUTES)
    return ranks.device


def choose_precision(name: str | None, device: torch.device) -> str:
    """Return the name of a precision: the one given, else bf16 on a GPU and fp32 on a CPU."""
    return name or ("bf16" if device.type == "cuda" else "fp32")


def add_weights_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that choose a source's weights and their precision."""
    parser.add_argument(
        "--weights", default="ema", metavar="ema|raw|DECAY", help="ema = the run's first average"
    )
    parser.add_argument("--precision", choices=tuple(DTYPES), help="default: bf16 on a GPU, else fp32")


def add_sampling_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that `choose_sampling_params` and `join_ranks` read."""
    add_weights_options(parser)
    parser.add_argument("--negative", default="", help="prompt to steer away from")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--size", metavar="HxW")
    parser.add_argument("--frames", type=int, help="frames of a clip; 1 = images; default: the run's")
    parser.add_argument("--first-frame", default="", metavar="IMAGE", help="image that the clip begins with")
    parser.add_argument(
        "--scheduler",
        default="",
        help="flow: euler, dpm, and with a difficulty head dual_loop, look_ahead; ddpm: dpm, ddim",
    )
    for setting in fields(AdaptiveConfig):
        parser.add_argument(
            f"--{setting.name}", type=type(setting.default), help=f"sample.adaptive.{setting.name}"
        )
    for name in (chosen.name for chosen in fields(ChosenParts)):
        what = "blocks" if "depth" in name else "side of a patch"
        branch = "of guidance's branch without the prompt" if "null" in name else "of an elastic network"
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help=f"{what} {branch}; default: as trained for"
        )
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="value of one of the network's further conditions (model.conditions); repeatable",
    )
    parser.add_argument("--user", default="", help="name, number or file (.safetensors) of a user")
    parser.add_argument(
        "--user-guidance", type=float, help="scale of the user by itself; default: that of the text"
    )
    parser.add_argument(
        "--quantised", action="store_true", help="pass LLM states through the family's quantization"
    )
    parser.add_argument(
        "--seed", type=int, help="seed of each prompt's first image; the next images have the next seeds"
    )
    parser.add_argument("--batch", type=int, default=8, help="images generated at once")
    parser.add_argument(
        "--together",
        action="store_true",
        help="compute a batch at once on a CPU too: several times as fast for images of few patches, which "
        "then differ from batch to batch by rounding errors",
    )
    parser.add_argument(
        "--zero3", action="store_true", help="partition the weights over the processes, as in training"
    )


def choose_sampling_params(defaults: SamplingConfig, arguments: argparse.Namespace) -> SamplingParams:
    """Return the run's own sampling settings, overridden by the command line.

    Raises:
        UserError: if a size is not HxW, a condition not NAME=VALUE, or a number out of range.
    """
    height, width = defaults.height, defaults.width
    if arguments.size is not None:
        try:
            bucket = Bucket.parse(arguments.size)
        except ValueError as error:
            raise UserError(f"--size {arguments.size}: write height x width, such as 256x192") from error
        height, width = bucket.height, bucket.width
        if bucket.frames > 1:
            raise UserError(f"--size {arguments.size}: write height x width, and --frames {bucket.frames}")

    frames = defaults.frames if arguments.frames is None else arguments.frames
    if frames < 1:
        raise UserError(f"--frames {frames}: give at least 1")
    steps = defaults.steps if arguments.steps is None else arguments.steps
    guidance = defaults.guidance if arguments.guidance is None else arguments.guidance
    return SamplingParams(
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
        scheduler=arguments.scheduler or defaults.scheduler,
        negative=arguments.negative,
        quantised=arguments.quantised,
        conditions=dict(_name_and_value(text) for text in arguments.condition),
        adaptive=_adaptive_settings(defaults.adaptive, arguments),
        parts=ChosenParts(*(getattr(arguments, chosen.name) for chosen in fields(ChosenParts))),
        user=arguments.user,
        user_guidance=arguments.user_guidance,
        frames=frames,
        first_frame=arguments.first_frame,
        together=arguments.together,
    )


def _adaptive_settings(defaults: AdaptiveConfig, arguments: argparse.Namespace) -> AdaptiveConfig:
    given = {}
    for setting in fields(AdaptiveConfig):
        value, allowed = getattr(arguments, setting.name), allowed_range(setting)
        if value is None:
            continue
        if allowed is not None and value not in allowed:
            raise UserError(f"--{setting.name} {value}: give a number from {allowed}")
        given[setting.name] = value
    return replace(defaults, **given)


def _name_and_value(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"--condition {text}: write NAME=VALUE")
    return name, value
