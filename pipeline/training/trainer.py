"""The training loop, in a fixed order: report, validate, save, stop?, then one step and its moving averages.

Progress is counted in samples of the plan. Randomness comes from (seed, epoch, sample id), so a run that was stopped and
resumed repeats an uninterrupted one exactly.
"""

import json
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.dataset.schema import Bucket
from model.common.errors import UserError
from model.flops import flops_per_sample
from pipeline.checkpoint.checkpoints import Checkpoints, load_weights
from pipeline.data.loader import Batch, TrainingData
from pipeline.data.position import Position
from pipeline.diffusion.objective import corrupt, loss_per_sample
from pipeline.engine.engine import Engine
from pipeline.engine.network import build_network, network_sizes
from pipeline.engine.optim import learning_rate
from pipeline.runtime.console import TrainingProgress, log_line
from pipeline.runtime.distributed import Distributed
from pipeline.runtime.run_log import goodput, read_events
from pipeline.runtime.stopping import EXIT_AGAIN, Stop
from pipeline.runtime.watchdog import LEAVING, Heartbeat
from pipeline.stage.config import StageConfig, dump_stage
from pipeline.stage.corpus import latents_family, resolve
from pipeline.text.families import prepare_texts, text_families
from pipeline.training.gates import GateMeter
from pipeline.training.inputs import batch_texts, clean_latents
from pipeline.training.metrics import TIMESTEP_BINS, Interval, MetricsLog, RankSums, peak_flops, peak_memory_gb
from pipeline.training.previews import Previews
from pipeline.training.validation import FIXED_TIMESTEPS, losses_at_fixed_timesteps, mean_over_ranks


class Trainer:
    """One run of one stage, on every rank alike; `run` returns the process's exit code."""

    def __init__(self, stage: StageConfig, ranks: Distributed, stop: Stop, heartbeat: Heartbeat | None = None) -> None:
        self.begun = time.time()
        self.heartbeat = heartbeat or Heartbeat()
        self.ranks, self.stop = ranks, stop
        self.stage, self.corpus = resolve(stage)
        local_batch, left = divmod(stage.global_batch, ranks.world)
        if left:
            raise UserError(f"global_batch={stage.global_batch} is not a multiple of the {ranks.world} processes: change one")
        prepare_texts(self.stage, self.corpus, ranks)
        torch.manual_seed(stage.data.seed)
        self.engine = Engine(lambda: build_network(self.stage, self.corpus), self.stage, local_batch)
        self.data = TrainingData(self.stage, self.corpus, ranks.rank, ranks.world, self.engine.device)
        self.latents = latents_family(self.stage, self.corpus)
        self.sizes = network_sizes(self.stage, self.corpus)
        self.prefixes = [int(family.info["prefix_tokens"]) for family in text_families(self.stage, self.corpus).values()]

        run = stage.run
        run.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(run / "checkpoints", stage.checkpoint)
        self.log = MetricsLog(run, stage.log, dump_stage(self.stage), writes=ranks.rank == 0)
        self.peak = peak_flops(stage.log)
        self.gates = GateMeter(self.engine.module, stage.fusion.families)
        self.grid = Previews(self.stage, self.corpus, self.data.constants, self.engine) if stage.sample.every_samples else None

        # progress: all of it is kept in checkpoints
        self.step = 0
        self.samples = 0
        self.samples_at_start = 0
        self.samples_of_step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.seconds_in_steps = 0.0
        self.running_grad_norm: float | None = None
        self.position: Position | None = None
        self.interval = Interval()
        bins = [f"loss_t{index}" for index in range(TIMESTEP_BINS)]
        buckets = [f"loss_{bucket}" for bucket in sorted(self.corpus.rows)]
        self.sums = RankSums(["loss", *bins, *buckets, *self.gates.names], self.engine.device)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end of the stage, or until asked to stop.

        Returns:
            0 when the stage is finished, `EXIT_AGAIN` when a checkpoint was committed and the stage is not finished.

        Raises:
            UserError: too many steps in a row had non-finite gradients.
        """
        self.heartbeat.enter("resume", self.step)
        self._resume()
        if self.stage.model.compile:
            self._warm_up()
        progress = TrainingProgress(self.stage.name, self.samples, self.stage.samples, shows=self.ranks.rank == 0)
        batches = self.data.batches(self.position)
        try:
            while True:
                # once in a while: report
                if self.step % self.stage.log.every_steps == 0 and self.interval.counts:
                    self.heartbeat.enter("report", self.step)
                    self._report(progress)
                # once in a while: look at what the averaged weights can do
                self._evaluate()
                # once in a while: save; and always at the end
                finished = self.samples >= self.stage.samples
                stopping = not finished and self._agree_to_stop()
                if finished or stopping or self._due(self.stage.checkpoint.every_samples):
                    self._save(wait=finished or stopping)
                if finished or stopping:
                    return self._leave(finished)

                self.heartbeat.enter("commit", self.step)
                self.checkpoints.poll()

                # ---------------------------------------------------------------------------------- one training step
                begun = time.monotonic()
                self.heartbeat.enter("data", self.step)
                batch, self.position = next(batches)
                waited = time.monotonic() - begun
                self._train_step(batch)
                self.interval.add("data_wait", waited)
                self.interval.add("step_seconds", time.monotonic() - begun)
                self.seconds_in_steps += time.monotonic() - begun
                progress.update(self.samples)
        finally:
            progress.close()
            self.data.close()
            self.log.close()

    def _warm_up(self) -> None:
        """Compile the network for the batches of every bucket, so that no step waits for it."""
        dit, _ = self.sizes
        down = int(self.latents.info["downsampling"]) * dit.patch
        sizes = [(Bucket.parse(bucket), size // self.ranks.world) for bucket, size in self.data.batch_sizes.items()]
        begun = time.monotonic()
        for samples, patches in sorted({(samples, size.height // down * (size.width // down)) for size, samples in sizes}):
            self.heartbeat.enter("compile", self.step)
            self.engine.warm_up(samples, patches)
        self.log.event("compile", step=self.step, samples=self.samples, seconds=time.monotonic() - begun)

    def _train_step(self, batch: Batch) -> None:
        self.heartbeat.enter("forward and backward", self.step)
        clean = clean_latents(batch, self.latents)
        texts = batch_texts(batch, self.stage.fusion.families, self.data.constants, self.engine.dtype)
        self.gates.on = (self.step + 1) % self.stage.log.every_steps == 0
        noisy, timesteps, target = corrupt(self.stage.objective, clean, batch.noise, batch.u)
        for part in self.engine.micro_batches(len(clean)):
            prediction = self.engine(noisy[part].to(self.engine.dtype), timesteps[part], [text.rows(part) for text in texts])
            losses = loss_per_sample(prediction.float(), target[part])
            self.engine.backward(losses.mean())
            self._note(batch.bucket, losses.detach(), timesteps[part])
        self.gates.on = False

        self.heartbeat.enter("step", self.step)
        rate = learning_rate(self.stage.optim, self.samples, self.stage.samples)
        applied, norm = self.engine.step(rate, self._largest_norm())
        self.step += 1
        self.samples_of_step = len(clean) * self.ranks.world
        self.samples += self.samples_of_step
        if applied:
            self.skipped_in_a_row = 0
            self.engine.update_averages(self.samples)
            self.running_grad_norm = norm if self.running_grad_norm is None else 0.99 * self.running_grad_norm + 0.01 * norm
            self.interval.add("grad_norm", norm)
        else:
            self._skip(batch, norm)
        self.interval.add("lr", rate)
        caption_tokens = float(sum(text.lengths.float().mean() for text in batch.texts.values()))
        self.interval.add("caption_tokens", caption_tokens)
        self.interval.add("step_samples", self.samples_of_step)
        if self.peak is not None:
            self.interval.add("step_flops", self.samples_of_step * self._flops(batch.bucket, caption_tokens))

    def _note(self, bucket: str, losses: Tensor, timesteps: Tensor) -> None:
        """Add a micro-batch's losses [B] at its timesteps [B], and the gates where they were measured, to the sums."""
        self.sums.add("loss", losses)
        self.sums.add(f"loss_{bucket}", losses)
        self.sums.add_losses(losses, timesteps)
        for name, magnitude in self.gates.take():
            self.sums.add(name, magnitude)

    def _largest_norm(self) -> float:
        """Norm above which a step is a spike and is skipped."""
        spike = self.stage.optim.spike
        settled = self.samples >= self.stage.optim.warmup_samples and self.running_grad_norm is not None
        return (
            spike * self.running_grad_norm
            if spike is not None and settled and self.running_grad_norm is not None
            else float("inf")
        )

    def _skip(self, batch: Batch, norm: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.log.event("skipped", step=self.step, bucket=batch.bucket, epoch=batch.epoch, batch=batch.index, grad_norm=str(norm))
        if self.skipped_in_a_row > self.stage.optim.max_skipped_steps:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row up to step {self.step} had non-finite or spiking gradients: "
                f"lower optim.lr, or look at the batches named in {self.stage.run / 'metrics.jsonl'}"
            )

    # -- once in a while ------------------------------------------------------------------------------------------------

    def _due(self, every: int | None) -> bool:
        """Whether a multiple of `every` samples was passed by the last step, which this start has done."""
        before = self.samples - self.samples_of_step
        return bool(every) and self.samples > self.samples_at_start and self.samples // every > before // every

    def _collect(self) -> None:
        """Add the ranks' sums into the interval."""
        for name, (mean, count) in self.sums.take().items():
            self.interval.add(name, mean, count)

    def _report(self, progress: TrainingProgress) -> None:
        self._collect()
        values = self.interval.means()
        values["samples_per_second"] = values.pop("step_samples") / values["step_seconds"]
        values["data_wait_share"] = values.pop("data_wait") / values["step_seconds"]
        values["skipped"] = float(self.skipped)
        values["goodput"] = goodput(self.seconds_in_steps, self.first_start, time.time())
        if self.peak is not None:
            values["mfu"] = values.pop("step_flops") / values["step_seconds"] / (self.peak * self.ranks.world)
        values["memory_gb"] = peak_memory_gb()
        self.log.report(self.step, self.samples, values)
        progress.report(self.step, self.samples, values)

    def _flops(self, bucket: str, caption_tokens: float) -> float:
        """FLOPs of a sample, forward and backward, at the captions' mean length in all families together."""
        tokens = [prefix + int(caption_tokens / len(self.prefixes)) for prefix in self.prefixes]
        size, factor = Bucket.parse(bucket), int(self.latents.info["downsampling"])
        dit, widths = self.sizes
        rows, columns = size.height // factor, size.width // factor
        return flops_per_sample(dit, self.stage.fusion, widths, rows, columns, tokens, self.prefixes)

    def _evaluate(self) -> None:
        """What the averaged weights can do, each look at its own interval; all ranks together, and training is as before."""
        if self._due(self.stage.log.validate_every_samples):
            self.heartbeat.enter("validate", self.step)
            self._validate()
        if self.grid is not None and self._due(self.stage.sample.every_samples):
            self._draw(self.grid)

    def _draw(self, grid: Previews) -> None:
        self.heartbeat.enter("draw", self.step)
        begun = time.monotonic()
        with self.engine.averaged():
            drawn = grid.draw(self.engine)
        if drawn is not None:
            grid.save(drawn.picture, self.samples)
            self.log.image("samples", np.asarray(drawn.picture), self.samples)
            self.log.scores("scenes", self.step, self.samples, drawn.scores)
        self.log.event("grid", step=self.step, samples=self.samples, seconds=time.monotonic() - begun)

    def _validate(self) -> None:
        held_out = (
            (
                clean_latents(batch, self.latents),
                batch.noise,
                batch_texts(batch, self.stage.fusion.families, self.data.constants, self.engine.dtype),
            )
            for batch in (batch.to(self.engine.device) for batch in self.data.validation())
        )
        with self.engine.averaged():
            losses = mean_over_ranks(losses_at_fixed_timesteps(self.engine, held_out, self.stage.objective, self.engine.dtype))
        values = {f"validation_t{fixed:.4f}": float(loss) for fixed, loss in zip(FIXED_TIMESTEPS, losses, strict=True)}
        self.log.event("validation", step=self.step, samples=self.samples, loss=float(losses.mean()), **values)

    # -- stop, save, resume -----------------------------------------------------------------------------------------------

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop: all ranks get the same answer at the same step."""
        wanted = torch.tensor([float(self.stop.requested())], device=self.engine.device)
        if self.ranks.world > 1:
            dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return bool(wanted.item())

    def _state(self) -> dict[str, Any]:
        self._collect()
        return {
            "step": self.step,
            "samples": self.samples,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds_in_steps": self.seconds_in_steps,
            "usual_norm": self.running_grad_norm,
            "position": None if self.position is None else self.position.to_dict(),
            "interval": self.interval.state(),
            "stage": asdict(self.stage),
        }

    def _save(self, wait: bool) -> None:
        self.heartbeat.enter("save", self.step)
        begun = time.monotonic()
        self.checkpoints.save(self.engine, self._state(), self.samples, self.step, wait=wait)
        self.interval.add("checkpoint_stall", time.monotonic() - begun)  # seconds a save
        self.log.event("save", step=self.step, samples=self.samples, seconds=time.monotonic() - begun)

    def _resume(self) -> None:
        """Go on from the newest good checkpoint; else start, from an earlier stage's weights where the stage says so."""
        run = self.stage.run
        newest = self.checkpoints.newest()
        if newest is not None:
            state = self.checkpoints.load(self.engine, newest)
            self.step, self.samples = state["step"], state["samples"]
            self.samples_at_start = self.samples
            self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
            self.seconds_in_steps, self.running_grad_norm = state["seconds_in_steps"], state["usual_norm"]
            self.position = None if state["position"] is None else Position.from_dict(state["position"])
            self.interval.load(state["interval"])
        elif self.stage.start_from:
            weights = load_weights(self.stage.start_from, self.stage.start_weights)
            self.engine.load_full(weights, new_branches=True)
        if self.ranks.rank == 0:
            (run / "stage.yaml").write_text(dump_stage(self.stage))
        starts = read_events(run, "start")
        self.first_start = starts[0]["time"] if starts else self.begun
        how = f"resumed from {newest.name}" if newest is not None else f"started from {self.stage.start_from or 'fresh weights'}"
        self.log.event("start", step=self.step, samples=self.samples, world=self.ranks.world, how=how, snapshot=self.corpus.id)
        if self.ranks.rank == 0:
            log_line(f"{self.stage.name}: {how}, {self.samples:,} of {self.stage.samples:,} samples, {self.ranks.world} processes")

    def _leave(self, finished: bool) -> int:
        self.heartbeat.enter(LEAVING, self.step)
        self.checkpoints.close()
        reason = "finished" if finished else self.stop.reason or "asked to stop on another rank"
        self.log.event("stop", step=self.step, samples=self.samples, reason=reason)
        if self.ranks.rank == 0:
            if finished:
                record = {"step": self.step, "samples": self.samples, "time": time.time()}
                (self.stage.run / "finished.json").write_text(json.dumps(record))
            log_line(f"{self.stage.name}: {reason} at step {self.step}, checkpoint saved in {self.stage.run / 'checkpoints'}")
        return 0 if finished else EXIT_AGAIN
