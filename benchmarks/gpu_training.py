"""Phases of `benchmarks.gpu_probe` around whole networks: the engine under ZeRO-3, feeding, PixArt, the LLM.

DeepSpeed, diffusers and what reads GGUF files are imported by the phases that need them: a machine without
them runs the others.
"""

import argparse
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_kernels import caption_lengths, network_sizes
from benchmarks.gpu_timing import Probe
from benchmarks.reporting import GOAL_MFU
from model.condition import Condition
from model.config import DiTConfig, FusionConfig, TextConfig
from model.flops import flops_per_sample

FAMILIES = ["a", "b"]
FUSION = FusionConfig(families=FAMILIES)
LR = 1e-4
SHOWN_KERNELS = 8
STEPS_AHEAD = 3
"""Batches that are made before the steps; the steps take them in turns."""


@dataclass(frozen=True)
class Work:
    """Sizes of the network and of the batches that a rank trains on."""

    sizes: DiTConfig
    width: int
    """Channels of each LLM's hidden states."""
    side: int
    """Side of the latents."""
    samples: int
    """Samples of a step."""
    micro: int
    """Samples of a micro-batch."""
    longest: int
    """Most tokens of a caption, which one caption of each batch has."""
    prefix: int = 40
    """Tokens before the caption."""

    def flops(self, tokens: float) -> float:
        """Return FLOPs of a sample whose captions have `tokens` tokens on average."""
        total = [self.prefix + round(tokens)] * len(FAMILIES)
        widths, prefixes = [self.width] * len(FAMILIES), [self.prefix] * len(FAMILIES)
        latents = (self.side, self.side)
        return flops_per_sample(self.sizes, FUSION, widths, latents, total, prefixes)


def work_of(probe: Probe, side: int, samples: int, micro: int) -> Work:
    """Return the work of the 1B network at a size of images, or tiny work."""
    sizes = network_sizes(probe)
    if probe.tiny:
        return Work(sizes, width=48, side=8, samples=4, micro=2, longest=8, prefix=2)
    return Work(sizes, width=4096, side=side, samples=samples, micro=micro, longest=256)


# -- batches -------------------------------------------------------------------------------------------------


def random_batch(work: Work, seed: int, counts: dict[str, list[int]] | None = None) -> Any:
    """Return a batch as a loader process hands it over, a `PackedBatch` of random numbers.

    Args:
        work: sizes.
        seed: of the lengths of captions.
        counts: tokens of each caption by LLM, 0 = the null caption; None = drawn for each LLM by itself.
    """
    from pipeline.data.batch import Layout, PackedBatch, allocate, tensors_in

    shape = (work.samples, work.sizes.channels, work.side, work.side)
    if counts is None:
        counts = {}
        for number, family in enumerate(FAMILIES):
            counts[family] = caption_lengths(work.samples, work.longest, seed + number)

    layout: Layout = [(name, torch.int64, (work.samples,)) for name in ("ids", "sources", "passes")]
    layout += [("mean", torch.bfloat16, shape), ("std", torch.bfloat16, shape)]
    layout.append(("u", torch.float32, (work.samples,)))
    for family, lengths in counts.items():
        tokens = sum(lengths)
        layout.append((f"{family}/values", torch.uint8, (tokens, work.width)))
        layout.append((f"{family}/scales", torch.float32, (tokens,)))
        layout.append((f"{family}/lengths", torch.int32, (work.samples,)))

    memory = allocate(layout).zero_()
    tensors = tensors_in(memory, layout)
    tensors["ids"].copy_(torch.arange(work.samples))
    tensors["mean"].normal_()
    tensors["std"].fill_(0.1)
    tensors["u"].uniform_()
    for family, lengths in counts.items():
        tensors[f"{family}/values"].random_(0, 256)
        tensors[f"{family}/scales"].fill_(0.02)
        tensors[f"{family}/lengths"].copy_(torch.tensor(lengths))

    bucket = f"{8 * shape[-2]}x{8 * shape[-1]}"
    packed = PackedBatch(bucket, 0, seed, False, memory, layout, (0,), counts)
    return packed.pin_memory() if torch.cuda.is_available() else packed


def random_constants(device: torch.device, work: Work) -> dict[str, Any]:
    """Return the `TextConstants` of both LLMs."""
    from pipeline.text.texts import TextConstants

    constants = {}
    for family in FAMILIES:
        prefix = torch.randn(work.prefix, work.width, device=device)
        null = torch.randn(1, work.width, device=device)
        zero, one = torch.zeros(work.width), torch.ones(work.width)
        mean, std = zero.to(device), one.to(device)
        constants[family] = TextConstants(prefix, null, mean, std, "int8", work.width)
    return constants


def feeding(probe: Probe) -> None:
    """Measure what a step does before the network: unpack, noise, and hidden states of the text."""
    from pipeline.data.batch import sample_keys
    from pipeline.data.noise import normal_numbers, sample_noise, seeds_of
    from pipeline.text.texts import to_text
    from pipeline.training.inputs import TOKENS_MULTIPLE

    work = work_of(probe, side=32, samples=256, micro=128)
    packed, constants = random_batch(work, 0), random_constants(probe.device, work)
    megabytes = {"megabytes": round(packed.memory.numel() / 1e6, 1), "samples": work.samples}
    unpack = partial(packed.unpack, probe.device)
    probe.result("unpack, noise included", probe.milliseconds(unpack), "ms", **megabytes)
    copy = partial(packed.memory.to, probe.device, non_blocking=True)
    probe.result("copy of the batch", probe.milliseconds(copy), "ms", **megabytes)

    zeros = [0] * work.samples
    keys = sample_keys((0,), zeros, zeros, range(work.samples))
    shape = (work.samples, work.sizes.channels, work.side, work.side)
    noise = partial(sample_noise, probe.device, shape, keys, "noise")
    probe.result("one stream of noise", probe.milliseconds(noise), "ms")
    if probe.device.type == "cuda":
        on_cpu = normal_numbers(seeds_of(keys, "noise"), math.prod(shape[1:])).view(shape)
        difference = float((noise().cpu() - on_cpu).abs().max())
        probe.result("noise, largest difference from the CPU", difference, "", at_most=1e-5)

    batch = unpack()
    for family in FAMILIES:
        text = partial(to_text, batch.texts[family], constants[family], probe.dtype, TOKENS_MULTIPLE)
        probe.result(
            f"to_text, LLM {family}", probe.milliseconds(text), "ms", tokens=sum(packed.counts[family])
        )


# -- the engine ----------------------------------------------------------------------------------------------


class TrainingSteps:
    """The network in the engine, and steps of it on random batches as the trainer does them."""

    def __init__(self, probe: Probe, work: Work) -> None:
        """Build the network under ZeRO-3: 1B with compiled blocks, as its stage has it, or a tiny one."""
        from model.dit import LIDiT
        from pipeline.diffusion.objective import make_objective
        from pipeline.engine.engine import Engine
        from pipeline.stage.config import StageConfig
        from pipeline.stage.objective import ObjectiveConfig

        stage = StageConfig(name="probe", global_batch=work.samples, samples=10**9, ema=[0.999])
        stage.engine.micro_batch, stage.engine.overlap_comm = work.micro, probe.gpu
        stage.engine.precision = "bf16" if probe.gpu else "fp32"
        stage.engine.reduce_bucket = stage.engine.prefetch_bucket = probe.pick(100_000_000, 1_000_000)
        stage.engine.max_live_parameters = stage.engine.max_reuse_distance = 2_000_000_000
        if not probe.tiny:
            stage.model.compile, stage.model.activation_memory_budget = True, 0.7

        self.probe, self.work = probe, work
        widths = [work.width] * len(FAMILIES)
        self.engine = Engine(lambda: LIDiT(work.sizes, FUSION, widths), stage, work.samples)
        self.objective = make_objective(ObjectiveConfig(), work.sizes.patch_shape)
        self.constants = random_constants(probe.device, work)
        # Made before the steps: a loader has other processes for it.
        self.batches = [random_batch(work, seed) for seed in range(STEPS_AHEAD)]
        self.done = 0

    def step(self) -> tuple[Any, Any, Any]:
        """Train on the next batch; return marks at the beginning, before the optimizer, and at the end."""
        from pipeline.text.texts import to_text
        from pipeline.training.inputs import TOKENS_MULTIPLE
        from pipeline.training.micro_batches import by_length

        start = self.probe.mark()
        packed = self.batches[self.done % STEPS_AHEAD]
        self.done += 1
        batch = packed.unpack(self.engine.device)
        clean = batch.mean.float() + batch.std.float() * batch.posterior_noise
        example = self.objective.training_example(clean, batch.noise, batch.u, batch.normal)

        texts = []
        for family in FAMILIES:
            shared = self.constants[family]
            texts.append(to_text(batch.texts[family], shared, self.engine.dtype, TOKENS_MULTIPLE))
        condition = Condition(example.timesteps, texts)
        parts = list(self.engine.micro_batches(len(clean)))
        counts = [packed.counts[family] for family in FAMILIES]
        for part in by_length(parts, counts, TOKENS_MULTIPLE, self.engine.device):
            noisy = example.noisy[part.rows].to(self.engine.dtype)
            prediction = self.engine(noisy, part.condition(condition))
            losses, _ = self.objective.training_losses(prediction.float(), example.target[part.rows])
            self.engine.backward(losses.mean())

        before_optimizer = self.probe.mark()
        self.engine.step(LR)
        self.engine.update_averages(self.done * self.work.samples)
        return start, before_optimizer, self.probe.mark()

    @property
    def tokens(self) -> float:
        """Mean tokens of a caption of one LLM."""
        lengths = []
        for packed in self.batches:
            for counts in packed.counts.values():
                lengths += counts
        return statistics.mean(lengths)

    def measure(self, what: str, steps: int, goal: float | None = None) -> None:
        """Record the time of a step and of its end, the share of the peak, and memory.

        Args:
            what: name of the results.
            steps: number of steps, after the first, which compiles, and one more.
            goal: of the share of the device's peak.
        """
        from pipeline.stage.config import LogConfig
        from pipeline.training.metrics import peak_flops

        probe, work = self.probe, self.work
        probe.result(f"{what}, first step", probe.once(self.step), "s")
        memory = probe.peak_memory(self.step)
        totals, ends, hosts = [], [], []
        for _ in range(steps):
            probe.check()
            began = time.perf_counter()
            start, before_optimizer, stop = self.step()
            # The step reads the gradients' norm, so its end is near that of the GPU.
            hosts.append(1e3 * (time.perf_counter() - began))
            totals.append(probe.between(start, stop))
            ends.append(probe.between(before_optimizer, stop))

        total = statistics.median(totals)
        rate = 1e3 * work.samples / total
        details = {"host_ms": statistics.median(hosts), "samples": work.samples, "micro": work.micro}
        probe.result(f"{what}, step", total, "ms", **details, peak_gib=memory)
        probe.result(f"{what}, optimizer and averages", statistics.median(ends), "ms")
        probe.result(f"{what}, speed", rate, "samples/s", tokens=round(self.tokens, 1))

        peak = peak_flops(LogConfig())
        if peak is not None:
            bound = {} if goal is None or probe.tiny else {"at_least": goal}
            probe.result(f"{what}, MFU", rate * work.flops(self.tokens) / peak, "", **bound)


def profile_step(steps: TrainingSteps) -> None:
    """Record the longest kernels of a step, and the share of the time in which the GPU does nothing."""
    probe = steps.probe
    activity = ProfilerActivity.CUDA if probe.gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        start, _, stop = steps.step()
        total = probe.between(start, stop)

    def busy(event: Any) -> float:
        return 1e-3 * (event.self_device_time_total if probe.gpu else event.self_cpu_time_total)

    events = sorted(profiler.key_averages(), key=busy, reverse=True)
    kernels = {event.key[:80]: [round(busy(event), 3), event.count] for event in events[:SHOWN_KERNELS]}
    details = {"ms": total, "launches": sum(event.count for event in events), "kernels": kernels}
    idle = 1 - sum(map(busy, events)) / total
    probe.result("share of a profiled step without a kernel", idle, "", **details)


def count_waits(steps: TrainingSteps) -> None:
    """Record how often the host waits for the GPU in a step."""
    if not steps.probe.gpu:
        steps.probe.reason("waits of the host", "a CPU has no queue to wait for")
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    steps.probe.result("waits of the host in a step", waits, "")


def engine_256(probe: Probe) -> None:
    """Measure steps of the 1B network at 256 pixels, with two LLMs and ragged captions."""
    steps = TrainingSteps(probe, work_of(probe, side=32, samples=128, micro=64))
    steps.measure("256 px", probe.pick(10, 1), GOAL_MFU[32])
    with probe.part("profile"):
        profile_step(steps)
    with probe.part("waits"):
        count_waits(steps)


def engine_1024(probe: Probe) -> None:
    """Measure steps of the 1B network at 1,024 pixels, without and with recomputed blocks."""
    steps = TrainingSteps(probe, work_of(probe, side=128, samples=16, micro=8))
    for every, name in ((0, "nothing recomputed"), (1, "every block recomputed")):
        with probe.part(name):
            steps.engine.module.checkpoint_every = every
            steps.measure(f"1,024 px, {name}", probe.pick(5, 1), GOAL_MFU[128] if not every else None)


# -- PixArt --------------------------------------------------------------------------------------------------


def pixart(probe: Probe) -> None:
    """Measure our step beside those of diffusers' PixArt, as `benchmarks.train_step` has them.

    PixArt comes after our engine in one process, so it has our loops of ZeRO-3, which it lacks alone.
    """
    from benchmarks import train_step

    options = argparse.Namespace(
        preset=None if probe.tiny else "li_dit_1b", width=32, depth=1, heads=2, checkpoint_every=0,
        side=probe.pick(32, 8), tokens=probe.pick(128, 4), batch=probe.pick(64, 2), processes=1,
        precision="bf16" if probe.gpu else "fp32", compile=not probe.tiny,
    )  # fmt: skip
    depth = train_step.sizes(options).depth
    builds: dict[str, Callable[[], tuple[train_step.Step, int]]] = {
        train_step.OURS: partial(train_step.our_step, options),
        train_step.SAME_DEPTH: partial(train_step.their_step, options, depth),
        train_step.SAME_PARAMETERS: partial(train_step.their_step, options, train_step.equal_depth(options)),
    }

    shape = (options.batch, train_step.CHANNELS, options.side, options.side)
    latents, text = probe.random(*shape), probe.random(options.batch, options.tokens, train_step.LLM_WIDTH)
    times = torch.rand(options.batch, device=probe.device)
    batch = (latents, times, text, torch.randn(shape, device=probe.device))
    speeds = {}
    for name, build in builds.items():
        with probe.part(name):
            before = probe.memory()
            step, parameters = build()
            work = partial(step, *batch)
            memory = probe.peak_memory(work) - before
            speeds[name] = 1e3 * options.batch / probe.milliseconds(work, repeats=8)
            details = {"parameters": parameters, "peak_gib": memory, "samples": options.batch}
            probe.result(name, speeds[name], "samples/s", **details)
            # The next network takes its memory.
            del step, work
        gc.collect()

    if train_step.OURS in speeds and train_step.SAME_PARAMETERS in speeds:
        ratio = speeds[train_step.OURS] / speeds[train_step.SAME_PARAMETERS]
        bound = {} if probe.tiny else {"at_least": 1.3}
        probe.result("samples/s / PixArt's, equal parameters", ratio, "", **bound)


# -- the LLM -------------------------------------------------------------------------------------------------


def stub_tokenizer() -> Any:
    """Return a tokenizer that makes the same token of every word: speed does not depend on the words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"word": 0}, unk_token="word"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return tokenizer


def random_captions(captions: int, longest: int, seed: int) -> list[list[int]]:
    """Return random token ids of captions with ragged lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for length in caption_lengths(captions, longest, seed):
        ids.append(torch.randint(0, 1000, (length,), generator=generator).tolist())
    return ids


def encoder(probe: Probe) -> None:
    """Measure the encoder on LLaMA3-8B's shape with 8 of its 32 blocks, on captions of new lengths each
    round."""
    from benchmarks import text_encoding

    shape = probe.pick("llama3_8b", "tiny")
    blocks = probe.pick(10, 4)  # of which the encoder leaves out the last two
    config = TextConfig("probe", prefix="{instruction} ", suffix=" end", dtype="bf16")
    built, whole = text_encoding.random_encoder(shape, probe.device, blocks, stub_tokenizer(), config)
    size = probe.pick(8192, 128)
    rate = text_encoding.matmul_rate(probe.device, size)
    probe.result(f"product {size}^3, best", 1e-12 * rate, "TFLOP/s")

    captions, longest, seed = probe.pick(512, 4), probe.pick(256, 8), 0
    ids = random_captions(captions, longest, seed)
    for tokens in probe.pick((4096, 16384), (64,)):
        built.config = replace(built.config, tokens_per_batch=tokens)
        first, again = [], []
        for _ in range(probe.pick(3, 1)):
            seed += 1
            ids = random_captions(captions, longest, seed)
            flops = text_encoding.encoding_flops(built, whole, ids)
            first.append(flops / probe.once(partial(built.encode, ids)) / rate)
            again.append(flops / probe.once(partial(built.encode, ids)) / rate)

        bound = {} if probe.tiny else {"at_least": text_encoding.MATMUL_GOAL}
        what = f"share of the product's rate, {tokens} tokens at once"
        probe.result(
            f"{what}, new lengths", statistics.median(first), "", rounds=[round(x, 4) for x in first]
        )
        probe.result(f"{what}, the same again", statistics.median(again), "", **bound)
    with probe.part("plain way"):
        plain(probe, built, whole, ids)


def plain(probe: Probe, built: Any, whole: Any, ids: list[list[int]]) -> None:
    """Measure the encoder against padded prompts through the whole model."""
    from benchmarks.text_encoding import plain_states

    plain_states(whole, built.prefix_ids, ids)  # the first round chooses kernels
    slow = probe.once(lambda: plain_states(whole, built.prefix_ids, ids))
    fast = probe.once(lambda: built.encode(ids))
    probe.result(
        "captions/s / padded prompts", slow / fast, "", captions_per_second=round(len(ids) / fast, 1)
    )
