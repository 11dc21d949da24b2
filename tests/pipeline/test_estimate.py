"""The planner's terms against the real tiny network and engine, and how they scale."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import functional
from model.common.errors import UserError
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from pipeline.engine.optim import parameter_groups
from pipeline.estimate import main
from pipeline.operations import node_check, preflight
from pipeline.operations.planning import (
    Setup,
    activation_bytes,
    check_memory,
    count_moments,
    make_plan,
    state_memory,
)
from pipeline.runtime.distributed import Distributed
from pipeline.stage.config import STAGES, StageConfig, load_stage
from tests.helpers import engine_tasks as rank_tasks
from tests.helpers.distributed import on_ranks
from tests.helpers.small_network import stage as small_stage

LLM_WIDTHS = (24, 16)


@pytest.mark.parametrize(
    "engine",
    [
        {"precision": "bf16"},
        {"precision": "fp32"},
        {"precision": "bf16", "zero_stage": 2},
        {"precision": "bf16", "zero_stage": 1},
        {"precision": "bf16", "optimizer": "muon"},
    ],
    ids=str,
)
def test_state_memory_is_what_two_ranks_hold(engine):
    parameters, held = on_ranks(2, rank_tasks.held_bytes, engine)[0]
    stage = small_stage(**engine)
    dit = DiTConfig(depth=3, width=64, heads=4, channels=4)
    planned = state_memory(stage, parameters, 2, count_moments(stage, dit, LLM_WIDTHS))
    assert set(held) == {"weights", "gradients", "masters", "moments", "EMA"}
    for kind, real in held.items():
        assert planned[kind] == pytest.approx(real, rel=0.02), kind


@pytest.mark.parametrize(
    "fusion", [{}, {"refiner": "none"}, {"mode": "concat", "refiner_blocks": 1}, {"width": 48, "heads": 4}]
)
def test_muon_keeps_one_moment_of_the_matrices_of_blocks_and_two_of_the_rest(fusion):
    stage = StageConfig(fusion=FusionConfig(families=["a", "b"], **fusion))
    stage.optim.name = "muon"
    config = DiTConfig(depth=2, width=64, heads=4, channels=4)
    network = LIDiT(config, stage.fusion, LLM_WIDTHS)
    group = parameter_groups(network, stage.optim)[0]
    assert group["name"] == "muon"
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert all(re.search(r"blocks\.\d+\..*weight$", names[id(parameter)]) for parameter in group["params"])
    matrices = sum(parameter.numel() for parameter in group["params"])
    total = sum(parameter.numel() for parameter in network.parameters())
    assert count_moments(stage, config, LLM_WIDTHS) == 2 * total - matrices


class Saved:
    """Bytes of distinct tensors that autograd keeps, weights left out."""

    def __init__(self, network):
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        self.kept = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.kept[storage.data_ptr()] = storage  # alive, so that no other takes its address
        return tensor

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.kept.values())


def kept_for_backward(network, forward):
    """Bytes that autograd keeps of a forward pass."""
    saved = Saved(network)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return saved.bytes


@pytest.fixture
def native_bf16(monkeypatch):
    """Without it, products on a CPU would keep their factors in fp32; the estimate is for GPUs."""
    monkeypatch.setattr(functional, "CPU_HAS_BF16", True)


@pytest.mark.parametrize("size", [8, 16, 24])
@pytest.mark.parametrize("depth", [2, 4])
def test_activations_are_what_autograd_keeps(size, depth, native_bf16):
    stage = StageConfig(fusion=FusionConfig(families=["a", "b"]))
    config = DiTConfig(depth=depth, width=64, heads=4, channels=4)
    network = LIDiT(config, stage.fusion, LLM_WIDTHS).to(torch.bfloat16)
    setup = Setup(
        1,
        height=size * 8,
        width=size * 8,
        llm_widths=LLM_WIDTHS,
        prefix_tokens=4,
        max_caption_tokens=12,
        channels=4,
    )
    texts = [
        Text(torch.randn(2, 16, width), torch.ones(2, 16, dtype=torch.bool), 4, padded=False)
        for width in LLM_WIDTHS
    ]
    kept = kept_for_backward(
        network, lambda: network(torch.randn(2, 4, size, size), Condition(torch.rand(2), texts))
    )
    assert 2 * activation_bytes(stage, config, setup) == pytest.approx(kept, rel=0.09)


@pytest.mark.parametrize("every", [0, 1, 2, 3, 5])
def test_checkpointed_activations_are_what_autograd_keeps_and_one_recomputed_block(every, native_bf16):
    stage = StageConfig(fusion=FusionConfig(families=["a"], mode="none", refiner="none"))
    stage.model.checkpoint_every = every
    config = DiTConfig(depth=6, width=64, heads=4, channels=4)
    network = LIDiT(config, stage.fusion, [24], checkpoint_every=every).to(torch.bfloat16)
    setup = Setup(
        1, height=256, width=256, llm_widths=(24,), prefix_tokens=4, max_caption_tokens=12, channels=4
    )
    text = Text(torch.randn(2, 16, 24), torch.ones(2, 16, dtype=torch.bool), 4, padded=False)
    kept = kept_for_backward(
        network, lambda: network(torch.randn(2, 4, 32, 32), Condition(torch.rand(2), [text]))
    )
    if every:  # recomputed one after another in the backward pass, where each keeps what it would have kept
        x, words, c = (torch.randn(2, size, 64).bfloat16().requires_grad_() for size in (256, 12, 1))
        kept += kept_for_backward(network, lambda: network.blocks[0](x, words, None, c[:, 0]))
    assert 2 * activation_bytes(stage, config, setup) == pytest.approx(kept, rel=0.05)


@given(
    st.sampled_from(["li_dit_1b_256", "li_dit_10b_512"]), st.sampled_from([8, 16, 64]), st.floats(0.1, 0.7)
)
@settings(deadline=None, derandomize=True, database=None, max_examples=10)
def test_twice_the_gpus_take_half_the_days_and_half_the_shard(name, gpus, mfu):
    stage = load_stage(name, [])
    one, two = (make_plan(stage, Setup(number, mfu=mfu)) for number in (gpus, 2 * gpus))
    assert two.days == pytest.approx(one.days / 2)
    assert two.memory["masters"] == pytest.approx(one.memory["masters"] / 2)
    assert two.memory["gathered"] == one.memory["gathered"]
    assert one.read_per_node == pytest.approx(two.read_per_node)
    assert one.local_batch == 2 * two.local_batch
    assert one.parameters["total"] * 16 == one.checkpoint_bytes
    assert all(plan.micro_batch <= plan.local_batch for plan in (one, two, make_plan(stage, Setup(512))))


def test_checkpointing_and_sharding_save_memory_in_order():
    stage = load_stage("li_dit_10b_512", [])
    dit = stage.dit(16)
    by_every = [
        activation_bytes(replace(stage, model=replace(stage.model, checkpoint_every=every)), dit, Setup(8))
        for every in (1, 2, 4, 0)
    ]
    assert by_every == sorted(by_every)
    totals = [
        sum(
            state_memory(
                replace(stage, engine=replace(stage.engine, zero_stage=number)), 10**10, 64, 2 * 10**10
            ).values()
        )
        for number in (3, 2, 1)
    ]
    assert totals == sorted(totals)


@pytest.mark.parametrize("name", sorted(path.stem for path in STAGES.glob("li_dit_*.yaml")))
def test_every_large_stage_is_planned(name, capsys):
    main([name, "--gpus", "8,64,512"])
    shown = capsys.readouterr().out
    for row in (
        "8 GPUs", "64 GPUs", "512 GPUs", "parameters in the DiT", "TFLOP per sample", "MFU 50%",
        "weights, GB", "gradients, GB",
        "masters, GB", "moments, GB", "EMA, GB",
        "activations, no checkpointing, GB", "activations, every block, GB",
        "memory per GPU, GB", "samples/s", "days", "store ", "read per node, MB/s",
    ):  # fmt: skip
        assert row in shown


def test_a_compiled_block_keeps_less_and_with_a_budget_less_still():
    stage = load_stage("li_dit_1b_256", [])
    dit, kept = stage.dit(16), []
    for changes in (
        {"compile": False},
        {"activation_memory_budget": 1.0},
        {"activation_memory_budget": 0.7},
    ):
        other = replace(stage, model=replace(stage.model, **changes))
        kept.append(activation_bytes(other, dit, Setup(8)))
    assert kept[0] > 1.4 * kept[1] > 1.4 * 1.2 * kept[2]


@pytest.mark.parametrize("name", sorted(path.stem for path in STAGES.glob("li_dit_*.yaml")))
@pytest.mark.parametrize("gpus", [8, 64, 256, 512, 1024])
def test_every_large_stage_fits_80_gb_on_any_number_of_gpus(name, gpus):
    check_memory(load_stage(name, []), gpus, 80e9)


def test_preflight_refuses_what_does_not_fit_in_one_line(capsys, monkeypatch):
    arguments = ["preflight", "li_dit_10b_1024", "engine.micro_batch=null", "--processes", "64"]
    monkeypatch.setattr("sys.argv", [*arguments, "--gpu-memory", "80"])
    with pytest.raises(SystemExit) as ended:
        preflight.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "li_dit_10b_1024 needs 156 GB on each of 64 GPUs, which have 80 GB" in line
    assert "engine.micro_batch below 64" in line


def test_a_job_refuses_a_stage_that_its_gpus_cannot_hold(tmp_path, monkeypatch):
    small = SimpleNamespace(total_memory=40e9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: small)
    ranks = Distributed(rank=0, world=64, local_rank=0)
    with pytest.raises(UserError, match="needs 45 GB on each of 64 GPUs, which have 40 GB"):
        node_check._check_memory(load_stage("li_dit_10b_1024", []), ranks)
    # On every node alike, so that other nodes are not tried, even by a job of one node.
    report = preflight.NodeReport("n1", 0, 0, errors=[("memory", "needs 45 GB")])
    verdict = preflight.decide([report], ["n1"])
    assert verdict.everywhere == "needs 45 GB"
    assert not verdict.bad


def test_what_does_not_divide_is_refused():
    stage = load_stage("li_dit_1b_256", [])
    with pytest.raises(UserError, match="--gpus"):
        make_plan(stage, Setup(7))
    with pytest.raises(UserError, match="--widths"):
        make_plan(stage, Setup(8, llm_widths=(1,)))


def test_the_command_estimates_clips(capsys):
    """More frames, a coarser latent space and fewer channels show in the FLOPs and in the store."""
    shown = []
    for more in ([], ["--frames", "5"], ["--frames", "5", "--downsampling", "8,16", "--channels", "8"]):
        main(["li_dit_1b_256", "--gpus", "64", *more])
        shown.append(" ".join(capsys.readouterr().out.split()))
    flops = [float(re.search(r"([\d.]+) TFLOP per sample", text).group(1)) for text in shown]
    assert flops[1] > 4 * flops[0]
    assert 2 * flops[0] < flops[2] < 0.6 * flops[1]
    assert "per sample at 256 x 256" in shown[0]
    assert "per sample of 5 frames of latents at 256 x 256" in shown[1]
    pairs = [float(re.search(r"pairs of (\d+) kB", text).group(1)) for text in shown]
    # Mean and std in bf16: 16 channels of 32 x 32 positions take 65.5 kB a frame, 8 of 32 x 16 16.4 kB.
    assert pairs[1] - pairs[0] == pytest.approx(4 * 65.536, abs=1)
    assert pairs[2] - pairs[0] == pytest.approx(5 * 16.384 - 65.536, abs=1)


def test_clips_are_estimated_by_their_frames(capsys):
    main(["li_dit_1b_256", "--gpus", "64", "--frames", "17", "--downsampling", "4,8,8"])
    whole = capsys.readouterr().out
    assert "1,280 patches, 5 x 16 x 16, of latents of 5 x 32 x 32" in whole
    assert "of 17 frames at 256 x 256" in whole
    stage = load_stage("li_dit_1b_256")
    plans = {}
    for moments in (False, True):
        setup = Setup(64, frames=17, downsampling=(4, 8, 8), means_alone=moments)
        plans[moments] = make_plan(stage, setup)
    assert plans[False].bytes_per_pair - plans[True].bytes_per_pair == 2 * 16 * 5 * 32 * 32
    with pytest.raises(UserError, match="16 frames: this latent space"):
        make_plan(stage, Setup(64, frames=16, downsampling=(4, 8, 8)))
