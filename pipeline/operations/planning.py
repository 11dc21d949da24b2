"""Arithmetic on a stage's settings: memory per GPU, speed, days, store; and the check that a stage fits its
GPUs.

The terms of the memory are tested against the real tiny network and engine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from model.adapters.config import MAX_USERS
from model.blocks import BLOCKS
from model.common.errors import UserError
from model.config import DiTConfig
from model.encoders.latent_spaces import latent_sizes
from model.flops import count_parameters, flops_per_sample
from model.fusion import attended, collaborates, refiner_size
from pipeline.engine.network import make_network
from pipeline.engine.optim import NO_DECAY, optimizer_settings, parameter_groups
from pipeline.operations.elastic_planning import PartCost, further_parameters, part_costs
from pipeline.stage.config import StageConfig

CLIP_DOWNSAMPLING = (4, 8, 8)
"""Downsampling of most VAEs of clips."""
_OUTER_VALUES = 11
"""Values that the layers before and after the blocks keep for the backward pass without compiling, per patch
and channel."""
_REFINER_VALUES = 33
"""The same of a refiner's block, per token and channel of the refiners' width."""


@dataclass(frozen=True)
class Setup:
    """Facts that the stage's file does not state."""

    gpus: int
    gpus_per_node: int = 8
    mfu: float = 0.5
    peak_tflops: float = 989.0
    """Dense bf16 peak of a GPU; 989 = H100 and H200."""
    height: int = 256
    """Pixels."""
    width: int = 256
    llm_widths: tuple[int, ...] = (4096, 4096)
    prefix_tokens: int = 40
    caption_tokens: int = 100
    """Mean over the captions."""
    max_caption_tokens: int = 256
    """Tokens of the longest caption: a micro-batch of long ones has to fit."""
    captions: int = 2
    """Captions per pair."""
    pairs: int = 30_000_000
    channels: int = 16
    downsampling: int | tuple[int, ...] = 8
    """Pixels per position of the latents: one number in height and width, one per axis, or one in time,
    height and width."""
    frames: int | None = None
    """Frames of a clip; with downsampling in height and width alone, of its latents. None = images."""
    means_alone: bool = False
    """True if the latents are stored without their std (`latents.moments: mean`)."""
    gpu_memory: float = 80e9
    """Bytes of a GPU."""

    @property
    def latents(self) -> tuple[int, ...]:
        """Positions of a sample's latents along each axis."""
        return latent_sizes(self.downsampling, self.height, self.width, self.frames)


@dataclass(frozen=True)
class Plan:
    """Results of an estimate; bytes per GPU in `memory`."""

    parameters: dict[str, int]
    flops_per_sample: float
    local_batch: int
    micro_batch: int
    memory: dict[str, float]
    samples_per_second: float
    days: float
    bytes_per_pair: float
    store_bytes: float
    read_per_node: float
    """Bytes per second."""
    checkpoint_bytes: float
    parts: list[PartCost] = field(default_factory=list)
    """Parts of an elastic network, the full one first; empty of any other."""

    @property
    def total_memory(self) -> float:
        """Bytes per GPU."""
        return sum(self.memory.values())


def make_plan(stage: StageConfig, setup: Setup) -> Plan:
    """Estimate a stage for a number of GPUs.

    Raises:
        UserError: if the global batch does not divide, or an LLM has no width.
    """
    if len(setup.llm_widths) != len(stage.fusion.families):
        raise UserError(
            f"--widths gives {len(setup.llm_widths)} widths for the {len(stage.fusion.families)} LLMs of "
            "fusion.families"
        )
    # every rank has the same number of samples per step, as in the trainer
    local_batch, left = divmod(stage.global_batch, setup.gpus)
    if left or local_batch == 0:
        raise UserError(
            f"global_batch={stage.global_batch} is not a multiple of {setup.gpus} GPUs: choose another --gpus"
        )

    # the network: its size, and the FLOPs of one sample with all its tokens
    dit = stage.dit(setup.channels, axes=len(setup.latents))
    widths = list(setup.llm_widths)
    parameters = count_parameters(dit, stage.fusion, widths)
    # the caption's states come after those of the instruction, which all captions share
    tokens = [setup.prefix_tokens + setup.caption_tokens] * len(widths)
    prefixes = [setup.prefix_tokens] * len(widths)

    def cost(sizes: DiTConfig) -> float:
        return flops_per_sample(sizes, stage.fusion, widths, setup.latents, tokens, prefixes)

    flops, parts = cost(dit), []
    if stage.elastic.elastic:
        parts = part_costs(stage, dit, widths, setup.latents, cost)
        # a step trains some of the parts
        flops = sum(part.share * part.flops_per_sample for part in parts)
        added = further_parameters(stage, dit)
        parameters = {**parameters, "dit": parameters["dit"] + added, "total": parameters["total"] + added}

    # memory: the state does not depend on the batch, the activations grow with it
    micro_batch = min(stage.engine.micro_batch or local_batch, local_batch)
    moments = count_moments(stage, dit, widths)
    trained = parameters["total"]
    if stage.freeze == "base":
        trained = count_trained(stage, dit, widths)
        parameters = {**parameters, "adapters": trained, "total": parameters["total"] + trained}
    memory = state_memory(stage, parameters["total"], setup.gpus, moments, trained)
    if stage.engine.reduce_once:
        # whole on each GPU until the last backward pass of a step, if there are several
        several = local_batch > micro_batch or stage.elastic.sandwich
        memory["gradients of a rank"] = 4.0 * trained * several
    memory["activations"] = micro_batch * activation_bytes(stage, dit, setup)

    # speed follows from an assumed MFU; reading and saving are assumed to overlap with the steps
    speed = setup.gpus * setup.peak_tflops * 1e12 * setup.mfu / flops
    pair_bytes = bytes_per_pair(setup)

    return Plan(
        parameters=parameters,
        flops_per_sample=flops,
        local_batch=local_batch,
        micro_batch=micro_batch,
        memory=memory,
        samples_per_second=speed,
        days=stage.samples / speed / 86400,
        bytes_per_pair=pair_bytes,
        store_bytes=pair_bytes * setup.pairs,
        # a job smaller than a node has only its own GPUs to feed
        read_per_node=speed / setup.gpus * min(setup.gpus, setup.gpus_per_node) * pair_bytes,
        # fp32 masters, averages and moments; the bf16 weights are a rounded copy and are not stored
        checkpoint_bytes=4.0 * (trained * (1 + len(stage.ema)) + moments),
        parts=parts,
    )


def count_moments(stage: StageConfig, dit: DiTConfig, widths: Sequence[int]) -> int:
    """Return the number of values in the optimizer's moments of the whole network."""
    # shapes without storage: 10B parameters would not fit on a login node
    with torch.device("meta"):
        network = make_network(stage, dit, widths)

    moments = optimizer_settings(stage.optim).moments
    values = 0
    for group in parameter_groups(network, stage.optim):
        values += len(moments[group["name"]]) * sum(parameter.numel() for parameter in group["params"])

    return values


def count_trained(stage: StageConfig, dit: DiTConfig, widths: Sequence[int]) -> int:
    """Return the number of parameters that a stage trains."""
    with torch.device("meta"):
        network = make_network(stage, dit, widths)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def state_memory(
    stage: StageConfig, parameters: int, gpus: int, moments: int, trained: int | None = None
) -> dict[str, float]:
    """Return the bytes per GPU of what lasts from step to step, by kind, and of the buffers around it.

    ZeRO-3 partitions everything; ZeRO-2 keeps whole weights, ZeRO-1 whole weights and whole fp32 gradients.
    `step` is the fp32 copy of one sub-group's gradients, which ZeRO-3's own step does without; `gathered` the
    whole weights that ZeRO-3 keeps at a time.

    Args:
        stage: the stage.
        parameters: parameters of the network.
        gpus: number of GPUs.
        moments: values in the optimizer's moments of the whole network.
        trained: parameters that are trained; None = all.
    """
    engine = stage.engine
    trained = parameters if trained is None else trained
    share, trained_share = parameters / gpus, trained / gpus
    size = 2 if engine.precision == "bf16" else 4
    shared_weights = share if engine.zero_stage == 3 else parameters

    # gradients and optimizer state are fp32, whatever the precision of the weights
    memory = {
        "weights": size * shared_weights,
        "gradients": 4.0 * (trained_share if engine.zero_stage >= 2 else trained),
        "masters": 4.0 * trained_share,
        "moments": 4.0 * moments / gpus,
        "EMA": 4.0 * trained_share * len(stage.ema),
        "step": 0.0 if engine.zero_stage == 3 else 4.0 * min(trained_share, engine.sub_group_size),
        # ZeRO-3's: the gradients of a bucket, and all of them together in fp32
        "reduce bucket": (8.0 if engine.zero_stage == 3 else 4.0) * min(engine.reduce_bucket, trained),
    }
    if stage.users.count:
        # whole on each GPU while it is read, and so is its gradient before it is reduced
        memory["table of users"] = 2.0 * size * stage.users.table_values
        memory["rows of a step"] = _rows_of_a_step(stage, gpus)
    if engine.zero_stage == 3:
        memory["gathered"] = size * float(min(engine.max_live_parameters, parameters))

    return memory


def _rows_of_a_step(stage: StageConfig, gpus: int) -> float:
    """Return the bytes with which a rank's step finds the rows of the batch's users and sets them apart."""
    # a byte per value that says whether it moves; of those that do, the place, the value, its gradient and
    # two moments
    users = stage.users
    moving = min(stage.global_batch, users.count) * users.tokens * users.width
    return (users.table_values + (8.0 + 4.0 * 4) * moving) / gpus


def most_users(stage: StageConfig, setup: Setup, memory: float) -> int:
    """Return the largest `users.count` with which a stage fits its GPUs; 0 = it does not fit with one user.

    Args:
        stage: a stage with users.
        setup: facts that the stage does not state.
        memory: bytes of one GPU.
    """
    one = replace(stage, users=replace(stage.users, count=1))
    plan = make_plan(one, setup)
    trained, moments = plan.parameters["adapters"], round(plan.memory["moments"] * setup.gpus / 4)
    per_value = len(optimizer_settings(stage.optim).moments[NO_DECAY])

    def fits(count: int) -> bool:
        # as `make_plan`, without counting the parameters of a network each time: only rows are added
        with_count = replace(one, users=replace(one.users, count=count))
        more = with_count.users.table_values - one.users.table_values
        changed = state_memory(
            with_count,
            plan.parameters["total"] + more,
            setup.gpus,
            moments + per_value * more,
            trained + more,
        )
        if "gradients of a rank" in plan.memory:
            changed["gradients of a rank"] = plan.memory["gradients of a rank"] * (trained + more) / trained
        return sum({**plan.memory, **changed}.values()) <= memory

    low, high = 0, MAX_USERS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def activation_bytes(stage: StageConfig, dit: DiTConfig, setup: Setup) -> float:
    """Return the bytes of activations per sample.

    A checkpointed block keeps only its input; the largest recomputed one comes on top.
    """
    size = 2 if stage.engine.precision == "bf16" else 4
    patches = math.prod(dit.patch_grid(setup.latents))
    llms = len(attended(stage.fusion, setup.llm_widths))
    text = setup.max_caption_tokens * llms
    budget = stage.model.activation_memory_budget if stage.model.compile else None
    block = BLOCKS[dit.block].activations(dit, patches, text, budget)
    every = stage.model.checkpoint_every
    checkpointed = dit.depth // every if every else 0
    # while a checkpointed block is recomputed, all of its activations exist once
    blocks = (
        (dit.depth - checkpointed) * block + checkpointed * patches * dit.width + bool(checkpointed) * block
    )

    # the refiners read the instruction's tokens too, unlike the blocks
    refiner_width, _ = refiner_size(stage.fusion, dit)
    own = stage.fusion.refiner_blocks if stage.fusion.refiner != "none" else 0
    across = stage.fusion.collaborative_blocks if collaborates(stage.fusion, llms) else 0
    refined = (setup.prefix_tokens + setup.max_caption_tokens) * llms
    refiners = _REFINER_VALUES * refiner_width * refined * (own + across)

    return size * float(blocks + _OUTER_VALUES * patches * dit.width + refiners)


def bytes_per_pair(setup: Setup) -> float:
    """Return the bytes in the store of one pair's latents (mean and std, bf16) and captions (int8, an fp32
    scale per token, each LLM)."""
    # 2 values of 2 bytes at each position, or 1
    latents = (2.0 if setup.means_alone else 4.0) * setup.channels * math.prod(setup.latents)
    return latents + setup.captions * setup.caption_tokens * sum(width + 4.0 for width in setup.llm_widths)


def check_memory(stage: StageConfig, gpus: int, memory: float) -> None:
    """Refuse a stage whose estimate is more than a GPU has, before a job waits in a queue for it.

    Args:
        stage: the stage.
        gpus: number of GPUs.
        memory: bytes of one GPU.

    Raises:
        UserError: if the stage does not fit, or its batch does not divide among the GPUs.
    """
    widths = (Setup.llm_widths[0],) * len(stage.fusion.families)
    setup = Setup(gpus, height=stage.sample.height, width=stage.sample.width, llm_widths=widths)
    if stage.sample.frames > 1:
        setup = replace(setup, downsampling=CLIP_DOWNSAMPLING, frames=stage.sample.frames)
    plan = make_plan(stage, setup)
    needs = (
        f"{stage.name} needs {plan.total_memory / 1e9:.0f} GB on each of {gpus} GPUs, which have "
        f"{memory / 1e9:.0f} GB"
    )
    if plan.total_memory > memory and plan.memory.get("table of users") == max(plan.memory.values()):
        most = most_users(stage, setup, memory)
        raise UserError(
            f"{needs}, most of it for the table of users: set users.count={most} at most, or lower "
            "users.tokens or users.width; see `python -m pipeline.estimate`"
        )
    if plan.total_memory > memory:
        raise UserError(
            f"{needs}: set engine.micro_batch below {plan.micro_batch}, or "
            "model.checkpoint_every=1, or use more GPUs; see `python -m pipeline.estimate`"
        )
