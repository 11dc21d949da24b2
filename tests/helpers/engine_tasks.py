"""Tasks of the engine's and the checkpoints' tests; each function runs on every rank."""

import functools
import math
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.blocks import BLOCKS
from model.common.errors import UserError
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.dit_block import DiTBlock
from pipeline.engine.ema import warm_decay
from pipeline.engine.engine import Engine
from pipeline.engine.optim import optimizer_settings, parameter_groups
from pipeline.runtime.distributed import rank_and_world
from tests.helpers.small_network import GLOBAL_BATCH, Network, batch, stage

LR = 0.01


def make_engine(seed=0, network=Network, config=None, **settings):
    torch.manual_seed(seed)
    config = config or stage(**settings)
    return Engine(network, config, GLOBAL_BATCH // int(os.environ["WORLD_SIZE"]))


def mean_over_ranks(value):
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def own_part():
    rank, world = rank_and_world()
    return slice(rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world)


def train(engine, step, spoil=False, limit=math.inf):
    """Make one step; return its loss over the global batch, True if it was applied, and its gradient norm."""
    inputs, target = batch(step, own_part())
    total = torch.zeros(())
    for part in engine.micro_batches(len(target)):
        latents, timesteps, texts = inputs
        output = engine(
            latents[part].to(engine.dtype), timesteps[part], [text[part].to(engine.dtype) for text in texts]
        )
        loss = (output.float() - target[part]).square().mean()
        engine.backward(loss * float("nan") if spoil else loss)
        total += loss.detach() / engine.micro_steps
    applied, norm = engine.step(LR, limit)
    if applied:
        engine.update_averages(GLOBAL_BATCH * (step + 1))
    return mean_over_ranks(total), applied, norm


def gathered(engine, kind):
    """Return whole tensors of one kind of the engine's state on rank 0; zeros for a missing moment."""
    state, weights = engine.state(), {}
    flats = state.tensors[kind]
    for name, shape in state.layout.shapes.items():
        whole = torch.zeros(math.prod(shape))
        for extent in state.layout.extents(name):
            if extent.rank == engine.rank and flats[extent.group].numel():
                values = flats[extent.group][extent.offset : extent.offset + extent.length]
                whole[extent.start : extent.start + extent.length] = values
        dist.reduce(whole, dst=0)
        weights[name] = whole.view(shape)
    return weights


def full_weights(engine, kind):
    """Return all weights, `master` or `ema_<i>`, as fp32 on rank 0, and an empty dict on other ranks."""
    weights = gathered(engine, kind) | {
        name: value.float() for name, value in engine.state().replicated.items()
    }
    return weights if engine.rank == 0 else {}


def local_state(engine):
    """Return copies of everything that the rank owns except padding, and of buffers and frozen parameters."""
    state = engine.state()
    values = {}
    for kind, tensors in state.tensors.items():
        for extent in state.layout.extents_of_rank(engine.rank):
            part = tensors[extent.group][extent.offset : extent.offset + extent.length]
            values[kind, extent.name, extent.start] = part.clone()
    return values | state.replicated


def same(tensors, others):
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], others[name]) for name in tensors
    )


def train_like_ddp(settings, steps):
    """Return (engine's, torch DDP's) losses, and the largest difference of the averages from a reference."""
    config = stage(**settings)
    engine = make_engine(config=config)
    torch.manual_seed(0)
    plain = Network()
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    reference = DistributedDataParallel(plain, broadcast_buffers=False)
    optimizers = [plain_optimizer(config, group) for group in parameter_groups(plain, config.optim)]
    assert {tensor.dtype for tensor in engine.master_weights.tensors} == {torch.float32}
    first = full_weights(engine, "master")
    if engine.rank == 0:
        frozen_in_bf16 = {"frozen": start["frozen"].to(engine.dtype).float()}
        assert same(first, start | frozen_in_bf16), "the masters are not the plain fp32 start"
    averages, losses, worst = None, [], 0.0
    for step in range(steps):
        loss, applied, _ = train(engine, step)
        assert applied
        (latents, timesteps, texts), target = batch(step, own_part())
        plain.zero_grad()
        expected = (reference(latents, timesteps, texts) - target).square().mean()
        expected.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), config.optim.clip)
        for optimizer in optimizers:
            optimizer.step()
        losses.append((loss, mean_over_ranks(expected.detach())))
        weights, average = full_weights(engine, "master"), full_weights(engine, "ema_0")
        if engine.rank == 0:
            averages = averages or {name: value.double() for name, value in first.items()}
            for name, value in averages.items():
                value += (1 - warm_decay(0.9, step)) * (weights[name].double() - value)
                if name not in ("frozen", "seen"):
                    worst = max(worst, float((value.float() - average[name]).abs().max()))
    return losses, worst


def skip_a_block(settings, schedule):
    """Train a network whose second block is used in some micro-steps only, and compare with plain torch.

    Args:
        settings: of the engine.
        schedule: for each step, whether each micro-step uses the block; None = all do, and the step's loss is
            not finite.

    Returns:
        For each step the largest change of the block's masters, the largest difference of that change from
        plain torch's, and both gradient norms.
    """
    config = stage(**settings)
    # With these a step depends only on its own gradients, much as with SGD.
    config.optim.betas, config.optim.eps, config.optim.weight_decay = (0.0, 0.0), 1.0, 0.0
    engine = make_engine(config=config)
    torch.manual_seed(0)
    plain = Network()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LR, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    block = [name for name, _ in plain.named_parameters() if name.startswith("blocks.1.")]

    def block_weights():
        weights = gathered(engine, "master")
        return torch.cat([weights[name].flatten() for name in block])

    def plain_weights():
        parameters = dict(plain.named_parameters())
        return torch.cat([parameters[name].detach().flatten() for name in block])

    results = []
    for step, used in enumerate(schedule):
        before, plain_before = block_weights(), plain_weights()
        spoil, used = used is None, used or [True] * engine.micro_steps
        applied, norm = micro_steps_with_and_without(engine, step, used, spoil)
        assert applied != spoil
        plain_norm = float("nan")
        if not spoil:
            plain_norm = float(plain_step(plain, optimizer, step, used, engine))
        change, plain_change = block_weights() - before, plain_weights() - plain_before
        results.append(
            (float(change.abs().max()), float((change - plain_change).abs().max()), norm, plain_norm)
        )
    return results


def micro_steps_with_and_without(engine, step, used, spoil):
    """One step of the engine, of which each micro-step uses the second block or not."""
    (latents, timesteps, texts), target = batch(step, own_part())
    for part, use in zip(engine.micro_batches(len(target)), used, strict=True):
        engine.module.skipped = () if use else (1,)
        text = [text[part].to(engine.dtype) for text in texts]
        output = engine(latents[part].to(engine.dtype), timesteps[part], text)
        loss = (output.float() - target[part]).square().mean()
        engine.backward(loss * float("nan") if spoil else loss)
    return engine.step(LR)


def plain_step(plain, optimizer, step, used, engine):
    """The same step by torch, on all ranks' samples; returns the norm of the gradients."""
    optimizer.zero_grad()
    (latents, timesteps, texts), target = batch(step)
    share = GLOBAL_BATCH // engine.world
    size = share // engine.micro_steps
    for start in range(0, GLOBAL_BATCH, size):
        part = slice(start, start + size)
        plain.skipped = () if used[start % share // size] else (1,)
        output = plain(latents[part], timesteps[part], [text[part] for text in texts])
        ((output - target[part]).square().mean() * size / GLOBAL_BATCH).backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), engine.stage.optim.clip)
    optimizer.step()
    return norm


def skip_a_leaf():
    """Return changes of the masters of a DiT's middle block, a leaf of ZeRO-3: used, not used, used again."""
    config = stage(micro_batch=None)
    config.optim.betas, config.optim.eps, config.optim.weight_decay = (0.0, 0.0), 1.0, 0.0
    engine = make_engine(network=tiny_dit, config=config)
    blocks = list(engine.module.blocks)
    for step in range(3):  # until the layers that start at zero let gradients through to the blocks
        dit_step(engine, step)

    changes = []
    for step, used in enumerate((blocks, blocks[::2], blocks)):
        engine.module.blocks = nn.ModuleList(used)
        before = gathered(engine, "master")
        dit_step(engine, 3 + step)
        after = gathered(engine, "master")
        changes.append(
            max(
                float((after[name] - before[name]).abs().max())
                for name in after
                if name.startswith("blocks.1.")
            )
        )
    return changes


def plain_optimizer(config, group):
    """Return torch's own optimizer for a group; for a toy one, the registered on whole parameters."""
    if config.optim.name not in ("adamw", "muon"):
        return optimizer_settings(config.optim).build([{**group, "lr": LR}])
    settings = {"lr": LR, "weight_decay": group["weight_decay"]}
    if group["name"] == "muon":
        return torch.optim.Muon(
            group["params"], momentum=config.optim.momentum, adjust_lr_fn="match_rms_adamw", **settings
        )
    return torch.optim.AdamW(group["params"], betas=config.optim.betas, eps=config.optim.eps, **settings)


def swap_and_skip(settings):
    """Check that the averages replace the weights without a trace, and that skipped steps change nothing."""
    engine = make_engine(**settings)
    for step in range(3):
        train(engine, step)
    inputs, _ = batch(9)
    inputs = (inputs[0].to(engine.dtype), inputs[1], [text.to(engine.dtype) for text in inputs[2]])
    with torch.no_grad():
        plain_output = engine(*inputs).clone()
    average, before = full_weights(engine, "ema_1"), local_state(engine)
    with engine.averaged(1), torch.no_grad():
        output = engine(*inputs).float()
    assert same(local_state(engine), before)
    with torch.no_grad():
        assert torch.equal(engine(*inputs), plain_output)
    if engine.rank == 0:
        network = Network()
        network.load_state_dict(average)
        expected = network.to(engine.dtype)(*inputs).float()
        torch.testing.assert_close(
            output,
            expected,
            rtol=1e-5 if engine.dtype == torch.float32 else 0.02,
            atol=2e-2 * (engine.dtype != torch.float32) + 1e-6,
        )
    _, applied, norm = train(engine, 3, spoil=engine.rank == engine.world - 1)
    assert not applied
    assert not math.isfinite(norm)
    kept = local_state(engine)
    assert same(
        {name: kept[name] for name in kept if name != "seen"},
        {name: before[name] for name in before if name != "seen"},
    )
    if settings.get("zero_stage", 3) == 3:
        _, applied, norm = train(engine, 3, limit=1e-6)
        assert not applied
        assert norm > 1e-6
    with_grad, applied, norm = train(engine, 3)
    assert applied
    assert math.isfinite(norm)
    assert engine.state().optimizer_step == 4
    return with_grad


def compiled_blocks():
    """Return graphs and graph breaks of a compiled LIDiT under ZeRO-3, and its and eager losses."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    real = torch.compile
    torch.compile = functools.partial(real, backend="aot_eager")
    try:
        losses = {}
        for compiled in (False, True):
            config = stage(micro_batch=None)
            config.model.compile = compiled
            engine = make_engine(network=tiny_dit, config=config)
            losses[compiled] = [dit_step(engine, step) for step in range(2)]
    finally:
        torch.compile = real
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), losses


def whole_while_building(settings):
    """Return the most elements that this rank had at once while the network was built, its share, and all."""
    built, at_once = [], []

    class WatchedBlock(DiTBlock):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            built.append(self)
            at_once.append(sum(parameter.numel() for block in built for parameter in block.parameters()))

    def build():
        BLOCKS.register("watched")(WatchedBlock)
        try:
            return tiny_dit(block="watched")
        finally:
            BLOCKS.remove("watched")

    engine = make_engine(network=build, config=stage(**settings))
    blocks = [name for name in engine.master_weights.layout.shapes if name.startswith("blocks.")]
    extents = engine.master_weights.layout.extents_of_rank(engine.rank)
    held = sum(extent.length for extent in extents if extent.name in blocks)
    return max(at_once), held, sum(math.prod(engine.master_weights.layout.shapes[name]) for name in blocks)


def checkpointed_losses(every):
    """Return losses of a LIDiT under ZeRO-3 that recomputes every n-th block."""

    def build():
        network = tiny_dit()
        network.checkpoint_every = every
        return network

    engine = make_engine(network=build, config=stage(micro_batch=None))
    return [dit_step(engine, step) for step in range(3)]


def tiny_dit(llms=2, width=32, block="dit"):
    network = LIDiT(
        DiTConfig(depth=3, width=width, heads=4, channels=4, block=block),
        FusionConfig(families=["a", "b", "c"][:llms]),
        [24, 16, 8][:llms],
    )
    return network


def dit_step(engine, step):
    generator = torch.Generator().manual_seed(step)
    latents, target = torch.randn(2, GLOBAL_BATCH, 4, 8, 8, generator=generator)[:, own_part()]
    states = [torch.randn(GLOBAL_BATCH, 6, width, generator=generator)[own_part()] for width in (24, 16)]
    texts = [Text(value, torch.ones(value.shape[:2], dtype=torch.bool), 2) for value in states]
    loss = (
        (
            engine(latents.to(engine.dtype), Condition(torch.full((len(latents),), 0.5), texts)).float()
            - target
        )
        .square()
        .mean()
    )
    engine.backward(loss)
    engine.step(LR)
    return mean_over_ranks(loss.detach())


def fresh_masters_equal_plain(precision):
    """Return True if LIDiT's masters start with exactly the plain network's weights."""
    engine = make_engine(seed=5, network=tiny_dit, precision=precision)
    weights = full_weights(engine, "master")
    torch.manual_seed(5)
    plain = tiny_dit().state_dict()
    return engine.rank > 0 or same(weights, plain)


def fail_on_rank_one():
    if rank_and_world()[0] == 1:
        raise RuntimeError("on purpose")


def micro_batches(settings):
    """Return the number of micro-steps, and the samples of one."""
    engine = make_engine(**settings)
    return engine.micro_steps, engine.micro_batch


def refusal(config):
    """Return the error message of an engine with these settings, or an empty text."""
    try:
        make_engine(config=config)
    except UserError as error:
        return str(error)
    return ""


def held_bytes(settings):
    """Return the number of trained parameters, and the bytes of this rank's share between steps, by kind."""
    engine = make_engine(network=functools.partial(tiny_dit, width=64), config=stage(**settings))
    dit_step(engine, 0)
    zero, state = engine._engine.optimizer, engine.state().tensors
    if engine.stage.engine.zero_stage == 3:
        weights, gradients = zero.fp16_partitioned_groups_flat, [zero.grad_partitions_flat_buffer]
    else:
        weights = getattr(zero, "bf16_groups_flat", None) or zero.bit16_groups_flat
        gradients = getattr(zero, "fp32_groups_gradients_flat", None) or [
            torch.zeros_like(master) for master in state["master"]
        ]
    shared = {tensor.data_ptr() for tensor in weights}
    kinds = {
        "weights": weights,
        "gradients": gradients,
        "masters": [master for master in state["master"] if master.data_ptr() not in shared],
        "moments": [tensor for kind in engine.state().moments for tensor in state[kind]],
        "EMA": [
            average for kind, averages in state.items() if kind.startswith("ema_") for average in averages
        ],
    }
    count = sum(math.prod(shape) for shape in engine.master_weights.layout.shapes.values())
    return count, {kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in kinds.items()}
