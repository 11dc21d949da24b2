"""Phases of `benchmarks.gpu_probe` that need only torch and the network: ceilings, attention, one block,
parity."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_timing import Probe
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.dit_block import DiTBlock
from model.functional import attention, key_mask
from model.presets import PRESETS
from model.region import ExampleSizes, TextLengths

TINY = DiTConfig(depth=1, width=32, heads=2, channels=4)
HEADS = ((16, 72), (18, 64), (9, 128))
"""Heads and channels of a head that a width of 1,152 divides into."""
BACKENDS = {
    "choice of torch": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PARITY = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative error of loss and gradients."""


def network_sizes(probe: Probe) -> DiTConfig:
    """Return the sizes of the 1B network, or of a tiny one."""
    return probe.pick(PRESETS["li_dit_1b"], TINY)


def backend(name: str) -> AbstractContextManager[Any]:
    """Return a context in which torch may only take one kind of attention kernel."""
    kind = BACKENDS[name]
    return nullcontext() if kind is None else sdpa_kernel([kind])


# -- machine and ceilings ------------------------------------------------------------------------------------


def machine(probe: Probe) -> None:
    """Record the device and the versions that all numbers depend on."""
    details: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if probe.gpu:
        properties = torch.cuda.get_device_properties(0)
        details |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        }
    total = torch.cuda.mem_get_info()[1] / 2**30 if probe.gpu else 0.0
    probe.result("memory of the device", total, "GiB", **details)


def ceilings(probe: Probe) -> None:
    """Measure a large product, copies, and the products of a block in all three directions."""
    size = probe.pick(8192, 128)
    one, other = probe.random(size, size), probe.random(size, size)
    rate = 2e-9 * size**3 / probe.milliseconds(partial(torch.mm, one, other))
    probe.result(f"product {size}^3", rate, "TFLOP/s")

    # 1 GiB in bf16: far more than the caches.
    source = probe.random(probe.pick(2**29, 2**16))
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    probe.result("copy", 1e-9 * moved / probe.milliseconds(partial(target.copy_, source)), "TB/s")
    del one, other, source, target

    with torch.device("meta"):
        block = DiTBlock(network_sizes(probe))
    for samples in probe.pick((128, 256), (1,)):
        with probe.part(f"products of a block, {samples} samples"):
            block_products(probe, block, samples)


def block_products(probe: Probe, block: nn.Module, samples: int) -> None:
    """Measure each product of a block at 256 pixels: forward, gradient of the input, gradient of the
    weight."""
    patches, tokens = probe.pick((256, 250), (8, 8))
    work, spent = 0.0, 0.0
    for name, layer in block.named_modules():
        if not isinstance(layer, nn.Linear):
            continue

        # Keys and values are made of text, the modulation of one vector per sample.
        rows = samples * {"cross_attention.key_value": tokens, "modulation.linear": 1}.get(name, patches)
        inputs, weight = probe.random(rows, layer.in_features), probe.random(*layer.weight.shape)
        bias, gradient = probe.random(layer.out_features), probe.random(rows, layer.out_features)
        flops = 2.0 * rows * layer.in_features * layer.out_features
        times = {
            "forward": probe.milliseconds(partial(F.linear, inputs, weight, bias)),
            "dgrad": probe.milliseconds(partial(torch.mm, gradient, weight)),
            "wgrad": probe.milliseconds(partial(torch.mm, gradient.t(), inputs)),
        }

        shape = f"{rows} x {layer.in_features} x {layer.out_features}"
        for direction, time in times.items():
            probe.result(f"{name}, {direction}, {shape}", 1e-9 * flops / time, "TFLOP/s", ms=time)
        work, spent = work + 3 * flops, spent + sum(times.values())
    probe.result(f"all products of a block, {samples} samples", 1e-9 * work / spent, "TFLOP/s", ms=spent)


# -- attention -----------------------------------------------------------------------------------------------


def random_heads(probe: Probe, samples: int, tokens: int, heads: int, width: int) -> Tensor:
    """Return queries or keys [B, S, H, d]."""
    return probe.random(samples, tokens, heads, width, grad=True)


def random_values(probe: Probe, samples: int, tokens: int, heads: int, width: int, packed: int) -> Tensor:
    """Return values [B, S, H, d] as layers have them: the last of `packed` in one tensor."""
    return probe.random(samples, tokens, packed, heads, width)[:, :, -1].detach().requires_grad_()


def time_attention(
    probe: Probe, what: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, flops: float
) -> None:
    """Measure attention forward, and forward and backward.

    Args:
        probe: the phase.
        what: name of the results.
        q: queries [B, S, H, d].
        k: keys [B, T, H, d].
        v: values [B, T, H, d].
        mask: as in `model.functional.attention`.
        flops: of the forward pass, those of padding not counted.
    """
    gradient = torch.randn_like(attention(q, k, v, mask).detach())

    def both() -> None:
        torch.autograd.grad(attention(q, k, v, mask), (q, k, v), gradient)

    forward = probe.milliseconds(lambda: attention(q, k, v, mask))
    probe.result(f"{what}, forward", 1e-9 * flops / forward, "TFLOP/s", ms=forward)
    time = probe.milliseconds(both)
    probe.result(f"{what}, forward and backward", 3e-9 * flops / time, "TFLOP/s", ms=time)


def self_attention(probe: Probe) -> None:
    """Measure self-attention by number of patches, shape of the heads and kernel."""
    cases = probe.pick(((256, 128), (4096, 8)), ((4, 2),))
    for patches, samples in cases:
        for heads, width in probe.pick(HEADS, ((2, 16),)):
            q, k = (random_heads(probe, samples, patches, heads, width) for _ in range(2))
            v = random_values(probe, samples, patches, heads, width, packed=3)
            flops = 4.0 * samples * heads * patches**2 * width

            for name in BACKENDS:
                what = f"{samples} x {patches} patches, {heads} x {width}, {name}"
                with probe.part(what, optional=True), backend(name):
                    time_attention(probe, what, q, k, v, None, flops)


def caption_lengths(samples: int, longest: int, seed: int) -> list[int]:
    """Return lengths of captions: log-normal around half of the longest, which one of them has."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(samples, generator=generator).mul(0.45).exp()
    lengths = (factors * 0.45 * longest).long().clamp(max(1, longest // 32), longest).tolist()
    lengths[seed % samples] = longest
    return lengths


def cross_attention(probe: Probe) -> None:
    """Measure attention to padded text with a mask by kernel, against the real tokens without padding."""
    samples, patches, longest = probe.pick((128, 256, 512), (2, 4, 8))
    heads, width = probe.pick(HEADS[0], (2, 16))
    lengths = caption_lengths(samples, longest, 0)
    q = random_heads(probe, samples, patches, heads, width)
    k = random_heads(probe, samples, longest, heads, width)
    v = random_values(probe, samples, longest, heads, width, packed=2)
    shown = torch.arange(longest, device=probe.device) < torch.tensor(lengths, device=probe.device)[:, None]
    flops = 4.0 * heads * width * patches * sum(lengths)

    for name in BACKENDS:
        what = f"{samples} x {patches} patches, {longest} padded keys, {name}"
        with probe.part(what, optional=True), backend(name):
            time_attention(probe, what, q, k, v, key_mask(shown), flops)
    with probe.part("no mask"):
        everything = 4.0 * heads * width * patches * samples * longest
        time_attention(probe, f"{longest} keys without a mask", q, k, v, None, everything)

    what = "varlen at the real lengths"
    if not probe.gpu:
        probe.reason(what, "varlen_attn has no kernel for a CPU")
    else:
        with probe.part(what, optional=True):
            varlen(probe, what, (q, k, v), shown, lengths)
    new_lengths(probe, q, heads, width)


def cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return where each row begins in a packed sequence, and the end of the last, int32."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def varlen(
    probe: Probe, what: str, heads: tuple[Tensor, Tensor, Tensor], shown: Tensor, lengths: Sequence[int]
) -> None:
    """Measure torch's attention without padding, and compare it with attention with a mask.

    Args:
        probe: the phase.
        what: name of the results.
        heads: queries [B, S, H, d], keys and values [B, T, H, d].
        shown: bool [B, T], the tokens that are no padding.
        lengths: number of them in each row.
    """
    from torch.nn.attention.varlen import varlen_attn

    samples, patches, count, width = heads[0].shape
    q = heads[0].detach().flatten(0, 1).requires_grad_()
    k, v = (part.detach()[shown].requires_grad_() for part in heads[1:])
    of_queries, of_keys = cumulative([patches] * samples, q.device), cumulative(lengths, q.device)

    def forward() -> Tensor:
        # The longest is a constant, so that all batches have one plan.
        return varlen_attn(q, k, v, of_queries, of_keys, patches, shown.shape[1])  # type: ignore[return-value]

    with torch.no_grad():
        dense = attention(*heads, key_mask(shown))
    difference = forward().detach().float() - dense.view(-1, count, width).float()
    error = float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(dense.float()))
    probe.result(f"{what}, relative difference from a mask", error, "", at_most=1e-2)

    gradient = torch.randn_like(forward().detach())
    flops = 4.0 * count * width * patches * sum(lengths)
    time = probe.milliseconds(forward)
    probe.result(f"{what}, forward", 1e-9 * flops / time, "TFLOP/s", ms=time)
    time = probe.milliseconds(lambda: torch.autograd.grad(forward(), (q, k, v), gradient))
    probe.result(f"{what}, forward and backward", 3e-9 * flops / time, "TFLOP/s", ms=time)


def new_lengths(probe: Probe, q: Tensor, heads: int, width: int) -> None:
    """Measure the first call at lengths of text that no call had before: a kernel may be planned for each."""
    seconds = []
    for number in range(probe.pick(10, 2)):
        tokens = probe.pick(301, 3) + number
        k, v = (random_heads(probe, len(q), tokens, heads, width) for _ in range(2))
        mask = torch.ones(len(q), 1, 1, tokens, dtype=torch.bool, device=probe.device)
        mask[..., -1] = False

        def work(keys: Tensor = k, values: Tensor = v, shown: Tensor = mask) -> None:
            attention(q, keys, values, shown).sum().backward()

        seconds.append(probe.once(work))
    q.grad = None
    times = {"largest_ms": 1e3 * max(seconds), "smallest_ms": 1e3 * min(seconds)}
    probe.result("first call at a new length", 1e3 * statistics.median(seconds), "ms", **times)


# -- one block -----------------------------------------------------------------------------------------------


@contextmanager
def without_code(tiny: bool) -> Iterator[None]:
    """Return a context in which torch.compile traces and partitions, but generates no code if `tiny`: C++
    of a block takes a CPU a minute."""
    if not tiny:
        yield
        return
    with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition")):
        yield


def one_block(probe: Probe) -> None:
    """Measure a block forward and backward: eager, and compiled with two budgets of kept memory."""
    from pipeline.engine.compile import compile_regions

    samples, patches, tokens = probe.pick((128, 256, 384), (2, 4, 4))
    for budget in probe.pick((None, 1.0, 0.7), (None, 0.7)):
        name = "eager" if budget is None else f"compiled, budget {budget}"
        what = f"{samples} x {patches} patches, {name}"
        with probe.part(what):
            # Blocks share graphs whatever the budget is.
            torch._dynamo.reset()
            block = DiTBlock(network_sizes(probe)).to(probe.device, probe.dtype)
            if budget is not None:
                with without_code(probe.tiny):
                    compile_regions([block], budget)
            [inputs] = block.example_inputs(ExampleSizes(samples, (patches,), TextLengths(tokens)))
            time_block(probe, what, block, inputs)


def time_block(probe: Probe, what: str, block: DiTBlock, zeros: Sequence[Tensor | None]) -> None:
    """Measure the time and memory of a block.

    Args:
        probe: the phase.
        what: name of the results.
        block: the block.
        zeros: its inputs, to be replaced by random numbers.
    """
    inputs = []
    for value in zeros:
        floating = value is not None and value.is_floating_point()
        inputs.append(torch.randn_like(value).requires_grad_() if floating else value)  # type: ignore[arg-type]
    gradient = torch.randn_like(inputs[0])
    trained = [value for value in inputs if value is not None and value.requires_grad]
    trained += block.parameters()

    def both() -> None:
        # unlike `backward` this adds nothing to gradients of earlier calls, which would take time
        torch.autograd.grad(block.forward(*inputs), trained, gradient)

    probe.result(f"{what}, first call", probe.once(both), "s")
    before = probe.memory()
    kept = block.forward(*inputs)
    memory = {"kept_gib": probe.memory() - before}
    del kept
    memory["peak_gib"] = probe.peak_memory(both) - before
    forward = probe.milliseconds(lambda: block.forward(*inputs))
    probe.result(f"{what}, forward", forward, "ms")
    probe.result(f"{what}, forward and backward", probe.milliseconds(both), "ms", **memory)


# -- parity --------------------------------------------------------------------------------------------------


def parity_network(dtype: torch.dtype, device: torch.device) -> LIDiT:
    """Return a small network with two LLMs, whose weights are the same on every device."""
    config = DiTConfig(depth=2, width=64, heads=4, channels=4)
    network = LIDiT(config, FusionConfig(families=["a", "b"]), [48, 32])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # Also of modulations, which start at zero: a network of identities would prove nothing. Rounded
            # to bf16, so that all types compute with the same weights.
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            values += 1.0 if "norm" in name else 0.0
            parameter.copy_(values.bfloat16())
    return network.to(device, dtype)


def parity_numbers(dtype: torch.dtype, device: torch.device) -> tuple[float, Tensor]:
    """Return the loss of the small network and its gradients one after another, computed on a device."""
    network = parity_network(dtype, device)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)

    # Off by one in all places, so that gradients are sums of one sign and not of roundings.
    latents, target = normal(3, 4, 8, 8), normal(3, 4, 8, 8) + 1
    texts = []
    for width, ends in ((48, (9, 5, 7)), (32, (4, 8, 6))):
        mask = torch.arange(max(ends)) < torch.tensor(ends)[:, None]
        texts.append(Text(normal(3, max(ends), width), mask.to(device), prefix=2))

    times = torch.tensor([0.25, 0.5, 0.875], device=device)
    loss = (network(latents, Condition(times, texts)) - target).double().square().mean()
    loss.backward()
    gradients = []
    for parameter in network.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append(grad.double().flatten().cpu())
    return loss.item(), torch.cat(gradients)


def parity(probe: Probe) -> None:
    """Compare loss and gradients of a small network with those in fp64 on the CPU."""
    # By default torch lets cuDNN round what convolutions in fp32 read to ten bits.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    exact, exact_gradients = parity_numbers(torch.float64, torch.device("cpu"))
    for dtype, bound in PARITY.items():
        name = str(dtype).removeprefix("torch.")
        with probe.part(name):
            loss, gradients = parity_numbers(dtype, probe.device)
            error = abs(loss - exact) / abs(exact)
            difference = torch.linalg.vector_norm(gradients - exact_gradients)
            share = float(difference / torch.linalg.vector_norm(exact_gradients))
            probe.result(f"loss in {name}, relative error", error, "", at_most=bound)
            probe.result(f"gradients in {name}, relative error", share, "", at_most=bound)
