"""A rank that reads its data as the trainer does: a collective in each step, and a watchdog.

`Job` runs it in a process of its own; `python -m tests.helpers.loader_process JSON` runs it alone, until it
is killed.
"""

import itertools
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from pipeline.runtime.distributed import Distributed, free_port
from pipeline.runtime.watchdog import Heartbeat, Watchdog
from tests.helpers import fake_snapshot as fake
from tests.helpers.distributed import CONTEXT
from tests.helpers.fake_ranks import open_data, summary

PASSED_ON = ("AWS_", "S3_", "LI_DIT_")


def line(batch):
    """All that a step depends on, as a line to compare."""
    return json.dumps([batch.ids.tolist(), xxhash.xxh64_hexdigest(repr(summary(batch)))])


def lines(stage, steps, rank=0, world=1, of=line):
    """A rank's batches, read in this process."""
    data = open_data(stage, rank, world)
    try:
        return [of(batch) for batch, _ in itertools.islice(data.batches(), steps)]
    finally:
        data.close()


def streaming_line(rows):
    """The same for a batch of mosaicml-streaming's rows."""
    return json.dumps(
        [[row["id"] for row in rows], xxhash.xxh64_hexdigest(repr([sorted(row.items()) for row in rows]))]
    )


def fake_row(id, bucket):
    """A row of all families as mosaicml-streaming must give it."""
    rows = {"latents": fake.latents_row(id, bucket), **{name: fake.text_row(id, name) for name in fake.TEXTS}}
    columns = {
        f"{name}/{column}": value
        for name, row in rows.items()
        for column, value in row.items()
        if column != "id"
    }
    return {"id": id, **columns}


def fake_rows(batch):
    """The line that `streaming_line` returns for a batch of ours."""
    return streaming_line([fake_row(id, batch.bucket) for id in batch.ids.tolist()])


def _read_by_loader(stage, rank, world):
    return (line(batch) for batch, _ in open_data(stage, rank, world).batches())


def _read_by_streaming(stage, rank, world):
    from pipeline.data.streaming import SnapshotLoader, StreamingSnapshot  # takes seconds to import

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world)
    )
    workers = stage.data.workers
    # As a process that was not itself started by multiprocessing has it.
    loader = SnapshotLoader(
        StreamingSnapshot(stage),
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context="fork" if workers else None,
    )
    return (streaming_line(rows) for _ in itertools.count() for rows in loader)


READERS = {"loader": _read_by_loader, "streaming": _read_by_streaming}


class Job:
    """The ranks of one job, each a process; their batches and errors go into files."""

    def __init__(self, folder, store, settings, steps, world=1, largest_file=None, reader="loader"):
        """Start; `largest_file`: bytes over which no file may grow once the store is open, as on a full
        disk."""
        self.logs = [Path(folder) / f"rank_{rank}" for rank in range(world)]
        for log in self.logs:
            log.with_suffix(".txt").unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        fixed = (world, free_port(), environment, store, settings, steps, largest_file, reader)
        self.processes = [
            CONTEXT.Process(target=_rank, args=(rank, log, *fixed)) for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def end(self, seconds=60):
        """Exit code, lines and stderr of each rank; they have `seconds` from when all have opened the
        store."""
        opened = time.monotonic() + 2 * seconds
        while time.monotonic() < opened and not all(self._is_open(rank) for rank in range(len(self.logs))):
            time.sleep(0.05)
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        self.kill()
        assert not late, f"ranks {late} were not done in {seconds} s"
        printed, errors = ([log.with_suffix(end) for log in self.logs] for end in (".txt", ".err"))
        return [
            (process.exitcode, path.read_text().splitlines() if path.exists() else [], error.read_text())
            for process, path, error in zip(self.processes, printed, errors, strict=True)
        ]

    def _is_open(self, rank):
        return self.logs[rank].with_suffix(".txt").exists() or self.processes[rank].exitcode is not None

    def kill(self):
        """SIGKILL to all ranks."""
        for process in self.processes:
            process.kill()
            process.join()


def _rank(rank, log, world, port, environment, store, settings, steps, largest_file, reader):
    os.environ.update(environment)
    os.dup2(os.open(log.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=60), world, rank)
    watchdog = Watchdog(Distributed(rank, world, rank), Heartbeat(), stuck_seconds=60, interval=0.1)
    try:
        batches = READERS[reader](fake.stage(store, **settings), rank, world)
        if largest_file is not None:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (largest_file, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )
        with log.with_suffix(".txt").open("w", buffering=1) as printed:
            for batch in itertools.islice(batches, steps):
                dist.all_reduce(torch.ones(()))
                print(batch, file=printed)
    except BaseException as error:
        watchdog.fail(error)
    watchdog.close()
    dist.barrier()
    os._exit(0)


def wait_until(true, seconds=20):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_with(text):
    """Ids of the living processes that were started with `text` in their environment, whoever their parent is
    now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # of another user, or it has exited
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and text.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def shared_memory(processes):
    """Files in /dev/shm that these processes have mapped."""
    maps = []
    for process in processes:
        with suppress(OSError):  # it has exited
            maps += Path(f"/proc/{process}/maps").read_text().splitlines()
    return {
        Path(entry.split(maxsplit=5)[5])
        for entry in maps
        if "/dev/shm/" in entry and not entry.endswith("(deleted)")
    }


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
    store, settings, steps, reader = json.loads(sys.argv[1])
    for batch in itertools.islice(READERS[reader](fake.stage(store, **settings), 0, 1), steps):
        print(batch, flush=True)
