"""A watchdog that names the rank that hangs, with its phase, and ends all ranks when one has failed.

All ranks enter the same phases in the same order. When ranks wait for each other, the straggler is therefore
the rank that has entered the fewest phases. A thread on each rank publishes how many its rank has entered,
through the store that the process group was made with (on rank 0). It also ends its own rank, because a
collective that waits for a peer cannot be interrupted:

| a peer                              | this rank prints on stderr      | and exits after                |
|-------------------------------------|---------------------------------|--------------------------------|
| failed with an exception            | the peer and its error          | seconds, with the peer's code  |
| is stopped, or its node is dead     | the peer, its host, its phase   | 60 s                           |
| is stuck while its process is alive | the same                        | 0.9 x `engine.timeout_minutes` |
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import torch.distributed as dist

from model.common.errors import UserError, explain, print_error
from pipeline.runtime.distributed import Distributed

INTERVAL = 2.0
"""Seconds between two checks for a peer's failure."""
_CHECKS_PER_READING = 5
"""The peers' heartbeats are read at every fifth check."""
_MAX_MISSED = 6
"""Readings without a new heartbeat after which a peer counts as dead.

They are counted, not timed: a job that Slurm suspends and resumes as a whole has then missed only one.
"""
_MAX_NAMED = 8
"""Maximum number of ranks that a message lists."""
_FAILED, _LEFT = "failed", "left"
LEAVING = "leave"
"""A phase that may take any time: the upload of the last checkpoint."""


class Heartbeat:
    """The current phase of this rank."""

    def __init__(self) -> None:
        self.now: tuple[int, int, str] = (0, 0, "start")
        """Phases entered so far, step, phase."""

    def enter(self, phase: str, step: int) -> None:
        """Enter a phase of a step; this costs nothing."""
        # one assignment of a new tuple: the watchdog's thread never sees a half-changed phase
        self.now = (self.now[0] + 1, step, phase)


class Watchdog:
    """The thread that watches the peers. It needs the process group."""

    def __init__(
        self, ranks: Distributed, heartbeat: Heartbeat, stuck_seconds: float, interval: float = INTERVAL
    ) -> None:
        """Start watching.

        Args:
            ranks: rank of this process.
            heartbeat: phase of this rank.
            stuck_seconds: time without any rank entering a phase after which the stragglers are named.
            interval: seconds between two checks for a failure.
        """
        self._ranks, self._heartbeat, self._interval = ranks, heartbeat, interval
        # counted in readings of the peers, like `_MAX_MISSED`, and for the same reason
        self._max_still = max(1, round(stuck_seconds / (interval * _CHECKS_PER_READING)))
        # a connection of its own: the process group's may be in use by a main thread that hangs
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("watchdog", store).clone()  # pyright: ignore[reportPrivateImportUsage]
        self._keys = [f"{rank}" for rank in range(ranks.world)]

        self._checks = self._beat = 0
        self._beats: list[dict[str, Any]] = []
        self._missed = [0] * ranks.world
        self._still = 0
        self._ending = threading.Event()
        self._publish()
        # two threads, since the first one may wait for a store that does not answer
        for watch in (self._watch_peers, self._watch_store):
            # daemons, so that a thread that waits for the store cannot keep the process from exiting
            threading.Thread(target=watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching, and let the peers know that no more heartbeats of this rank follow."""
        self._ending.set()
        # as a phase, so that the peers stop expecting heartbeats and do not take this rank for dead
        self._heartbeat.enter(_LEFT, self._heartbeat.now[1])
        self._publish()

    def fail(self, error: BaseException) -> NoReturn:
        """Print the error, and end this rank and its peers: with code 2 for a `UserError`, else 1."""
        if self._ending.is_set():
            time.sleep(60)  # the thread is ending this rank already, and this error is only a consequence
        self._ending.set()

        error = explain(error)
        code = 2 if isinstance(error, UserError) else 1
        if isinstance(error, UserError):
            print_error(error)
        else:
            trace = "".join(traceback.format_exception(error))
            _print(f"rank {self._ranks.rank} of {self._ranks.world} failed:\n{trace}")
        line = " ".join("".join(traceback.format_exception_only(error)).split())
        self._exit(code, f"rank {self._ranks.rank} failed: {line}")

    def _exit(self, code: int, why: str) -> NoReturn:
        """Publish the reason, so that the peers end with it and not with a broken connection, and exit."""
        # in a thread, since the store may not answer any more
        threading.Thread(target=self._tell_peers, args=(code, why), daemon=True).start()
        # the peers need time to read the reason: rank 0 takes the store with it
        time.sleep(3 * self._interval * (self._ranks.world > 1))

        # not `sys.exit`: the interpreter's shutdown may wait for a collective that never ends
        os._exit(code)

    def _tell_peers(self, code: int, why: str) -> None:
        """Publish why this rank ends; if the store does not answer, name rank 0, which has it."""
        try:
            self._store.set(_FAILED, json.dumps({"code": code, "why": why}))
            # a value is sent without an answer, a question is not
            self._store.check([_FAILED])
        except dist.DistError:
            _print(f"rank {self._ranks.rank} ends: {self._describe(0)} has exited without an error message")

    # -- the threads ----------------------------------------------------------------------------------------

    def _publish(self) -> None:
        self._beat += 1
        count, step, phase = self._heartbeat.now
        beat = {
            "beat": self._beat,
            "count": count,
            "step": step,
            "phase": phase,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._store.set(self._keys[self._ranks.rank], json.dumps(beat))

    def _watch_peers(self) -> None:
        while not self._ending.wait(self._interval):
            try:
                # `check` and not `get`, which would block until the key exists
                if self._store.check([_FAILED]):
                    self._end_like_peer(**json.loads(self._store.get(_FAILED)))
                    return
                # at every check, so that the step in which a rank stops is not an old one
                self._publish()
                is_due = self._checks % _CHECKS_PER_READING == 0
                # until all ranks have published once, a reading would block
                if is_due and (self._beats or self._store.check(self._keys)):
                    self._read([json.loads(beat) for beat in self._store.multi_get(self._keys)])
                self._checks += 1
            except dist.DistError:
                self._end_like_peer(1, f"{self._describe(0)} has exited without an error message")
                return

    def _watch_store(self) -> None:
        """End this rank if the store does not answer; the other thread would wait for it forever."""
        checks = missed = 0
        while not self._ending.wait(self._interval):
            # the other thread counts its checks; it is stuck in the store when the count stays
            missed = missed + 1 if self._checks == checks else 0
            checks = self._checks
            if missed == _MAX_MISSED * _CHECKS_PER_READING:
                seconds, step = missed * self._interval, self._heartbeat.now[1]
                _print(
                    f"error: {self._describe(0)} hangs: no heartbeat for {seconds:.0f} s, this rank waits in "
                    f"step {step}"
                )
                os._exit(1)

    def _end_like_peer(self, code: int, why: str) -> None:
        """Exit with a peer's code, unless the main thread fails in the next moment with a better message."""
        if not self._ending.wait(self._interval):
            _print(f"rank {self._ranks.rank} ends: {why}")
            os._exit(code)

    def _read(self, beats: list[dict[str, Any]]) -> None:
        """Compare the heartbeats of all ranks with those of the reading before."""
        # the first reading has none before it, so it is compared with itself
        before, self._beats = self._beats or beats, beats
        # ranks that have left publish nothing more, and that is no failure
        present = [rank for rank, beat in enumerate(beats) if beat["phase"] != _LEFT]
        reading_seconds = _CHECKS_PER_READING * self._interval

        for rank in present:
            self._missed[rank] = self._missed[rank] + 1 if beats[rank]["beat"] == before[rank]["beat"] else 0
        dead = [rank for rank in present if self._missed[rank] >= _MAX_MISSED]
        if dead:
            seconds = _MAX_MISSED * reading_seconds
            waiting = max((beats[rank]["step"] for rank in present if rank not in dead), default=0)
            self._end_because(
                f"{self._describe(*dead)} hangs: no heartbeat for {seconds:.0f} s, the others wait in step "
                f"{waiting}"
            )

        moved = [beat["count"] for beat in beats] != [beat["count"] for beat in before]
        self._still = 0 if moved else self._still + 1
        if present and self._still >= self._max_still:
            fewest = min(beats[rank]["count"] for rank in present)
            stragglers = [rank for rank in present if beats[rank]["count"] == fewest]
            # uploading a last checkpoint of terabytes may take longer than any timeout
            if beats[stragglers[0]]["phase"] != LEAVING:
                seconds = self._still * reading_seconds
                self._end_because(
                    f"{self._describe(*stragglers)} hangs: no rank has made progress for {seconds:.0f} s"
                )

    def _describe(self, *ranks: int) -> str:
        """Return ranks with their host, process and phase."""
        if not self._beats:
            return f"rank {ranks[0]}"
        described: list[str] = []
        for rank in ranks[:_MAX_NAMED]:
            beat = self._beats[rank]
            place = f"{beat['host']}, process {beat['pid']}"
            # host and process, so that a user can go there and look with py-spy
            described.append(f"rank {rank} ({place}) in phase `{beat['phase']}` of step {beat['step']}")
        more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
        return ", ".join(described) + more

    def _end_because(self, hanging: str) -> None:
        """End this rank and its peers because of ranks that hang."""
        if not self._ending.is_set():
            self._ending.set()
            _print(f"error: {hanging}")
            self._exit(1, hanging)


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
