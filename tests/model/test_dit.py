import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.common.errors import UserError
from model.condition import Condition, Text
from model.config import FusionConfig
from model.dit import LIDiT
from model.functional import attention_weights, patchify, unpatchify, velocity_to
from tests.helpers.networks import SMALL, SWITCHES, WIDTHS, close, few, normal, random_inputs, random_network


@pytest.mark.parametrize(("fusion", "llms"), SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_row_of_the_tables_trains(fusion, llms, dtype):
    network = random_network(fusion, llms).to(dtype).train()
    latents, timesteps, texts = random_inputs(llms)
    prediction = network(latents.float(), Condition(timesteps, texts))
    assert prediction.shape == latents.shape
    assert prediction.dtype == dtype
    prediction.float().square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@few
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2]))
def test_any_resolution_and_aspect_runs(rows, columns, patch):
    network = random_network(patch=patch)
    latents, timesteps, texts = random_inputs(height=rows * patch, width=columns * patch)
    assert network(latents, Condition(timesteps, texts)).shape == latents.shape
    if patch == 2:
        with pytest.raises(
            UserError, match=f"latents of {2 * rows + 1} x {2 * columns} do not divide into patches of 2 x 2"
        ):
            network(normal(2, 4, 2 * rows + 1, 2 * columns), Condition(timesteps, texts))


def test_latents_serve_each_branch_of_guidance():
    network = random_network()
    latents, timesteps, texts = random_inputs(lengths=(4, 2, 3, 1, 5, 2))
    twice = latents[:3].repeat(2, 1, 1, 1)
    assert close(
        network(latents[:3], Condition(timesteps, texts)), network(twice, Condition(timesteps, texts))
    )
    assert not close(
        network(twice, Condition(timesteps, texts)), network(latents, Condition(timesteps, texts))
    )


def test_a_network_that_predicts_clean_latents_returns_the_velocity_to_them():
    latents, timesteps, texts = random_inputs()
    clean = random_network()(latents, Condition(timesteps, texts))
    velocity = random_network(predicts="clean")(latents, Condition(timesteps, texts))
    assert torch.equal(velocity, velocity_to(clean, latents, timesteps))
    assert velocity.dtype == clean.dtype


def test_a_fresh_network_predicts_zero():
    latents, timesteps, texts = random_inputs()
    assert not LIDiT(SMALL, FusionConfig(), WIDTHS[:2])(latents, Condition(timesteps, texts)).any()


@few
@given(st.permutations(range(12)))
def test_position_is_known_and_only_from_the_position_block(order):
    network = random_network()
    latents, timesteps, texts = random_inputs(height=6, width=8)

    def shuffle(x):
        return unpatchify(patchify(x, (2, 2))[:, order], (2, 2), (6, 8))

    moved = order != sorted(order)
    assert close(
        network(shuffle(latents), Condition(timesteps, texts)),
        shuffle(network(latents, Condition(timesteps, texts))),
    ) == (not moved)
    nn.init.zeros_(network.position.widen.weight)
    assert close(
        network(shuffle(latents), Condition(timesteps, texts)),
        shuffle(network(latents, Condition(timesteps, texts))),
    )


@few
@given(
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
    st.integers(0, 4),
    st.sampled_from(["full", "causal"]),
)
def test_a_sample_depends_neither_on_padding_nor_on_its_batch(lengths, padding, refiner):
    network = random_network(FusionConfig(refiner=refiner))
    latents, timesteps, texts = random_inputs(
        lengths=[length + 1 for length in lengths], padding=padding, fill=float("nan")
    )
    together = network(latents, Condition(timesteps, texts))
    for row in range(3):
        alone = []
        for text in texts:
            kept = text.mask[row]
            alone.append(Text(text.states[row : row + 1, kept], kept[None, kept], text.prefix))
        assert close(
            network(latents[row : row + 1], Condition(timesteps[row : row + 1], alone))[0], together[row]
        )


@pytest.mark.parametrize("changed", ["latents", "timesteps", "first text", "second text"])
def test_every_input_matters(changed):
    network = random_network()
    latents, timesteps, texts = random_inputs()
    before = network(latents, Condition(timesteps, texts))
    if changed == "latents":
        latents = latents + 0.1
    elif changed == "timesteps":
        timesteps = timesteps * 0.9
    else:
        text = texts[changed == "second text"]
        text.states = text.states + normal(*text.states.shape, seed=7)
    assert not close(network(latents, Condition(timesteps, texts)), before)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointing_changes_no_bit(every):
    gradients = []
    for checkpoint_every in (0, every):
        network = random_network(checkpoint_every=checkpoint_every, depth=3).float().train()
        latents, timesteps, texts = random_inputs(lengths=(4, 1))
        prediction = network(latents, Condition(timesteps, texts))
        prediction.square().mean().backward()
        gradients.append([prediction.detach(), *(parameter.grad for parameter in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Shapes(TorchDispatchMode):
    """The last two sizes of every tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape[-2:]) for leaf in tree_leaves(made) if isinstance(leaf, Tensor)}
        return made


@pytest.mark.parametrize("padded", [True, False])
def test_no_matrix_of_queries_by_keys_is_made_for_scores_or_masks(padded):
    network = random_network().float().train()
    latents, timesteps, texts = random_inputs(lengths=(15, 5) if padded else (15, 15), height=10, width=14)
    for text in texts:
        text.padded = padded
    with Shapes() as shapes:
        network(latents, Condition(timesteps, texts)).square().mean().backward()
    patches, words = 35, 2 * 15  # no other size of this network is one of these
    lengths = [text.states.shape[1] for text in texts]
    pairs = {
        (patches, patches),
        (patches, words),
        (words, patches),
        *itertools.product((*lengths, words, 15), repeat=2),
    }
    assert (patches, 32) in shapes.seen
    assert not shapes.seen & pairs
    with Shapes() as shapes:  # and they would have been seen
        attention_weights(*(torch.zeros(2, size, 2, 16) for size in (patches, words)))
    assert shapes.seen & pairs


@pytest.mark.parametrize("checkpoint_every", [0, 1])
@pytest.mark.parametrize("padded", [True, False])
def test_blocks_compile_to_one_graph(checkpoint_every, padded):
    torch._dynamo.reset()
    counters.clear()
    network = random_network(checkpoint_every=checkpoint_every).float().train()
    latents, timesteps, texts = random_inputs(lengths=(4, 4))
    for text in texts:
        text.padded = padded
    wanted = network(latents, Condition(timesteps, texts))
    for block in network.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        got = network(latents, Condition(timesteps, texts))
        got.square().mean().backward()
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_bf16_weights_give_the_fp32_prediction_roughly():
    network = random_network()
    for parameter in network.parameters():
        parameter.data.mul_(0.3)
    latents, timesteps, texts = random_inputs()
    wanted = network(latents, Condition(timesteps, texts))
    error = (network.bfloat16()(latents, Condition(timesteps, texts)) - wanted).square().mean().sqrt()
    assert error < 0.03 * wanted.square().mean().sqrt()


def test_there_are_no_buffers_to_round_and_layers_own_every_parameter():
    network = random_network()
    owners = {type(module) for module in network.modules() if list(module.parameters(recurse=False))}
    assert not list(network.buffers())
    assert all(issubclass(owner, nn.Linear | nn.Conv2d | nn.RMSNorm) for owner in owners)
