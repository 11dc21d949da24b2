"""A trainer that only sleeps, with the real one's contract: signals, exit codes, metrics, checkpoints,
finished.json.

Ranks meet at every step through files; a rank that does not come holds up the others, as a collective does.
FAKE_CRASH=RANK:STEP makes a rank raise there, FAKE_STEP sets the seconds of a step.
"""

import json
import os
import sys
import time
from pathlib import Path

from pipeline.runtime.stopping import EXIT_AGAIN, Stop

STOP = Stop().install()

from pipeline.stage.config import load_stage  # noqa: E402


def main():
    stage = load_stage(sys.argv[1], sys.argv[2:])
    run, rank, world = stage.run, int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    assert os.environ["MASTER_ADDR"]
    assert int(os.environ["MASTER_PORT"]) > 1024
    STOP.watch(run / "stop", None)
    attempt = os.environ["SLURM_JOB_ID"] + "." + os.environ.get("SLURM_RESTART_COUNT", "0")
    meeting = run / "meeting" / attempt
    meeting.mkdir(parents=True, exist_ok=True)
    print(f"rank {rank} of {world} on {os.environ['SLURMD_NODENAME']}", flush=True)
    crash = [int(number) for number in os.environ.get("FAKE_CRASH", "-1:-1").split(":")]

    def meet(step):
        """Whether any rank wants to stop; returns when all have come to this step."""
        mark = "stop" if STOP.requested() else "go"
        (meeting / f"{step}.{rank}.part").write_text(mark)
        (meeting / f"{step}.{rank}.part").rename(meeting / f"{step}.{rank}")
        while len(marks := [path for path in meeting.glob(f"{step}.*") if path.suffix != ".part"]) < world:
            time.sleep(0.005)
        return any(path.read_text() == "stop" for path in marks)

    saved = sorted((run / "checkpoints").glob("step_*"))
    step = int(saved[-1].name[5:]) if saved else 0
    total = stage.samples // stage.global_batch
    every = stage.checkpoint.every_samples // stage.global_batch
    log = (run / "metrics.jsonl" if rank == 0 else Path(os.devnull)).open("a", buffering=1)
    log.write(json.dumps({"event": "start", "time": time.time(), "step": step}) + "\n")
    while True:
        if [rank, step] == crash:
            raise ValueError("a made-up fault")
        stopping = meet(step)
        if stopping or step == total or (step and step % every == 0):
            if rank == 0:
                folder = run / "checkpoints" / f"step_{step:09d}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "manifest.json").write_text("{}")
            log.write(json.dumps({"event": "save", "time": time.time(), "step": step}) + "\n")
        if step == total:
            (run / "finished.json").write_text("{}")
            sys.exit(0)
        if stopping:
            log.write(
                json.dumps(
                    {"event": "stop", "time": time.time(), "step": step, "reason": STOP.reason or "other"}
                )
                + "\n"
            )
            sys.exit(EXIT_AGAIN)
        time.sleep(float(os.environ.get("FAKE_STEP", "0.05")))
        step += 1
        loss = 1 / step
        row = {
            "step": step,
            "samples": step * stage.global_batch,
            "time": time.time(),
            "loss": loss,
            "samples_per_second": 80.0,
        }
        log.write(json.dumps(row) + "\n")


main()
