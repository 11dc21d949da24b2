"""Which rank this process is, from each launcher's environment."""

import os
import socket

import pytest
import torch

from model.common.errors import UserError
from pipeline.engine import processes
from pipeline.runtime.distributed import (
    Distributed,
    all_reduce_min,
    free_port,
    gather,
    rank_and_world,
    slurm_rendezvous,
)

NAMES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
NAMES += [
    f"SLURM_{name}"
    for name in ("STEP_ID", "PROCID", "STEP_NUM_TASKS", "LOCALID", "STEP_NODELIST", "JOB_NODELIST", "JOB_ID")
]
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "41234",
}


@pytest.fixture
def environment(monkeypatch):
    """Set exactly these of the launchers' variables."""

    with monkeypatch.context() as context:

        def setting(**values):
            for name in NAMES:
                context.delenv(name, raising=False)
            for name, value in values.items():
                context.setenv(name, value)

        for name in NAMES:  # so that what `Distributed` exports is undone
            context.setenv(name, "")
        yield setting


def test_torchrun_comes_first_then_a_slurm_step_then_one_process(environment):
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    environment(**torchrun, **STEP)
    assert Distributed.from_environment() == Distributed(1, 2, 0)
    environment(**STEP, SLURM_STEP_NODELIST="gpu[07-09,12],x1")
    assert Distributed.from_environment() == Distributed(3, 4, 1)
    assert [os.environ[name] for name in NAMES[:5]] == ["3", "4", "1", "gpu07", "21234"]
    environment(
        SLURM_PROCID="0", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-4]"
    )  # a batch script without srun
    assert Distributed.from_environment() == Distributed(0, 1, 0)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "rank 2 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
    ],
)
def test_half_an_environment_is_refused(environment, values, named):
    environment(**values)
    with pytest.raises(UserError, match=named):
        Distributed.from_environment()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("a-b[003,7]", "a-b003"),
        ("host.cluster", "host.cluster"),
    ],
)
def test_the_first_node_of_a_slurm_list(nodes, first):
    assert slurm_rendezvous({"SLURM_JOB_NODELIST": nodes})["MASTER_ADDR"] == first
    assert slurm_rendezvous({}) == {}


def test_alone_every_agreement_is_ones_own():
    assert (all_reduce_min(3), gather("x"), rank_and_world()) == (3, ["x"], (0, 1))
    assert 0 < free_port() < 65536


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"},
         "SLURM_STEP_NUM_TASKS=4"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "WORLD_SIZE=4"),
    ],
)  # fmt: skip
def test_ranks_that_never_come_are_one_line_that_says_who_asked_for_them(monkeypatch, environment, says):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "0")  # restored afterwards, although `from_environment` sets them
        monkeypatch.delenv(name)
    for name, value in {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    def nobody(**settings):
        raise torch.distributed.DistStoreError("Timed out after 61 seconds waiting: 1/4 clients joined")

    monkeypatch.setattr(processes.deepspeed, "init_distributed", nobody)
    with pytest.raises(UserError, match=rf"not all of 4 .*1/4 clients joined\): {says} says"):
        processes.join_process_group(1)


def test_a_port_that_another_program_has_is_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def meet(**settings):
            torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True)

        monkeypatch.setattr(processes.deepspeed, "init_distributed", meet)
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(
            UserError, match=rf"cannot meet at 127.0.0.1:{port} .*name another port"
        ) as refused:
            processes.join_process_group(1)
    assert "\n" not in str(refused.value)
