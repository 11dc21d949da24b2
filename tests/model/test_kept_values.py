"""Values that a compiled block keeps for its backward pass: the estimate against the compiler's partition."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from model import functional, layers
from model.config import DiTConfig
from model.dit_block import DiTBlock
from model.region import ExampleSizes, TextLengths

VIEWS = (
    "view",
    "reshape",
    "permute",
    "transpose",
    "slice",
    "select",
    "unsqueeze",
    "expand",
    "squeeze",
    "unbind",
)
SAMPLES, WIDTH = 2, 64


def attention(q, k, v, mask=None, causal=False):
    """Attention as one operation, as a GPU has it; a CPU's kernel takes fp32 copies."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def source(node):
    """The operation whose result a node is a view of."""
    while node.op == "call_function" and any(f"aten.{view}" in str(node.target) for view in VIEWS):
        node = node.args[0]
    return node


def kept(patches, tokens, budget):
    """Values that the compiled block keeps per sample, its input included; matrix products in its backward
    pass."""
    graphs = {}

    def partition(*args, **kwargs):
        graphs["forward"], graphs["backward"] = min_cut_rematerialization_partition(
            *args, **kwargs | {"compiler": "inductor"}
        )
        return graphs["forward"], graphs["backward"]

    def run(graph, inputs):
        return make_boxed_func(graph.forward)

    block = DiTBlock(DiTConfig(depth=1, width=WIDTH, heads=4)).to(torch.bfloat16)
    [inputs] = block.example_inputs(ExampleSizes(SAMPLES, (patches,), TextLengths(tokens)))
    torch._dynamo.reset()
    with functorch_config.patch(activation_memory_budget=budget):
        backend = aot_autograd(
            fw_compiler=run, bw_compiler=run, partition_fn=partition, decompositions=select_decomp_table()
        )
        torch.compile(block, backend=backend)(*inputs).sum().backward()

    results = next(node for node in graphs["forward"].graph.nodes if node.op == "output").args[0]
    values = {}
    for node in results[1:]:
        origin = source(node) if isinstance(node, torch.fx.Node) else None
        if origin is not None and origin.op != "placeholder" and isinstance(origin.meta["val"], torch.Tensor):
            values[origin] = origin.meta["val"].numel()
    products = sum(
        str(node.target).startswith(("aten.mm", "aten.addmm")) for node in graphs["backward"].graph.nodes
    )
    return sum(values.values()) / SAMPLES + patches * WIDTH, products


@pytest.mark.parametrize(
    "budget", [1.0, *(pytest.param(budget, marks=pytest.mark.slow) for budget in (0.9, 0.7, 0.6))]
)
def test_a_compiled_block_keeps_what_the_estimate_says_and_recomputes_no_product(budget, monkeypatch):
    monkeypatch.setattr(layers, "attention", attention)
    monkeypatch.setattr(functional, "CPU_HAS_BF16", True)
    for patches, tokens in ((64, 32), (64, 128), (256, 32)):
        values, products = kept(patches, tokens, budget)
        planned = DiTBlock.activations(DiTConfig(depth=1, width=WIDTH, heads=4), patches, tokens, budget)
        assert values == pytest.approx(planned, rel=0.1)
        # Two for each of the eight layers: the gradients of its input and of its weight.
        assert products == 16
