"""Which rank hangs, and where; and the end of all ranks when one has failed.

All ranks enter the same phases in the same order, so of ranks that wait for one another, the one that has entered the fewest
is the one that the others wait for. A thread of each rank tells its peers how many it has entered, through the store by which
the process group was made (on rank 0), and ends its own rank, since a collective that waits for a peer cannot be interrupted:

| a peer                                    | this rank says, on stderr            | and ends after                       |
|-------------------------------------------|--------------------------------------|--------------------------------------|
| failed with an exception, a `UserError`   | which one, and the error's last line | seconds, with the peer's exit code   |
| is stopped, or its node is dead           | which one, on which host, its phase  | 60 s                                 |
| is stuck while its process lives          | the same                             | 0.9 x `engine.timeout_minutes`       |
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

import torch.distributed as dist

from model.common.errors import UserError, print_error
from pipeline.runtime.distributed import Distributed

INTERVAL = 2.0
"""Seconds between two looks for a peer's failure; peers' signs of life are read at every fifth."""
_LOOKS = 5
_SILENT = 6
"""Readings without a sign of life after which a peer is taken for dead. Counted, not timed: a job that Slurm suspends and
resumes as a whole has then missed one."""
_FAILED, _LEFT = "failed", "left"
LEAVING = "leave"
"""A phase that may last: the last checkpoint's upload."""


class Heartbeat:
    """What this rank is doing."""

    def __init__(self) -> None:
        self.now: tuple[int, int, str] = (0, 0, "start")
        """Phases entered so far, step, phase."""

    def enter(self, phase: str, step: int) -> None:
        """Go on to a phase of a step; costs nothing."""
        self.now = (self.now[0] + 1, step, phase)


class Watchdog:
    """The thread that watches the peers; needs the process group."""

    def __init__(self, ranks: Distributed, heartbeat: Heartbeat, stuck_seconds: float, interval: float = INTERVAL) -> None:
        """Start watching.

        Args:
            ranks: this process among the ranks.
            heartbeat: of this rank.
            stuck_seconds: how long all ranks may stand in their phases before those behind are named.
            interval: seconds between two looks for a failure.
        """
        self._ranks, self._heartbeat, self._interval = ranks, heartbeat, interval
        self._stuck = max(1, round(stuck_seconds / (interval * _LOOKS)))
        # a connection of its own: the process group's may be in use by a main thread that hangs
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("watchdog", store).clone()  # pyright: ignore[reportPrivateImportUsage]
        self._keys = [f"{rank}" for rank in range(ranks.world)]
        self._looks = self._beat = 0
        self._beats: list[dict[str, Any]] = []
        self._silent = [0] * ranks.world
        self._still = 0
        self._ending = threading.Event()
        self._tell()
        for watch in (self._watch, self._watch_the_store):
            threading.Thread(target=watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching, and tell the peers not to wait for this rank's signs of life."""
        self._ending.set()
        self._heartbeat.enter(_LEFT, self._heartbeat.now[1])
        self._tell()

    def fail(self, error: BaseException) -> NoReturn:
        """End this rank with its error, and the peers: code 2 for a `UserError`, which is told in one line, else 1."""
        if self._ending.is_set():
            time.sleep(60)  # the thread is ending this rank, and this error is only an echo of that
        self._ending.set()
        code = 2 if isinstance(error, UserError) else 1
        if isinstance(error, UserError):
            print_error(error)
        else:
            trace = "".join(traceback.format_exception(error))
            print(f"rank {self._ranks.rank} of {self._ranks.world} failed:\n{trace}", file=sys.stderr, flush=True)
        line = " ".join("".join(traceback.format_exception_only(error)).split())
        self._exit(code, f"rank {self._ranks.rank} failed: {line}")

    def _exit(self, code: int, why: str) -> NoReturn:
        """Tell the peers why, so that they end by this word and not by a torn connection, and end."""
        with suppress(dist.DistError):  # where rank 0 and its store have gone before, the peers see that too
            self._store.set(_FAILED, json.dumps({"code": code, "why": why}))
            time.sleep(3 * self._interval * (self._ranks.world > 1))
        os._exit(code)

    # -- the thread -------------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        self._beat += 1
        count, step, phase = self._heartbeat.now
        place = {"host": socket.gethostname(), "pid": os.getpid()}
        beat = {"beat": self._beat, "count": count, "step": step, "phase": phase, **place}
        self._store.set(self._keys[self._ranks.rank], json.dumps(beat))

    def _watch(self) -> None:
        while not self._ending.wait(self._interval):
            try:
                if self._store.check([_FAILED]):
                    self._follow(**json.loads(self._store.get(_FAILED)))
                    return
                if self._looks % _LOOKS == 0:
                    self._tell()
                    if self._beats or self._store.check(self._keys):
                        self._read([json.loads(beat) for beat in self._store.multi_get(self._keys)])
                self._looks += 1
            except dist.DistError:
                self._follow(1, f"{self._where(0)} has ended without a word")
                return

    def _watch_the_store(self) -> None:
        """A thread by itself: nothing frees the other one from a store that does not answer."""
        looks = missed = 0
        while not self._ending.wait(self._interval):
            missed = missed + 1 if self._looks == looks else 0
            looks = self._looks
            if missed == _SILENT * _LOOKS:
                print(f"error: {self._where(0)} hangs: no sign of life for {missed * self._interval:.0f} s", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)

    def _follow(self, code: int, why: str) -> None:
        """End as a peer has ended, unless this rank's main thread ends by itself in a moment, and says so better."""
        if not self._ending.wait(self._interval):
            print(f"rank {self._ranks.rank} ends: {why}", file=sys.stderr, flush=True)
            os._exit(code)

    def _read(self, beats: list[dict[str, Any]]) -> None:
        before, self._beats = self._beats or beats, beats
        here = [rank for rank, beat in enumerate(beats) if beat["phase"] != _LEFT]
        for rank in here:
            self._silent[rank] = self._silent[rank] + 1 if beats[rank]["beat"] == before[rank]["beat"] else 0
        dead = [rank for rank in here if self._silent[rank] >= _SILENT]
        if dead:
            self._name(f"{self._where(*dead)} hangs: no sign of life for {_SILENT * _LOOKS * self._interval:.0f} s")
        moved = [beat["count"] for beat in beats] != [beat["count"] for beat in before]
        self._still = 0 if moved else self._still + 1
        if here and self._still >= self._stuck:
            fewest = min(beats[rank]["count"] for rank in here)
            behind = [rank for rank in here if beats[rank]["count"] == fewest]
            if beats[behind[0]]["phase"] != LEAVING:
                self._name(f"{self._where(*behind)} hangs: no rank has gone on for {self._still * _LOOKS * self._interval:.0f} s")

    def _where(self, *ranks: int) -> str:
        if not self._beats:
            return f"rank {ranks[0]}"
        named = [(rank, self._beats[rank]) for rank in ranks[:8]]
        return ", ".join(
            f"rank {rank} ({beat['host']}, process {beat['pid']}) in phase `{beat['phase']}` of step {beat['step']}"
            for rank, beat in named
        ) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _name(self, hanging: str) -> None:
        """End, and tell the peers, because of ranks that hang."""
        if not self._ending.is_set():
            self._ending.set()
            print(f"error: {hanging}", file=sys.stderr, flush=True)
            self._exit(1, hanging)
