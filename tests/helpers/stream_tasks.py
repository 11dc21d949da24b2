"""Tasks of the tests of waits and of the order of streams; each function runs on every rank."""

from collections import Counter
from contextlib import ExitStack
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.host import use_deepspeeds_buckets
from benchmarks.operations import Operations
from pipeline.engine import buckets, partitioned
from pipeline.engine.processes import join_process_group
from pipeline.runtime.distributed import rank_and_world
from pipeline.training.agreement import Agreement
from tests.helpers.engine_tasks import LR, dit_step, make_engine, own_part, tiny_dit, train
from tests.helpers.small_network import GLOBAL_BATCH, batch, stage

WAITS = {"synchronize": "waits", "range_push": "ranges", "range_pop": "ranges"}


class Reads(TorchDispatchMode):
    """Counts values that are read back from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def micro_steps(engine, step):
    """Run the forward and backward passes of a step; return their number."""
    (latents, timesteps, texts), target = batch(step, own_part())
    parts = list(engine.micro_batches(len(target)))
    for part in parts:
        text = [each[part].to(engine.dtype) for each in texts]
        output = engine(latents[part].to(engine.dtype), timesteps[part], text)
        engine.backward((output.float() - target[part]).square().mean())
    return len(parts)


def waits_of_a_step(settings):
    """Return the number of micro-steps, what waits for the device during them, and during the whole step."""
    engine = make_engine(config=stage(**settings))
    for step in range(3):
        train(engine, step)

    accelerator, counts = get_accelerator(), Counter()
    with ExitStack() as stack:
        for name, kind in WAITS.items():
            counted = lambda *_, kind=kind: counts.update([kind])  # noqa: E731
            stack.enter_context(mock.patch.object(accelerator, name, counted))
        reads = stack.enter_context(Reads())
        number = micro_steps(engine, 3)
        inside = dict(counts) | {"reads": reads.count}
        # As a GPU answers: DeepSpeed then waits wherever it does not rely on the order of kernels. Forward
        # passes need real streams for this answer, a step does not.
        with mock.patch.object(accelerator, "resolves_data_dependency", return_value=False):
            engine.step(LR)
    return number, inside, dict(counts)


def losses_with(settings):
    """Return losses of a LIDiT and sums of its average, with weights exchanged in between."""
    # DeepSpeed makes hpZ's groups once per process, and the tests' processes have many engines.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    engine = make_engine(network=tiny_dit, config=stage(**settings))
    losses = []
    for step in range(3):
        losses.append(dit_step(engine, step))
        engine.update_averages(GLOBAL_BATCH * (step + 1))
        with engine.averaged():
            losses.append(float(engine.averages[0].averages[0].sum()))
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    return losses


def attention_kernels(name):
    """Return whether Flash's and cuDNN's kernels may be used in a run with this setting."""
    make_engine(attention=name)
    return torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()


class RecordingStream:
    """A stream that notes when it is told to wait."""

    def __init__(self, events):
        self.events = events

    def wait_stream(self, stream):
        self.events.append("ordered")


def order_of_gathers():
    """Return what happens, in order, in a step and in an exchange of weights with their average."""
    engine = make_engine()
    train(engine, 0)
    events, zero = [], engine._optimizer
    optimizer_step, publish = engine.master_weights.inner.step, engine.master_weights.publish

    def noting(name, function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            events.append(name)
            return result

        return call

    offload = zero.parameter_offload
    with ExitStack() as stack:
        for owner, name, function in (
            (engine.master_weights.inner, "step", noting("weights written", optimizer_step)),
            (engine.master_weights, "publish", noting("published", publish)),
            (offload, "_DeepSpeedZeRoOffload__allgather_stream", RecordingStream(events)),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        train(engine, 1)
        with engine.averaged():
            pass
    return events


def leaves_and_losses(leaves, settings):
    """Return gathers of modules per micro-step, the losses of a LIDiT, and the sums of its masters.

    Args:
        leaves: the classes that are gathered whole; None = those of the package.
        settings: of the engine.
    """
    with mock.patch.object(partitioned, "LEAVES", leaves or partitioned.LEAVES):
        engine = make_engine(network=tiny_dit, config=stage(persistence_threshold=0, **settings))
    losses = [dit_step(engine, step) for step in range(3)]

    fetched, real = [], PartitionedParameterCoordinator.fetch_sub_module

    def fetch(coordinator, module, *, forward):
        fetched.append(type(module).__name__)
        return real(coordinator, module, forward=forward)

    with mock.patch.object(PartitionedParameterCoordinator, "fetch_sub_module", fetch):
        losses.append(dit_step(engine, 3))
    return len(fetched), losses, [float(master.double().sum()) for master in engine.master_weights.tensors]


def masters_and_moments(engine):
    tensors = engine.state().tensors
    return [tensor.clone() for kind in ("master", "exp_avg", "exp_avg_sq") for tensor in tensors[kind]]


def step_with(own, settings):
    """Return the operations of a step, and the masters and moments after four.

    Args:
        own: True for the engine's step on flat shards, False for DeepSpeed's.
        settings: of the engine.
    """
    engine = make_engine(network=tiny_dit, config=stage(**settings))
    zero = engine._optimizer
    if not own:
        zero.step = type(zero).step.__get__(zero)
    for step in range(3):
        dit_step(engine, step)
        zero.grad_partitions_flat_buffer.zero_()  # which only the own step does

    counted = Operations()
    real = engine._engine.step

    def counting_step():
        with counted:
            return real()

    with mock.patch.object(engine._engine, "step", counting_step):
        dit_step(engine, 3)
    return counted.count, masters_and_moments(engine)


def backward_with(own, settings):
    """Return the operations of a step's backward passes, and the masters and moments after four steps.

    Args:
        own: True for the engine's buckets, False for DeepSpeed's with their buffers.
        settings: of the engine.
    """
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of an engine before
    engine = make_engine(config=stage(**settings))
    zero = engine._optimizer
    if not own:
        use_deepspeeds_buckets(zero)
    for step in range(3):
        train(engine, step)

    counted, real = Operations(), engine.backward

    def counting_backward(loss):
        with counted:
            real(loss)

    with mock.patch.object(engine, "backward", counting_backward):
        train(engine, 3)
    return counted.count, masters_and_moments(engine)


def reductions(settings):
    """Return the reductions of gradients in a step, losses of four steps, and the norms of the masters."""
    engine = make_engine(config=stage(**settings))
    losses = [train(engine, step)[0] for step in range(3)]
    calls, real = [], buckets.reduce_scatter

    def reduce(tensors, *arguments):
        calls.append(len(tensors))
        return real(tensors, *arguments)

    with mock.patch.object(buckets, "reduce_scatter", reduce):
        losses.append(train(engine, 3)[0])
    return len(calls), losses, [float(master.double().norm()) for master in engine.master_weights.tensors]


def agreed(wishes, late):
    """Return the answers to a wish per rank and call, and how often one was read from the device."""
    rank, world = rank_and_world()
    join_process_group(10)
    agreement = Agreement(torch.device("cpu"), world, late)
    with Reads() as reads:
        answers = [agreement.ask(of_ranks[rank]) for of_ranks in wishes]
    return answers, reads.count
