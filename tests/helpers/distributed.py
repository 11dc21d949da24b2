"""Functions on several gloo processes, with a time limit.

`on_ranks(world, function, *args)` calls a module-level function in each of `world` processes, whose
environment gives the rank, and returns the results in rank order. The processes are forked from a server that
has loaded torch and DeepSpeed, and are reused by later calls with the same world, because starting them takes
most of the time.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import time
import traceback

from pipeline.engine.processes import join_process_group
from pipeline.runtime.distributed import free_port

START = 120
"""Seconds that the processes may take to start."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pipeline.train", "pipeline.sample", "tests.helpers.distributed"])
_pools = {}


def on_ranks(world, function, *args, timeout=150):
    """Return the results of `function(*args)` on every rank.

    Raises:
        AssertionError: if a rank fails or the time is up, with the ranks' tracebacks.
    """
    if world in _pools and not all(process.is_alive() for process in _pools[world].processes):
        _pools.pop(world).kill()  # a test signaled all children of this process
    if world not in _pools:
        _pools[world] = Pool(world)
    try:
        return _pools[world].call(function, args, timeout)
    except BaseException:
        _pools.pop(world).kill()
        raise


class Pool:
    """Processes that are the ranks of one world, each waiting for the next function."""

    def __init__(self, world):
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        before = {name: os.environ.get(name) for name in hidden}
        os.environ.update(hidden)  # the fork server, started by the first process, keeps them
        self.processes, self.pipes = [], []
        port = free_port()
        for rank in range(world):
            pipe, child_pipe = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, world, port, child_pipe), daemon=True)
            process.start()
            child_pipe.close()
            self.processes.append(process)
            self.pipes.append(pipe)

        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.call(join_process_group, (10,), START)

    def call(self, function, args, timeout):
        self.send(function, args)
        return self.results(timeout)

    def send(self, function, args):
        for pipe in self.pipes:
            pipe.send((function, args))

    def results(self, timeout):
        """Wait for all ranks; after a failure, wait a moment for the tracebacks of the others."""
        deadline, failed = time.monotonic() + timeout, {}
        results = [None] * len(self.pipes)
        waiting = set(range(len(self.pipes)))
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                try:
                    if not self.pipes[rank].poll(0.02):
                        continue
                    good, results[rank] = self.pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    good, results[rank] = False, "the process died"
                waiting.discard(rank)
                if not good:
                    failed[rank] = results[rank]
                    deadline = min(deadline, time.monotonic() + 3)

        if failed:
            raise AssertionError("\n".join(f"rank {rank}: {trace}" for rank, trace in failed.items()))
        if waiting:
            raise AssertionError(f"ranks {sorted(waiting)} were not done in {timeout} s")
        return results

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank, world, port, pipe):
    import torch

    torch.set_num_threads(1)
    # The loaded modules are half a million objects, which each collection below would walk for 0.3 s.
    gc.freeze()
    # The fork server blocks signals if a loader in this pytest process was the first to start it.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})

    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
        gc.collect()


@atexit.register
def _close():
    for pool in _pools.values():
        pool.kill()
