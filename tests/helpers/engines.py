"""Engines in tests: a step that writes numbers, contents of a store to compare, and a pool of actors without
Ray."""

import json
import os
import pickle
import signal
from collections import Counter
from contextlib import contextmanager

import numpy as np

from data_prep.dataset.schema import Commit
from data_prep.engines import Outcome, Step, _Actor, _Result
from model.common.errors import UserError


def stored(dataset):
    """Return all that a dataset contains and that does not depend on chance: bytes by key, and of parts the
    contents by the key of their commit."""
    found, payloads = {}, set()
    for key in dataset.list("commits/"):
        commit = Commit.from_json(dataset.read(key))
        payloads |= {file.key for file in commit.files}
        files = {file.key.rpartition("/")[2]: (file.bytes, file.xxh64) for file in commit.files}
        counts = {name: count for name, count in commit.counts.items() if name != "seconds"}
        found[key] = commit.rows, commit.ids_xxh64, commit.family_hash, files, counts
    for key in dataset.list(""):
        # Roll-ups are derived, and have times of change.
        if key not in payloads and not key.startswith(("commits/", "rollups/")):
            found[key] = dataset.read(key)
    return found


def numbers(dataset):
    """Return the units that `NumberStep` has done."""
    return {key.removeprefix("numbers/") for key in dataset.list("numbers/")}


class NumberStep(Step):
    """Unit `7` writes the square of 7; some units fail, or kill the worker that has them."""

    title = "numbers"

    def __init__(self, dataset, count, fail=(), kill=(), broken="", batch=1, helps=False):
        self.units = [f"{number:03d}" for number in range(count)]
        self.batch, self.helps = batch, helps
        self.dataset, self.fail, self.kill, self.broken = dataset, set(fail), set(kill), broken

    def missing(self):
        return [unit for unit in self.units if unit not in numbers(self.dataset)]

    def exists(self, unit):
        return self.dataset.exists(f"numbers/{unit}")

    @contextmanager
    def setup(self):
        if self.broken:
            raise UserError(self.broken)

        def do(units):
            for unit in units:
                if unit in self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                if unit in self.fail:
                    raise UserError(f"{unit} is not right: correct it")
                self.dataset.put_new(f"numbers/{unit}", str(int(unit) ** 2).encode())
                yield Outcome(Counter(squared=1), Counter(sum=int(unit)), [f"note {unit}"])

        yield do


class DeadPool:
    """Does what `engines._pool` does, in this process: steps go through pickle, results through JSON.

    It imitates deaths: of the batches of the first pass, those that `dies` names by number are never done,
    and those of `dies_late` are done but not reported. A batch with a unit of `kills` is done in no pass.
    """

    def __init__(self, seed=0, actors=2, dies=(), dies_late=(), kills=()):
        self.chance = np.random.default_rng(seed)
        self.actors, self.dies, self.dies_late, self.kills = actors, dies, dies_late, kills
        self.batches = []

    def __call__(self, step, cluster, units, alone):
        size = 1 if alone else step.batch
        batches = [units[start : start + size] for start in range(0, len(units), size)]
        actors = [_Actor(pickle.loads(pickle.dumps(step)), os.getcwd()) for _ in range(self.actors)]
        for number in self.chance.permutation(len(batches)).tolist():
            self.batches.append(batches[number])
            if set(batches[number]) & set(self.kills) or (number in self.dies and not alone):
                continue
            actor = actors[int(self.chance.integers(len(actors)))]
            (result,) = actor({"units": np.array([json.dumps(batches[number])])})["result"]
            if alone or number not in self.dies_late:
                yield _Result(**json.loads(result))
        for actor in actors:
            actor._stack.close()
