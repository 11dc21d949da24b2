"""Preparation that is killed at any moment and run again ends with the same snapshot, without loss or
repetition."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.dataset.garbage import collect_garbage
from data_prep.dataset.parts import committed, read_plan
from data_prep.dataset.schema import PAIRS
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.snapshot_reader import read_snapshot
from data_prep.dataset.verify import verify
from data_prep.store.store import open_store
from data_prep.workers import Workers
from model.common.errors import UserError
from tests.helpers.fake_dataset import make_all
from tests.helpers.plans import content, ids_in_pairs, planned_ids
from tests.helpers.raw_material import png, sample_members, write_tar

JOBS = {"pairs": PAIRS, "latents": "latents", "text": "tiny"}
"""Commands that are killed -> kind of the parts that they make."""


def run(arguments, log, max_file_bytes):
    """Run a command in a forked process, and exit as `python -m data_prep` does."""
    # Another program writes the log, because the limit on the size of files applies to this process.
    tee = None
    if max_file_bytes:
        tee = subprocess.Popen(["tee", "-a", log], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    target = tee.stdin.fileno() if tee else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    if tee:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    code = 1
    try:
        main(arguments)
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        if tee:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor in (1, 2, target):
                os.close(descriptor)
            tee.wait()
        os._exit(code)


def serve(requests):
    """Serve requests in a process that has imported everything, so that a command starts in milliseconds.

    A request has pairs of arguments and seconds. The process forks a child for each pair, kills it after
    these seconds, and answers with the exit codes and the total time.
    """
    from data_prep import report  # noqa: F401
    from data_prep.families import latents, text  # noqa: F401
    from model.encoders import vae  # noqa: F401

    while request := requests.recv():
        environment, log, max_file_bytes, children = request
        os.environ.update(environment)
        alive, ended = {}, {}
        start = time.monotonic()
        for number, (arguments, _) in enumerate(children):
            alive[number] = os.fork()
            if not alive[number]:
                run(arguments, log, max_file_bytes)
        while alive:
            time.sleep(0.001)
            for number, pid in list(alive.items()):
                if time.monotonic() - start > children[number][1]:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    ended[number] = -signal.SIGKILL
                else:
                    exited, status = os.waitpid(pid, os.WNOHANG)
                    if exited:
                        ended[number] = os.waitstatus_to_exitcode(status)
                if number in ended:
                    del alive[number]
        requests.send(([ended[number] for number in range(len(children))], time.monotonic() - start))
    os._exit(0)


class Commands:
    """Commands of `python -m data_prep` on one dataset, run by the server and killed after some seconds."""

    def __init__(self, folder):
        self.log = folder / "log.txt"
        self.settings = folder / "dataset.yaml"
        self.pipe, server_end = multiprocessing.Pipe()
        self.server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(server_end,), daemon=True
        )
        self.server.start()
        server_end.close()

    def __call__(self, command, store, *seconds, max_file_bytes=None):
        """Run one child per entry of `seconds`; return their exit codes and the total time.

        Files cannot grow beyond `max_file_bytes`, which looks like a full disk.
        """
        names = (
            "S3_ENDPOINT_URL",
            "LI_DIT_RETRY_SECONDS",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_DEFAULT_REGION",
        )
        environment = {name: os.environ[name] for name in names if name in os.environ}
        arguments = [command, str(self.settings), f"store={store}"]
        self.pipe.send(
            (environment, str(self.log), max_file_bytes, [(arguments, limit) for limit in seconds])
        )
        codes, took = self.pipe.recv()
        assert set(codes) <= ({2} if max_file_bytes else {0, -signal.SIGKILL}), self.log.read_text()[-3000:]
        return codes, took

    def close(self):
        self.pipe.send(None)
        self.server.join(10)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Make a dataset of 22 pairs in two buckets, with images that fail only in a full decode, a VAE and an
    LLM."""
    import torch

    from model.encoders.vae import small_vae
    from tests.helpers import tiny_llm

    folder = tmp_path_factory.mktemp("kill")
    images = [png(n, *((48, 48), (40, 80))[n % 2]) for n in range(24)]
    late = bytearray(images[5])
    late[-30] ^= 0xFF
    images[5] = bytes(late)
    members = []
    for n, image in enumerate(images):
        members += sample_members(str(n), image, {"caption": [f"c {n}", f"long {n}"]})
    write_tar(folder / "in", "a.tar", [*members, *sample_members("again", images[0], {"caption": "twice"})])
    torch.manual_seed(0)
    small_vae().save_pretrained(folder / "vae")
    tiny_llm.save(folder / "llm", tiny_llm.llama())
    commands = Commands(folder)
    settings = {
        "name": "ds",
        "store": "x",
        "workers": 0,
        "part_rows": 4,
        "image_format": "png",
        "buckets": {"resolution": 32, "max_aspect": 2, "step": 8},
        "sources": [{"path": str(folder / "in")}],
        "latents": [{"name": "latents", "vae": str(folder / "vae"), "batch": 2}],
        "text": [
            {
                "name": "tiny",
                "llm": str(folder / "llm"),
                "suffix": "<end>",
                "dtype": "fp32",
                "instruction": "Describe: ",
            }
        ],
    }
    commands.settings.write_text(json.dumps(settings))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory):
    """Return the snapshot of a run that is not killed, and the seconds that each command takes."""
    store = tmp_path_factory.mktemp("undisturbed")
    seconds = {command: commands(command, store, 300)[1] for command in ("plan", *JOBS, "snapshot")}
    return read_snapshot(open_store(str(store)).sub("ds")), seconds


@pytest.mark.parametrize("command", ["plan", *JOBS])
def test_a_full_disk_ends_each_command_with_the_path(commands, undisturbed, tmp_path, command):
    """With files limited to 2 kB, a command fails with one line that names the path; run again, it
    completes."""
    order = ["plan", *JOBS]
    for earlier in order[: order.index(command)]:
        commands(earlier, tmp_path, 300)
    before = len(commands.log.read_text())
    assert commands(command, tmp_path, 300, max_file_bytes=2000)[0] == [2]
    output = commands.log.read_text()[before:]
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "File too large: free space there" in line
    for later in [*order[order.index(command) :], "snapshot"]:
        commands(later, tmp_path, 300)
    check_finished(open_store(str(tmp_path)).sub("ds"), undisturbed[0].id)


def check_finished(dataset, expected):
    """Check that the snapshot is the expected one, that every planned row exists once, and that the rest is
    garbage.

    Returns:
        The number of orphans, which are removed.
    """
    assert read_snapshot(dataset).id == expected == take_snapshot(dataset).id
    assert sorted(ids_in_pairs(dataset)) == sorted(planned_ids(dataset))

    named = set()
    for kind in JOBS.values():
        for commit in committed(dataset, kind).values():
            named |= {file.key for file in commit.files}
    for delete in (False, True):
        orphans = set(collect_garbage(dataset, -1, delete))
        assert not orphans & named
    stored = {key for key, _ in [*dataset.entries("pairs/"), *dataset.entries("families/")]}
    records = re.compile(r"pairs/README\.md|families/[^/]+/(family\.json|constants-[^/]+)")
    assert {key for key in stored if not records.fullmatch(key)} == named
    assert not [key for key, _ in dataset.entries("") if "/." in key]
    result = verify(dataset, deep=True)
    parts = len(read_plan(dataset).parts)
    assert (result.problems, result.parts) == ([], dict.fromkeys(JOBS.values(), parts))
    return len(orphans)


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("kind", "kills"),
    [("local", 6), ("s3", 1), *(pytest.param(kind, 17, marks=pytest.mark.slow) for kind in ("local", "s3"))],
)
def test_commands_killed_at_random_moments_and_run_again(
    request, tmp_path, commands, undisturbed, kind, kills
):
    """Kill each command at least `kills` times.

    Two tasks do the same work at once, each is killed at its own moment, until one of them completes.
    """
    root = str(tmp_path) if kind == "local" else request.getfixturevalue("s3")
    expected, seconds = undisturbed
    chance = random.Random(5)
    killed, orphans = dict.fromkeys(JOBS, 0), 0
    for attempt in range(100):
        uri = f"{root}/run{attempt}"
        commands("plan", uri, 300)
        dataset = open_store(uri).sub("ds")
        for command, makes in JOBS.items():
            enough = False
            while not enough:
                longest = (
                    300 if killed[command] >= kills else seconds[command] * (1.5 if kind == "local" else 3)
                )
                codes, _ = commands(command, uri, chance.uniform(0, longest), chance.uniform(0, longest))
                killed[command] += codes.count(-signal.SIGKILL)
                enough = 0 in codes
                assert kind == "s3" or verify(dataset, deep=True).problems == []
            assert set(committed(dataset, makes)) == set(read_plan(dataset).parts)
        commands("snapshot", uri, 300)
        orphans += check_finished(dataset, expected.id)
        if min(killed.values()) >= kills:
            break
    assert min(killed.values()) >= kills
    assert orphans > 0 or kind == "s3", (
        "no kill fell between a payload and its commit: the test does not test"
    )


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("kind", "kills"),
    [("local", 6), ("s3", 2), *(pytest.param(kind, 17, marks=pytest.mark.slow) for kind in ("local", "s3"))],
)
def test_plans_killed_at_random_moments_have_the_bytes_of_one_that_is_not(
    request, tmp_path, commands, kind, kills
):
    """Two tasks plan at once, each is killed at its own moment, until one of them completes."""
    root = str(tmp_path / "killed") if kind == "local" else request.getfixturevalue("s3")
    _, seconds = commands("plan", tmp_path / "whole", 300)
    seconds *= 1.5 if kind == "local" else 3
    expected = content(open_store(str(tmp_path / "whole")).sub("ds"))
    assert "manifest.json" in expected
    chance, killed = random.Random(5), 0
    for attempt in range(100):
        uri = f"{root}/run{attempt}"
        while True:
            longest = 300 if killed >= kills else seconds
            codes, _ = commands("plan", uri, chance.uniform(0, longest), chance.uniform(0, longest))
            killed += codes.count(-signal.SIGKILL)
            if 0 in codes:
                break
        dataset = open_store(uri).sub("ds")
        assert content(dataset) == expected
        # What a task left that was killed after the other one had finished the plan is removed.
        commands("plan", uri, 300)
        assert not list(dataset.list("scan/finish/"))
        assert content(dataset) == expected
        if killed >= kills:
            break
    assert killed >= kills


def test_a_snapshot_is_not_visible_before_it_is_whole(tmp_path, monkeypatch):
    """Stop `take_snapshot` after each of its writes: `latest` must be absent or complete."""
    uri = str(tmp_path / "store")
    dataset = open_store(uri, create=True).sub("ds")
    make_all(dataset, {"64x64": [3, 2, 2], "32x96": [2, 1]})
    for writes in range(5):
        left = iter(range(writes))
        real = type(dataset).put_new

        def put_new(store, key, data, left=left, real=real):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(store, key, data)

        monkeypatch.setattr(type(dataset), "put_new", put_new)
        try:
            take_snapshot(dataset)
            complete = True
        except KeyboardInterrupt:
            complete = False
        monkeypatch.undo()
        if complete:
            assert read_snapshot(dataset).id == take_snapshot(dataset).id
        else:
            with pytest.raises(UserError, match="no snapshot yet"):
                read_snapshot(dataset)
            assert verify(dataset).problems == []
    assert complete


def _sleep(processes, chunk):
    processes.put(os.getpid())
    time.sleep(60)


def _work(processes):
    with Workers(_sleep, processes, str, 2) as workers:
        list(workers.map([[1], [2]]))


@pytest.mark.timeout(120)
def test_worker_processes_do_not_outlive_a_killed_task():
    with multiprocessing.get_context("forkserver").Manager() as manager:
        processes = manager.Queue()
        task = multiprocessing.get_context("forkserver").Process(target=_work, args=(processes,))
        task.start()
        workers = [processes.get(timeout=150) for _ in range(2)]
        os.kill(task.pid, signal.SIGKILL)
        task.join()
        for _ in range(100):
            left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
            if not left:
                break
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert left == []
