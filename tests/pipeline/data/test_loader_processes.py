"""Between loader processes and the trainer: which data, signals and connections pass, and which do not."""

import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from pipeline.data import batch as packing
from pipeline.data.batch import tensors_in
from tests.helpers import fake_snapshot as fake
from tests.helpers.fake_ranks import open_data, read, summary

ROOT = Path(__file__).parents[3]
BUCKETS = {"64x64": [20, 13, 7, 11], "48x80": [9, 25]}


def children(process):
    listed = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError):  # the thread has ended
            listed += map(int, (task / "children").read_text().split())
    return listed + [grandchild for child in listed for grandchild in children(child)]


# -- batches ---------------------------------------------------------------------------------------


RECORD = {
    "PackedBatch",
    "Tensor",
    "Size",
    "UntypedStorage",
    "rebuild_tensor",
    "rebuild_typed_storage",
    "rebuild_storage_fd",
    "DupFd",
}


class Names(pickle.Unpickler):
    """Notes what a pickle is made of."""

    def __init__(self, stream):
        super().__init__(io.BytesIO(stream))
        self.names = set()

    def find_class(self, module, name):
        found = super().find_class(module, name)
        if not isinstance(found, torch.dtype):
            self.names.add(name)
        return found


def test_a_batch_crosses_as_a_handle_to_its_memory(store, cache, monkeypatch):
    """Nothing is pickled but a few numbers: the pickle holds no data, and grows by the captions' lengths
    alone."""
    monkeypatch.setattr(packing, "get_worker_info", lambda: True)  # allocate as in a loader process
    sizes = {}
    for samples in (4, 16):
        data = open_data(fake.stage(store, cache, global_batch=samples))
        item = next(data.packed())
        assert item.memory.is_shared()
        stream = bytes(ForkingPickler.dumps(item))
        sizes[samples] = len(stream), item.memory.nbytes
        unpickler = Names(stream)
        received = unpickler.load()
        item.memory[0] += 1
        assert torch.equal(received.memory, item.memory), "the same memory, not a copy"
        assert unpickler.names <= RECORD
        assert item.memory[:64].numpy().tobytes() not in stream
    (few, small), (many, large) = sizes.values()
    assert many - few < 12 * 2 * 5, "two families' lengths of 12 more captions"
    assert large - small > 12 * 500


def test_a_batch_is_pinned_as_one_block_where_there_is_a_gpu(store, cache, monkeypatch):
    pinned = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1]
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    data = open_data(fake.stage(store, cache))
    on_cpu = next(data.packed())
    assert not pinned
    data.device = torch.device("cuda")
    item = next(data.packed())
    assert len(pinned) == 1
    assert item.memory is pinned[0]
    tensors, expected = (tensors_in(packed.memory, packed.layout) for packed in (item, on_cpu))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} == {
        item.memory.untyped_storage().data_ptr()
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_reaches_the_gpu_from_pinned_memory(store, cache, workers):
    stage = fake.stage(store, cache, workers=workers)
    data = open_data(stage, 0, 1, torch.device("cuda"))
    item = next(data.packed())
    assert item.memory.is_pinned()
    batch, (expected, _) = item.unpack(data.device), next(open_data(stage).batches())
    assert batch.mean.is_cuda
    assert torch.equal(batch.mean.cpu(), expected.mean)
    assert all(
        torch.equal(batch.texts[name].values.cpu(), text.values) for name, text in expected.texts.items()
    )
    data.close()


def test_reading_batches_imports_no_encoder_and_no_engine():
    """They would cost each machine seconds and gigabytes."""
    heavy = {"transformers", "deepspeed", "diffusers"}
    code = f"import sys, pipeline.data.loader; print({heavy} & set(sys.modules))"
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100
    ).stdout
    assert printed.strip() == "set()"


# -- connections -----------------------------------------------------------------------------------


def connections(process, port):
    """Sockets of a process that are connected to a port, by inode."""
    there = set()
    for entry in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = entry.split()
        if int(fields[2].split(":")[1], 16) == port:
            there.add(fields[9])
    links = (os.readlink(link) for link in list(Path(f"/proc/{process}/fd").iterdir()) if link.is_symlink())
    return {link[8:-1] for link in links if link.startswith("socket:")} & there


def test_no_process_inherits_a_connection_to_the_store(s3, proxy, tmp_path):
    fake.make(s3, {"64x64": [8] * 4}, tmp_path, families=[fake.LATENTS, fake.TEXTS["small"]])
    data = open_data(fake.stage(s3, tmp_path / "cache", workers=2, families=["small"]))
    port = int(proxy.url.rpartition(":")[2])
    assert connections(os.getpid(), port), "the trainer has some when the loader processes start"
    batches = data.batches()
    list(itertools.islice(batches, 6))
    sockets = [connections(process, port) for process in [os.getpid(), *children(os.getpid())]]
    assert sum(map(bool, sockets)) >= 3, "both loader processes have their own"
    assert sum(map(len, sockets)) == len(set().union(*sockets)), "none belongs to two processes"
    data.close()


# -- signals and ends ------------------------------------------------------------------------------


def in_a_process_of_its_own(body, store, cache):
    """Call a function where no other test has children that its signals would reach."""
    arguments = f"{str(store)!r}, {str(cache)!r}"
    code = f"from {__name__} import {body.__name__} as body; body({arguments})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


@pytest.mark.slow
def test_signals_to_the_whole_job_do_not_reach_loader_processes(store, cache):
    in_a_process_of_its_own(signal_all_children, store, cache)


def test_a_killed_loader_process_is_an_exception(store, cache):
    in_a_process_of_its_own(kill_a_loader_process, store, cache)


def signal_all_children(store, cache):
    data = open_data(fake.stage(store, cache, workers=2))
    batches = data.batches()
    taken = [summary(next(batches)[0]) for _ in range(2)]
    for process in children(os.getpid()):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(process, number)
    time.sleep(0.5)
    taken += [summary(next(batches)[0]) for _ in range(20)]
    began = time.monotonic()
    del batches
    data.close()
    assert time.monotonic() - began < 20
    assert taken == read(fake.stage(store, cache), 22)[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def kill_a_loader_process(store, cache):
    data = open_data(fake.stage(store, cache, workers=1))
    batches = data.batches()
    next(batches)
    for process in children(os.getpid()):
        if "forkserver" in Path(f"/proc/{process}/cmdline").read_text() and not children(process):
            os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|failed or was killed"):
        list(itertools.islice(batches, 1000))
    assert time.monotonic() - began < 30
    data.close()


@pytest.mark.parametrize("letters", [pytest.param(75, marks=pytest.mark.slow), 76])
def test_a_temporary_folder_too_long_for_sockets_is_named(store, cache, letters):
    with TemporaryDirectory() as short:
        folder = Path(short, "long" * 20).as_posix()[:letters]
        Path(folder).mkdir()
        start = [
            sys.executable,
            "-m",
            "tests.helpers.loader_process",
            json.dumps([str(store), {"cache": str(cache), "workers": 1}, 1, "loader"]),
        ]
        environment = {**os.environ, "TMPDIR": folder}
        done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=100, cwd=ROOT)
    if letters == 75:
        assert done.returncode == 0, done.stderr
    else:
        assert f"UserError: TMPDIR={folder}: over 75 letters" in done.stderr
