"""Engines, which decide who does the units of a step: one process, the tasks of an array, or Ray.

A step is a list of units by name, and each unit ends in an object of the store. So the store knows what is
missing, and an engine only decides who does a unit next: a step that one engine began can be finished by
another, and two can work on one dataset at once.

    alone  `Share()`       all units, in this process
    share  `Share(3, 64)`  a task's share of the units
    ray    `Ray()`         all units, by a pool of actors, each of which takes the next unit when it is free

Ray gets names of units only, never rows or images, and none of its own checkpoints are used.
"""

import gc
import json
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from model.common.errors import UserError, first_line, one_line
from model.common.progress import Progress
from model.common.share import Share

log = logging.getLogger(__name__)

ENGINES = ("alone", "share", "ray")
MAX_FAILURES = 100
"""Batches that may fail before a Ray job gives up: their cause is then that of all."""
MAX_NAMED = 3
"""Units that a message names."""


@dataclass(frozen=True)
class Ray(Share):
    """All units, done by a Ray cluster."""

    actors: int | None = None
    """Maximum number of actors; None = as many as the cluster has room for."""


@dataclass
class Outcome:
    """Outcome of some units."""

    counts: Counter[str] = field(default_factory=Counter)
    """Finished work by outcome, such as `written`."""
    sums: Counter[str] = field(default_factory=Counter)
    """Other numbers, which are added up and not displayed."""
    notes: list[str] = field(default_factory=list)
    """Texts for the process that runs the step."""

    def add(self, other: "Outcome") -> None:
        """Add the outcome of other units."""
        self.counts.update(other.counts)
        self.sums.update(other.sums)
        self.notes += other.notes


Do = Callable[[Sequence[str]], Iterator[Outcome]]
"""Does some units, and yields what is done as soon as it is."""


class Step(ABC):
    """Work in units that any process can do, in any order, also more than once and at the same time.

    A step is sent to the workers of a cluster by pickle, and everything large is opened by `setup`.
    """

    title: str
    """Name of the step in displays and messages."""
    units: Sequence[str]
    """Names of all units, in the order in which tasks share them."""
    noun: ClassVar[str] = "units"
    """Unit of `Outcome.counts`, in the plural."""
    batch: ClassVar[int] = 1
    """Neighboring units that a worker of a cluster gets at once, where that saves work."""
    overlap: ClassVar[int] = 1
    """Batches that such a worker does at once, so that it reads one while it encodes another."""
    gpus: ClassVar[int] = 0
    """GPUs of such a worker, if the cluster has any."""
    cpus: int = 1
    """CPU cores of such a worker, if a node has so many."""
    helps: ClassVar[bool] = False
    """True if the next step needs all units, so a task that has done its own does those of the others."""
    checks: ClassVar[bool] = False
    """True if `setup` is to run even if no unit is missing, because it checks the settings."""

    @abstractmethod
    def missing(self) -> Collection[str] | None:
        """Return the units whose result is not in the store; None if this step leaves nothing there."""

    @abstractmethod
    def setup(self) -> AbstractContextManager[Do]:
        """Open what a worker needs, once per worker, and return the function that does units."""

    def exists(self, unit: str) -> bool:
        """True if the result of a unit is in the store by now."""
        return False

    def total(self, units: Collection[str]) -> int | None:
        """Return the work of some units, in `noun`; None if it is not known before."""
        return len(units)


def run(step: Step, share: Share) -> Outcome:
    """Do the missing units of a step: those of a share or, if the step `helps` or the engine is Ray, all.

    Args:
        step: the step.
        share: the engine, see the module.

    Returns:
        The sum of the outcomes of the units done now.

    Raises:
        UserError: if units of a Ray job failed; all others are done. Other engines end with the error of the
            first unit that fails.
    """
    own = step.units if step.helps else share.owns(step.units)
    total = Outcome()
    with Progress(step.title, step.total(own), step.noun) as progress:
        if isinstance(share, Ray):
            outcomes = _run_on_ray(step, share, progress)
        elif step.helps:
            outcomes = _help(step, share, progress)
        else:
            outcomes = _run_own(step, own, progress)
        for outcome in outcomes:
            total.add(outcome)
            for name, count in outcome.counts.items():
                progress.advance(count, name)
    return total


def _missing(step: Step, units: Sequence[str], progress: Progress) -> list[str]:
    """Return those units that are missing, in order, and show how many are not."""
    missing = step.missing()
    todo = list(units) if missing is None else _among(units, set(missing))
    before, rest = step.total(units), step.total(todo)
    if before is not None and rest is not None:
        progress.advance(before - rest, "there before")
    return todo


def _among(units: Sequence[str], chosen: set[str]) -> list[str]:
    return [unit for unit in units if unit in chosen]


def _run_own(step: Step, own: Sequence[str], progress: Progress) -> Iterator[Outcome]:
    """Do the missing units of this task."""
    todo = _missing(step, own, progress)
    if todo or step.checks:
        with step.setup() as do:
            yield from do(todo)


def _help(step: Step, share: Share, progress: Progress) -> Iterator[Outcome]:
    """Do the missing units of this task, and then whatever is missing, until nothing is."""
    own = set(share.owns(step.units)) if share.count > 1 else set()
    with step.setup() as do:
        while True:
            missing = step.missing() or ()
            progress.update(len(step.units) - len(missing))
            todo = [unit for unit in missing if unit in own]
            if not todo:
                # From a random unit on, so that tasks that are here at the same time do different ones.
                todo = list(missing)
                start = secrets.randbelow(max(1, len(todo)))
                todo = todo[start:] + todo[:start]
            for unit in todo:
                # Another task works here: look again for what is missing.
                if step.exists(unit):
                    break
                yield from do([unit])
            else:
                if len(todo) == len(missing):
                    return


# -- Ray ------------------------------------------------------------------------------------------------


@contextmanager
def connected(share: Share | None) -> Iterator[None]:
    """Connect to the Ray cluster of this machine or of RAY_ADDRESS, or start one here; for others, nothing.

    Raises:
        UserError: if Ray is not installed, or the cluster cannot be reached.
    """
    if not isinstance(share, Ray):
        yield
        return
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install -c constraints.txt -e '.[ray]'") from error

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started = not ray.is_initialized()
    try:
        if started:
            ray.init(logging_level=logging.WARNING)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS", "this machine")
        raise UserError(
            f"no Ray cluster at {address}: {first_line(error)}: start one, see docs/beyond_slurm.md"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.execution.streaming_executor_state").addFilter(_in_one_line)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _in_one_line(record: logging.LogRecord) -> bool:
    """Replace the trace of a batch whose worker died by one line.

    A handler that keeps records, as those of tests and error trackers do, would keep the trace's frames too,
    with all actors of the pool and their cores.
    """
    if record.exc_info and record.exc_info[1]:
        record.msg, record.args = (
            f"some units failed, and are tried again: {first_line(record.exc_info[1])}",
            None,
        )
        record.exc_info = None
    return True


@dataclass
class _Result:
    """Result of an actor for a batch of units, sent as JSON."""

    units: list[str]
    counts: dict[str, int] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    in_setup: bool = False

    @property
    def outcome(self) -> Outcome:
        """The outcome of the units."""
        return Outcome(Counter(self.counts), Counter(self.sums), self.notes)


class _Actor:
    """A worker of the pool: it sets the step up once, and does the units that it gets."""

    def __init__(self, step: Step, folder: str) -> None:
        # Paths in the settings may be relative to the folder of the command.
        if os.path.isdir(folder):
            os.chdir(folder)
        self._step = step
        self._stack = ExitStack()
        self._error = ""
        try:
            self._do = self._stack.enter_context(step.setup())
        except Exception as error:
            # Raised here, Ray would start the actor again and again.
            self._error = _describe(error)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        """Do the units of one batch, which is one row."""
        (names,) = rows["units"]
        result = _Result(json.loads(str(names)), error=self._error, in_setup=bool(self._error))
        if not self._error:
            try:
                # Another engine may have done some meanwhile, or this actor before its node failed.
                units = [unit for unit in result.units if not self._step.exists(unit)]
                done = Outcome()
                for outcome in self._do(units):
                    done.add(outcome)
                result.counts, result.sums, result.notes = dict(done.counts), dict(done.sums), done.notes
            except Exception as error:
                result.error = _describe(error)
        return {"result": [json.dumps(asdict(result))]}


def _describe(error: Exception) -> str:
    """Return the error as one line; of an unexpected one, the log has the trace."""
    if isinstance(error, UserError):
        return one_line(str(error))
    log.error("a unit failed", exc_info=error)
    return one_line(f"{type(error).__name__}: {first_line(error)}")


def _run_on_ray(step: Step, cluster: Ray, progress: Progress) -> Iterator[Outcome]:
    """Do all missing units on a Ray cluster.

    Units that are left after the first pass, because they failed, or because their worker or its node died,
    are tried once more, each alone on its worker. So a unit that kills its worker takes no other one with it.
    """
    todo = _missing(step, step.units, progress)
    if not todo:
        if step.checks:
            with step.setup():
                return
        return
    if len(todo) == 1 and not step.gpus:
        # A worker would take longer to start.
        with step.setup() as do:
            yield from do(todo)
        return

    done: set[str] = set()
    errors: dict[str, str] = {}
    left = todo
    for alone in (False, True):
        errors = {}
        for result in _pool(step, cluster, left, alone):
            if result.in_setup:
                raise UserError(f"{step.title}: {result.error}")
            if not result.error:
                done.update(result.units)
                yield result.outcome
                continue
            errors |= dict.fromkeys(result.units, result.error)
            if len(errors) > MAX_FAILURES * step.batch:
                break

        # The store decides, not Ray: a unit whose actor died may have been done before. One that came back
        # without an error and is missing cannot be done yet, and is among the notes.
        missing = step.missing()
        left = _among(todo, set(todo if missing is None else missing) - done)
        if not left:
            return
        if len(errors) > MAX_FAILURES * step.batch:
            break
    _raise_failed(step, left, len(todo), errors)


def _raise_failed(step: Step, left: Sequence[str], count: int, errors: dict[str, str]) -> None:
    """Raise the error of units that could not be done."""
    reasons: dict[str, list[str]] = {}
    for unit in left:
        reason = errors.get(unit, "its worker was killed each time, by a crash or for its memory")
        reasons.setdefault(reason, []).append(unit)
    texts = []
    for reason, units in sorted(reasons.items()):
        names = ", ".join(units[:MAX_NAMED]) + (", ..." if len(units) > MAX_NAMED else "")
        texts.append(f"{names}: {reason}")
    raise UserError(
        f"{step.title}: {len(left):,} of {count:,} units could not be done ({'; '.join(texts)}): the others "
        "are done; correct the cause, and run the same command again"
    )


def _pool(step: Step, cluster: Ray, units: Sequence[str], alone: bool) -> Iterator[_Result]:
    """Do some units by a pool of actors, and yield the results as they come.

    Args:
        step: the step.
        cluster: the engine.
        units: the units.
        alone: each unit in a batch of its own, and one batch at a time per actor.
    """
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]
    import ray.data.exceptions  # pyright: ignore[reportMissingImports]
    import ray.exceptions  # pyright: ignore[reportMissingImports]

    size, overlap = (1, 1) if alone else (step.batch, step.overlap)
    batches = [units[start : start + size] for start in range(0, len(units), size)]
    rows = [{"units": json.dumps(batch)} for batch in batches]
    cpus, gpus, slots = _room(step, ray.nodes())
    actors = max(1, min(len(rows), cluster.actors or slots))

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A batch whose actor died is an error of this batch, and no end of the others.
    context.max_errored_blocks = -1
    # A unit may take hours, and a cluster may be without room for as long.
    context.execution_no_progress_timeout_s = -1
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_args=(step, os.getcwd()),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=actors,
            # One waits at the actor while Ray looks for the next, which takes a tenth of a second.
            max_tasks_in_flight_per_actor=overlap if alone else overlap + 1,
            max_concurrent_calls_per_actor=overlap,
            enable_true_multi_threading=True,
        ),
        num_cpus=cpus,
        num_gpus=gpus,
        # By default a unit that kills its worker is tried without end, and one whose node died waits for that
        # actor, for which there may never be room again. The second pass takes both.
        ray_remote_args_fn=lambda: {"max_task_retries": 0},
    )
    rows_back = data.iter_rows()
    try:
        for row in rows_back:
            yield _Result(**json.loads(row["result"]))
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise UserError(
            f"{step.title}: Ray gave up: {first_line(error)}: what is done stays; see its log, and run the "
            "same command again"
        ) from error
    finally:
        # Ray ends actors whose last handle is deleted. Errors of dead ones are cycles of references that keep
        # the handles of all, and so the room that the next pool needs.
        del data, rows_back
        gc.collect()


def _room(step: Step, nodes: Sequence[dict[str, Any]]) -> tuple[float, float, int]:
    """Return the CPUs and GPUs of an actor, and for how many the cluster has room."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = min(step.gpus, max((node.get("GPU", 0) for node in alive), default=0))
    # More than any node has would wait forever.
    cpus = min(step.cpus, max((node.get("CPU", 0) for node in alive), default=1))
    slots = 0
    for node in alive:
        room = node.get("CPU", 0) // cpus if cpus else len(alive)
        slots += int(min(room, node.get("GPU", 0) // gpus) if gpus else room)
    return cpus, gpus, slots
