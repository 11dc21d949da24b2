"""Checkpoints in this project's own format: safetensors and JSON, no pickle, for any number of processes.

<run>/checkpoints/step_000000100/
  rank_00000.safetensors    a rank's flat fp32 tensors <kind>.<sub-group>: master, moments, ema_<i>
  replicated.safetensors    persistent buffers and frozen parameters, whole
  manifest.json             layout, optimizer, trainer's state, sizes and hashes of files: written last
latest                      name of the newest, for people; readers look at the manifests

A training step waits only for the copy to host memory. A thread writes the files, and `poll`, at a later step
and on all ranks, commits them. Until the rename that follows the manifest there is only a folder `.tmp_*`,
which readers ignore.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from data_prep.store.store import hash_file, open_store
from model.common.errors import UserError
from model.common.files import sync_path, write_atomic
from model.common.records import seal
from pipeline.checkpoint.base import WithBase, has_base, open_base, upload_base
from pipeline.checkpoint.files import RankFiles, Written, rank_file, write_tensors
from pipeline.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    REPLICATED,
    read_manifest,
    refuse_other_format,
)
from pipeline.checkpoint.weights import CheckpointWeights, ExportedWeights
from pipeline.engine.layout import Layout, moves
from pipeline.engine.master_weights import RankState, check_names
from pipeline.runtime.attempt import check_newest_attempt
from pipeline.runtime.distributed import all_reduce_min, gather, rank_and_world
from pipeline.stage.config import CheckpointConfig, dump_stage

if TYPE_CHECKING:  # sampling reads weights without DeepSpeed
    from pipeline.engine.engine import Engine

log = logging.getLogger(__name__)

_OLD_MOMENTS = ["exp_avg", "exp_avg_sq"]
"""Moments in checkpoints whose manifest does not name them."""
_FAILED, _WAITING, _DONE = 0, 1, 2
"""Status of a rank's job; the status of all ranks together is the lowest."""


@dataclass
class _Job:
    """Work that a thread of this rank does while training goes on."""

    folder: Path
    manifest: dict[str, Any]
    thread: threading.Thread
    result: dict[str, Written] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def status(self) -> int:
        """One of `_FAILED`, `_WAITING` and `_DONE`."""
        if self.thread.is_alive():
            return _WAITING
        return _DONE if self.error is None else _FAILED


class Checkpoints:
    """The checkpoints of one run. All methods are collective; each rank has its own object."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        """Manage the checkpoints in `folder`; nothing is created before the first save."""
        self.folder, self.config = folder, config
        self.rank, self.world = rank_and_world()
        self._writing: _Job | None = None
        self._uploading: _Job | None = None
        self._host: dict[str, Tensor] = {}
        self._stage_hash = ""
        self._newest: dict[str, Any] | None = None
        self.failures = 0
        """Saves that were given up since the start, for instance because the disk was full."""

    # -- saving --

    def save(
        self, engine: "Engine", trainer_state: dict[str, Any], samples: int, step: int, wait: bool
    ) -> None:
        """Save a checkpoint; one of the same step that was saved or loaded before is not saved again.

        Args:
            engine: the engine whose state is saved.
            trainer_state: the trainer's state, as JSON can hold it.
            samples: samples seen so far.
            step: steps made so far.
            wait: commit the checkpoint before returning; else a later `poll`, `save`, `wait` or `close` does.

        Raises:
            UserError: if `wait` is set and the checkpoint could not be written. Without `wait` that is a
                warning, and the run goes on with the checkpoints that it has.
        """
        self.wait()  # one save at a time: they share the host memory
        if self._newest is not None and self._newest["step"] == step:
            return
        if not self._stage_hash:
            self._stage_hash = xxhash.xxh64(dump_stage(engine.stage).encode()).hexdigest()

        # A failure without `wait` costs one checkpoint, not the run; with `wait` the caller is about to exit.
        folder, failures = self.folder / f".tmp_{_name(step)}", self.failures
        if self._prepare(folder):
            state = engine.state()
            manifest = self._manifest(state, trainer_state, samples, step)
            tensors: dict[str, Tensor] = {}
            for kind, group in state.tensors.items():
                tensors |= {f"{kind}.{index}": tensor for index, tensor in enumerate(group)}

            # If the caller waits on a CPU, nothing changes the tensors in the meantime: they need no copy.
            if not (wait and engine.device.type == "cpu"):
                tensors = self._to_host(tensors)

            files: dict[str, Mapping[str, Tensor]] = {rank_file(self.rank): tensors}
            if self.rank == 0:
                files[REPLICATED] = state.replicated
            self._writing = _start_job(folder, manifest, lambda: _write_files(folder, files))

        if wait:
            self.wait()
            if self.failures > failures:
                raise UserError(
                    f"{self.folder}: the checkpoint of step {step} could not be written: make room there and "
                    "start again"
                )

    def _prepare(self, folder: Path) -> bool:
        """Make the temporary folder on rank 0; return True if that succeeded."""
        ready = 1
        if self.rank == 0:
            try:
                # They are of a killed job: `save` has waited for the saves of this one.
                for left_over in self.folder.glob(".tmp_*"):
                    shutil.rmtree(left_over)
                folder.mkdir(parents=True)
            except OSError as error:
                self._give_up(folder, error)
                ready = 0
        return self._all_ready(ready)

    def _all_ready(self, ready: int) -> bool:
        """Return True if `ready` is 1 on all ranks; otherwise every rank counts a failure."""
        if all_reduce_min(ready):
            return True
        self.failures += 1
        return False

    def _give_up(self, folder: Path, error: Exception | None) -> None:
        reason = error or "see the other ranks"
        log.warning("checkpoint %s was not written, the run goes on without it: %s", folder.name, reason)
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)

    def _to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to host memory, which is reused by later saves and page-locked for a GPU."""
        for name, tensor in tensors.items():
            if name not in self._host:
                self._host[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._host[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            # The copies are asynchronous: training must not change the weights before they are done.
            torch.cuda.synchronize()
        return {name: self._host[name] for name in tensors}

    def _manifest(
        self, state: RankState, trainer_state: dict[str, Any], samples: int, step: int
    ) -> dict[str, Any]:
        every = self.config.keep_every_samples
        before = self._newest["samples"] if self._newest is not None else 0
        return {
            "format": FORMAT,
            "step": step,
            "samples": samples,
            "permanent": every is not None and samples // every > before // every,
            "layout": state.layout.to_json(),
            "optimizer": {"step": state.optimizer_step, "groups": state.groups, "moments": state.moments},
            "ema": state.decays,
            # A copy, because the trainer goes on changing it.
            "trainer": json.loads(json.dumps(trainer_state)),
            "stage_xxh64": self._stage_hash,
        }

    def poll(self) -> None:
        """Commit a checkpoint that all ranks have written, and finish an upload; call it at each step."""
        if self._writing is not None:
            status = all_reduce_min(self._writing.status)
            if status != _WAITING:
                self._finish_writing(status)
        if self._uploading is not None:
            status = all_reduce_min(self._uploading.status)
            if status != _WAITING:
                self._finish_upload(status)

    @property
    def pending(self) -> bool:
        """True if a save was started and is not committed yet; not collective, the same on all ranks."""
        return self._writing is not None

    def wait(self) -> None:
        """Wait until the save that was started is written, and commit it."""
        if self._writing is not None:
            self._writing.thread.join()
            self._finish_writing(all_reduce_min(self._writing.status))

    def close(self) -> None:
        """Wait for the save and the upload that were started."""
        self.wait()
        if self._uploading is not None:
            self._uploading.thread.join()
            self._finish_upload(all_reduce_min(self._uploading.status))

    def _finish_writing(self, status: int) -> None:
        job, self._writing = self._writing, None
        assert job is not None
        job.thread.join()

        ready = status == _DONE
        final = self.folder / job.folder.name.removeprefix(".tmp_")

        job.manifest["files"] = {}
        for files in gather({name: asdict(file) for name, file in job.result.items()}):
            job.manifest["files"] |= files
        if self.rank == 0 and ready:
            try:
                self._commit(job, final)
            except OSError as error:
                job.error, ready = error, False
        if not self._all_ready(int(ready)):
            self._give_up(job.folder, job.error)
            return

        self._newest = job.manifest
        if self.config.upload and self._uploading is None:
            self._uploading = _start_job(final, job.manifest, lambda: self._upload(final))
        if self.rank == 0:
            self._retain()

    def _commit(self, job: _Job, final: Path) -> None:
        """Write the manifest, rename the folder, write `latest`; each is on disk before the next begins."""
        check_newest_attempt(self.folder.parent)
        write_atomic(job.folder / MANIFEST, seal(job.manifest, allow_nan=True), durable=True)
        if final.exists():  # it is damaged and was passed over, or the run was set back to an earlier step
            _remove(final)
        job.folder.rename(final)
        # A rename is only durable once the folder that contains it is on disk.
        sync_path(self.folder)
        write_atomic(self.folder / "latest", final.name, durable=True)

    def _retain(self) -> None:
        """Delete the checkpoints that the settings do not keep."""
        assert self._newest is not None
        newest = _name(self._newest["step"])  # later ones are damaged and were passed over: they do not count
        folders = [folder for folder in sorted(self.folder.glob("step_*")) if folder.name <= newest]
        uploading = self._uploading.folder if self._uploading is not None else None

        for folder in folders[: -max(1, self.config.keep_last)]:
            manifest = read_manifest(folder)
            if folder != uploading and not (manifest is not None and manifest["permanent"]):
                _remove(folder)

    # -- upload --

    def _upload(self, final: Path) -> dict[str, Written]:
        """Copy this rank's files to the store; the manifest follows once all ranks have done so."""
        store, run = open_store(self.config.upload, create=True), self.folder.parent
        # Before the checkpoint, which is of no use without the frozen weights.
        if self.rank == 0 and has_base(run):
            upload_base(run, store.sub(run.name))
        for name in [rank_file(self.rank)] + [REPLICATED] * (self.rank == 0):
            store.put(f"{self._key(final)}/{name}", final / name)
        return {}

    def _key(self, final: Path) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}/{final.name}"

    def _finish_upload(self, status: int) -> None:
        job, self._uploading = self._uploading, None
        assert job is not None
        job.thread.join()
        if status != _DONE:
            reason = job.error or "see other ranks"
            log.warning(
                "checkpoint %s was not uploaded to %s: %s", job.folder.name, self.config.upload, reason
            )
        elif self.rank == 0:
            store = open_store(self.config.upload)
            store.put(f"{self._key(job.folder)}/{MANIFEST}", seal(job.manifest, allow_nan=True))

    # -- loading --

    def newest(self) -> Path | None:
        """Return the newest checkpoint whose files have the sizes and hashes that its manifest records."""
        # Rank 0's list, since a network file system may show other ranks an older state of the folder.
        names = gather([folder.name for folder in sorted(self.folder.glob("step_*"), reverse=True)])[0]
        for name in names:
            damage = self.damage(self.folder / name)
            if all_reduce_min(0 if damage else 1):
                return self.folder / name
            if damage:
                log.warning("checkpoint %s is passed over: %s", name, damage)
        return None

    def damage(self, folder: Path) -> str:
        """Describe what is wrong with this rank's share of the files; empty if nothing is."""
        manifest = read_manifest(folder)
        if manifest is None:
            return "its manifest is missing or damaged"
        # The ranks share the hashing, which reads every byte.
        for name in sorted(manifest["files"])[self.rank :: self.world]:
            try:
                file = Written((folder / name).stat().st_size, hash_file(folder / name))
            except OSError as error:
                return f"{name}: {error}"
            if asdict(file) != manifest["files"][name]:
                return f"{name} is not what was written"
        return ""

    def load(self, engine: "Engine", path: Path) -> dict[str, Any]:
        """Restore the engine from a checkpoint of any number of processes.

        Returns:
            The trainer's state.

        Raises:
            UserError: if the checkpoint does not fit the stage; the message names what differs.
        """
        manifest = read_manifest(path)
        if manifest is None:
            raise UserError(f"{path} is no checkpoint: name a folder step_* with a {MANIFEST}")

        state = engine.state()
        old = Layout.from_json(manifest["layout"])
        replicated = load_file(path / REPLICATED)
        given = old.shapes | {name: tuple(value.shape) for name, value in replicated.items()}
        wanted = state.layout.shapes | {name: tuple(value.shape) for name, value in state.replicated.items()}
        check_names(wanted, given, str(path))
        if manifest["ema"] != state.decays:
            raise UserError(
                f"{path} holds averages of decay {manifest['ema']}, the stage asks for {state.decays}: "
                "set ema to those"
            )
        _check_optimizer(path, manifest["optimizer"], state)

        files = RankFiles(path)
        for source, target in moves(old, state.layout, self.rank):
            for kind, tensors in state.tensors.items():
                if not tensors[target.group].numel():  # the parameters of this group do not have this moment
                    continue
                stop = source.offset + source.length
                # Only the bytes that this rank needs, also from a run with another number of ranks.
                values = files.read(source.rank, f"{kind}.{source.group}", source.offset, stop)
                tensors[target.group][target.offset : target.offset + target.length] = values

        engine.finish_load(manifest["optimizer"]["step"], replicated)
        self._newest = manifest
        return manifest["trainer"]


def _check_optimizer(path: Path, saved: dict[str, Any], state: RankState) -> None:
    """Refuse a checkpoint of another optimizer.

    Raises:
        UserError: if its parameter groups or moments are not those of the stage.
    """
    groups = [group["name"] for group in saved["groups"]], [group["name"] for group in state.groups]
    moments = saved.get("moments", _OLD_MOMENTS), state.moments
    for kind, (before, now) in {"parameter groups": groups, "moments": moments}.items():
        if before != now:
            raise UserError(
                f"{path} was trained with {kind} {', '.join(before)}, the stage has {', '.join(now)}: "
                "set optim.name as it was, or begin a new stage with start_from"
            )


def _write_files(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Written]:
    return {name: write_tensors(folder / name, tensors) for name, tensors in files.items()}


def _start_job(folder: Path, manifest: dict[str, Any], work: Callable[[], dict[str, Written]]) -> _Job:
    """Start a thread that calls `work` and keeps its result, or its error, in the job."""

    def run() -> None:
        try:
            # The lowest priority, on Linux for this thread alone: with few cores, training steps come first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            job.result = work()
        except Exception as error:  # the training thread reads it and agrees with the other ranks on it
            job.error = error

    # A daemon, so that a process that fails does not wait for a slow disk.
    job = _Job(folder, manifest, threading.Thread(target=run, name=f"checkpoint {folder.name}", daemon=True))
    job.thread.start()
    return job


def _name(step: int) -> str:
    return f"step_{step:09d}"


def _remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that no reader takes what remains for a checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    sync_path(folder)
    shutil.rmtree(folder)


def load_weights(path: str | Path, which: str) -> Mapping[str, Tensor]:
    """Open whole fp32 weights, with or without a process group, to sample, export, or start another stage.

    Inside a process group, all ranks have to call it: they share the work of checking a run's newest
    checkpoint.

    Args:
        path: a run's folder (its newest undamaged checkpoint is used), a checkpoint, or exported safetensors
            (a file, or a folder of them).
        which: `raw` = the trained weights, `ema` = the first average, or the decay of an average, such as
            `0.9999`. Not used for exported safetensors, which contain one set of weights.

    Returns:
        Tensors by name, each read when it is accessed.

    Raises:
        UserError: if there are no weights at `path`, or not that average.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        newest = Checkpoints(path / "checkpoints", CheckpointConfig()).newest()
        if newest is None:
            for folder in (path / "checkpoints").iterdir():
                refuse_other_format(folder)
            raise UserError(f"{path} has no checkpoint that is whole: name another run")
        return _with_base(path, CheckpointWeights(newest, which))

    # Before the search for safetensors, since a checkpoint's rank files have that suffix too.
    if (path / MANIFEST).exists():
        refuse_other_format(path)
        damage = Checkpoints(path.parent, CheckpointConfig()).damage(path)
        if not all_reduce_min(0 if damage else 1):
            reason = damage or "damaged, see the other ranks"
            raise UserError(f"{path}: {reason}: name another checkpoint, or the run")
        return _with_base(path.parent.parent, CheckpointWeights(path, which))
    files = [path] if path.suffix == ".safetensors" and path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{path}: no weights there: name a run's folder, a checkpoint, or exported safetensors"
        )
    return ExportedWeights(files)


def _with_base(run: Path, weights: CheckpointWeights) -> Mapping[str, Tensor]:
    """Add the frozen weights of a run whose checkpoints contain the trained ones alone."""
    return WithBase(weights, open_base(run)) if has_base(run) else weights
