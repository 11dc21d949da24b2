"""The training loop, in a fixed order: report, callbacks, save, stop?, then one step and its moving averages.

Progress is counted in samples of the plan. Randomness comes from (seed, epoch, sample id), so a run that was
stopped and resumed repeats an uninterrupted one exactly.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from model.common.errors import UserError
from model.fusion import prefixes_cut_late
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.checkpoint.room import warn_of_little_room
from pipeline.data.ahead import batches_ahead
from pipeline.data.batch import Batch
from pipeline.data.dataset import latent_shape
from pipeline.data.loader import TrainingData
from pipeline.engine.engine import Engine
from pipeline.engine.network import build_network, network_sizes
from pipeline.engine.optim import learning_rate
from pipeline.runtime.console import TrainingProgress, log_line
from pipeline.runtime.distributed import Distributed
from pipeline.runtime.finished import mark_finished
from pipeline.runtime.run_log import elapsed_seconds, goodput, read_lines
from pipeline.runtime.stopping import EXIT_AGAIN, Stop
from pipeline.runtime.watchdog import LEAVING, Heartbeat
from pipeline.stage.config import StageConfig, dump_stage
from pipeline.stage.corpus import is_clip, latents_family, resolve
from pipeline.text.families import prepare_texts, text_families
from pipeline.training.agreement import Agreement
from pipeline.training.callbacks import Callback
from pipeline.training.elastic import ElasticPasses
from pipeline.training.elastic_validation import ElasticValidation
from pipeline.training.gates import GateStats
from pipeline.training.inputs import NetworkInputs
from pipeline.training.metrics import TIMESTEP_BINS, MetricsLog, RankSums, peak_flops, peak_memory_gb
from pipeline.training.mfu import SampleFlops
from pipeline.training.passes import Passes
from pipeline.training.patch_validation import PatchValidation
from pipeline.training.previews import Previews
from pipeline.training.resume import changed_settings, record_stage, refuse_fresh_weights
from pipeline.training.start import resume_network, start_network
from pipeline.training.state import TrainState
from pipeline.training.users import UserDispersion
from pipeline.training.validation import Validation


class Trainer:
    """One run of one stage, on every rank alike; `run` returns the process's exit code."""

    def __init__(
        self,
        stage: StageConfig,
        ranks: Distributed,
        stop: Stop,
        heartbeat: Heartbeat | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Build the network and open the data.

        Args:
            stage: what to train.
            ranks: this process's place among the ranks.
            stop: asked between steps whether to stop.
            heartbeat: records each phase of the loop.
            callbacks: called after those of the stage.

        Raises:
            UserError: if the stage does not fit its store or the number of processes.
        """
        self.began = time.monotonic()
        self.heartbeat = heartbeat or Heartbeat()
        self.ranks, self.stop = ranks, stop
        self.stage, self.corpus = resolve(stage)
        local_batch, left = divmod(stage.global_batch, ranks.world)
        if left:
            raise UserError(
                f"global_batch={stage.global_batch} is not a multiple of the {ranks.world} processes: "
                "change one"
            )
        prepare_texts(self.stage, self.corpus, ranks)
        self.sizes, _ = network_sizes(self.stage, self.corpus)

        torch.manual_seed(stage.data.seed)
        self.engine = Engine(lambda: build_network(self.stage, self.corpus), self.stage, local_batch)
        self.data = TrainingData(self.stage, self.corpus, ranks.rank, ranks.world, self.engine.device)
        self.inputs = NetworkInputs(self.stage, self.corpus, self.data.constants, self.engine.dtype)
        self.latents = latents_family(self.stage, self.corpus)
        make_passes = ElasticPasses if stage.elastic.elastic else Passes
        self.passes = make_passes(self.stage, self.sizes, self.engine, self.inputs)
        self.objective = self.passes.objective
        self.grids = {
            bucket: self.passes.grids(latent_shape(self.latents, bucket)[1:]) for bucket in self.corpus.rows
        }

        stage.run.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(stage.run / "checkpoints", stage.checkpoint)
        self.peak = peak_flops(stage.log)
        texts = {clips: text_families(self.stage, self.corpus, clips).values() for clips in (False, True)}
        self.flops = SampleFlops(self.sizes, stage, self.latents, texts, self.corpus.rows)

        validation = ElasticValidation() if stage.elastic.elastic else Validation()
        self.callbacks: list[Callback] = [GateStats(self.engine.module, stage.fusion.families), validation]
        if stage.objective.patch_times.kind != "shared" or stage.objective.difficulty:
            self.callbacks.append(PatchValidation())
        if stage.users.count and stage.users.dispersion:
            self.callbacks.append(UserDispersion(stage.users.dispersion))
        if stage.sample.every_samples:
            self.callbacks.append(Previews(self.stage, self.corpus, self.data.constants, self.engine))
        self.callbacks += callbacks

        self.stops = Agreement(self.engine.device, ranks.world)
        self.state = TrainState()
        self.samples_at_start = 0
        self.samples_of_step = 0
        self.save_is_due = False
        """A periodic save waits for a step that is applied."""
        bins = [f"loss_t{index}" for index in range(TIMESTEP_BINS)]
        buckets = [f"loss_{bucket}" for bucket in sorted(self.corpus.rows)]
        added = [name for callback in self.callbacks for name in callback.quantities()]
        added += self.passes.quantities(buckets)
        self.sums = RankSums(["loss", "caption_tokens", *bins, *buckets, *added], self.engine.device)

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end of the stage, or until asked to stop.

        Returns:
            0 if the stage is finished, `EXIT_AGAIN` if it is not and a checkpoint was committed.

        Raises:
            UserError: if too many steps in a row had non-finite gradients.
        """
        self.heartbeat.enter("resume", self.state.step)
        self._resume()
        warn_of_little_room(self.checkpoints, self.engine, self.state.samples, self.stage.samples)
        if self.stage.model.compile:
            self.warm_up()
        for callback in self.callbacks:
            callback.on_train_start(self)

        shows = self.ranks.rank == 0
        progress = TrainingProgress(self.stage.name, self.state.samples, self.stage.samples, shows=shows)
        batches = batches_ahead(self.data, self.state.position)
        try:
            while True:
                # between steps: report, callbacks, and save, always at the end
                finished = self.state.samples >= self.stage.samples
                reports = finished or self.state.step % self.stage.log.every_steps == 0
                if reports and self.state.interval.counts:
                    self.heartbeat.enter("report", self.state.step)
                    self._report(progress)
                for callback in self.callbacks:
                    callback.between_steps(self)
                stopping = not finished and self.stops.ask(self.stop.requested())
                if finished or stopping or self._saves_now():
                    self._save(wait=finished or stopping)
                if finished or stopping:
                    return self._end(finished)

                self.heartbeat.enter("commit", self.state.step)
                self.checkpoints.poll()

                # one training step
                began = time.monotonic()
                self.heartbeat.enter("data", self.state.step)
                # This position is only saved after the step: a resumed run never repeats or skips a batch.
                batch, self.state.position = next(batches)
                self._train_step(batch, batches.fetch)
                seconds = time.monotonic() - began
                self.state.interval.add("data_wait", batches.waited())
                self.state.interval.add("step_seconds", seconds)
                if part := self.passes.part(batch):
                    self.state.interval.add(f"step_seconds_{part}", seconds)
                self.state.seconds_in_steps += seconds
                progress.update(self.state.samples)
        finally:
            progress.close()
            self.data.close()
            self.log.close()

    def warm_up(self) -> None:
        """Compile the network for the batches of every bucket, so that no step waits for it."""
        shapes: set[tuple[int, tuple[int, ...], bool]] = set()
        for bucket, size in self.data.schedule.batch_sizes.items():
            shapes |= {(size // self.ranks.world, grid, is_clip(bucket)) for grid in self.grids[bucket]}

        began = time.monotonic()
        for samples, grid, clips in sorted(shapes):
            self.heartbeat.enter("compile", self.state.step)
            prefixes, longest = self.flops.prefixes[clips], self.flops.longest[clips]
            cuts = prefixes_cut_late(self.stage.fusion, prefixes)
            self.engine.warm_up(samples, grid, cuts, self.inputs.text_lengths(longest, prefixes))
        self.log_event("compile", seconds=time.monotonic() - began)

    def _train_step(self, batch: Batch, fetch_next: Callable[[], None] = lambda: None) -> None:
        """Train on a batch; `fetch_next` fetches the next one."""
        self.heartbeat.enter("forward and backward", self.state.step)
        for callback in self.callbacks:
            callback.before_step(self, batch)
        self.sums.add("caption_tokens", torch.stack([text.lengths for text in batch.texts.values()]).sum(0))

        self.passes.run(batch, self._add_losses)
        # Before the step, whose norm the host waits for: the device still has the passes to do.
        if self.state.samples + len(batch.u) * self.ranks.world < self.stage.samples:
            self.heartbeat.enter("data", self.state.step)
            fetch_next()

        self.heartbeat.enter("step", self.state.step)
        rate = learning_rate(self.stage.optim, self.state.samples, self.stage.samples)
        part = self.passes.part(batch)
        applied, norm = self.engine.step(rate, self.state.max_norm(self.stage.optim, part))
        self.state.step += 1
        self.samples_of_step = len(batch.u) * self.ranks.world
        self.state.samples += self.samples_of_step

        if applied:
            self.engine.update_averages(self.state.samples)
            self.state.add_applied(norm, part)
        else:
            self._skipped(batch, norm)
        self.state.interval.add("lr", rate)
        self.state.interval.add("step_samples", self.samples_of_step)
        for callback in self.callbacks:
            callback.after_step(self, batch)

    def _skipped(self, batch: Batch, norm: float) -> None:
        """Count and log a step that was not applied.

        Raises:
            UserError: if there were too many in a row.
        """
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        where = {"bucket": batch.bucket, "epoch": batch.epoch, "batch": batch.index}
        self.log.event("skipped", step=state.step, **where, grad_norm=str(norm))
        if state.skipped_in_a_row > self.stage.optim.max_skipped_steps:
            raise UserError(
                f"{state.skipped_in_a_row} steps in a row up to step {state.step} had non-finite or "
                "spiking gradients: "
                f"lower optim.lr, or look at the batches named in {self.stage.run / 'metrics.jsonl'}"
            )

    def _add_losses(self, batch: Batch, losses: Tensor, timesteps: Tensor, part: str) -> None:
        """Add a micro-batch's losses [B] at its timesteps, of a part of the network or the whole, to the
        sums."""
        self.sums.add("loss", losses)
        self.sums.add(f"loss_{batch.bucket}", losses)
        if part:
            self.sums.add(f"loss_{part}", losses)
            self.sums.add(f"loss_{batch.bucket}_{part}", losses)
        self.sums.add_losses(losses, timesteps)
        for callback in self.callbacks:
            callback.after_micro_batch(self, batch, losses, timesteps)

    # -- between steps ---------------------------------------------------------------------------------------

    def due(self, every: int | None) -> bool:
        """Return True if the last step, which this start has done, passed a multiple of `every` samples."""
        samples = self.state.samples
        before = samples - self.samples_of_step
        return bool(every) and samples > self.samples_at_start and samples // every > before // every

    def log_event(self, name: str, **fields: Any) -> None:
        """Write an event of this step into the run's metrics."""
        self.log.event(name, step=self.state.step, samples=self.state.samples, **fields)

    def _collect(self) -> None:
        """Add the ranks' sums into the interval."""
        for name, (mean, count) in self.sums.take().items():
            self.state.interval.add(name, mean, count)

    def _report(self, progress: TrainingProgress) -> None:
        self._collect()
        state = self.state
        counts = state.interval.counts
        values = state.interval.means()
        seconds, elapsed = values["step_seconds"], self.seconds_before + time.monotonic() - self.began
        values["samples_per_second"] = values.pop("step_samples") / seconds
        values["data_wait_share"] = values.pop("data_wait") / seconds
        values["skipped"] = float(state.skipped)
        values["goodput"] = goodput(state.seconds_in_steps, elapsed)
        if self.peak is not None:
            values |= self.flops.mfu(counts, values, self.peak * self.ranks.world)
        values["memory_gb"] = peak_memory_gb()
        self.log.report(state.step, state.samples, values)
        progress.report(state.step, state.samples, values)

    # -- stop, save, resume ----------------------------------------------------------------------------------

    def _saves_now(self) -> bool:
        """Return True if a periodic save is due, and the last step was applied."""
        # While all steps are skipped, checkpoints would push out those from before the fault.
        self.save_is_due |= self.due(self.stage.checkpoint.every_samples)
        return self.save_is_due and self.state.skipped_in_a_row == 0

    def _save(self, wait: bool) -> None:
        state, began = self.state, time.monotonic()
        self.save_is_due = False
        self.heartbeat.enter("save", state.step)
        self._collect()
        record = {**state.to_dict(), "stage": asdict(self.stage)}
        self.checkpoints.save(self.engine, record, state.samples, state.step, wait=wait)
        state.interval.add("checkpoint_stall", time.monotonic() - began)  # seconds per save
        self.log_event("save", seconds=time.monotonic() - began)

    def _resume(self) -> None:
        """Continue from the newest good checkpoint; else start, from an earlier stage's weights if the stage
        names one."""
        run = self.stage.run
        newest = self.checkpoints.newest()
        if newest is not None:
            record = resume_network(self.checkpoints, self.engine, newest)
            changed = changed_settings(newest, record["stage"], self.stage)
            self.state = TrainState.from_dict(record)
            self.samples_at_start = self.state.samples
            how = f"resumed from {newest.name}{changed and ' with '}{changed}"
        else:
            refuse_fresh_weights(run)
            if self.stage.start_from:
                start_network(self.stage, self.sizes, self.engine)
            how = f"started from {self.stage.start_from or 'fresh weights'}"

        yaml, writes = dump_stage(self.stage), self.ranks.rank == 0
        self.seconds_before = elapsed_seconds(read_lines(run), time.time() - (time.monotonic() - self.began))
        self.log = MetricsLog(run, self.stage.log, yaml, self.state.samples, writes)
        self.log_event("start", world=self.ranks.world, how=how, snapshot=self.corpus.id)
        if writes:
            record_stage(self.stage)
            done, total = f"{self.state.samples:,}", f"{self.stage.samples:,}"
            log_line(f"{self.stage.name}: {how}, {done} of {total} samples, {self.ranks.world} processes")

    def _end(self, finished: bool) -> int:
        """Wait for the last checkpoint and write how the run ended; returns the exit code."""
        state = self.state
        self.heartbeat.enter(LEAVING, state.step)
        self.checkpoints.close()
        reason = "finished" if finished else self.stop.reason or "asked to stop on another rank"
        self.log_event("stop", reason=reason)
        if self.ranks.rank == 0:
            if finished:
                mark_finished(self.stage.run, state.step, state.samples)
            saved = self.stage.run / "checkpoints"
            log_line(f"{self.stage.name}: {reason} at step {state.step}, checkpoint saved in {saved}")
        return 0 if finished else EXIT_AGAIN
