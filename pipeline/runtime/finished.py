"""The file that says how far a finished run has trained."""

import json
import time
from pathlib import Path

from model.common.files import naming_full_disk, write_atomic

FINISHED = "finished.json"


def is_finished(run: Path, samples: int) -> bool:
    """True if a run is finished; one that was finished with fewer samples than are asked for now goes on.

    Args:
        run: the run's folder.
        samples: length of the stage.
    """
    path = run / FINISHED
    # The record counts whole batches, so it may have more samples than the stage asked for.
    return path.exists() and samples <= json.loads(path.read_bytes()).get("samples", samples)


def mark_finished(run: Path, step: int, samples: int) -> None:
    """Record that a run is finished after `step` steps and `samples` samples."""
    with naming_full_disk(run):
        write_atomic(run / FINISHED, json.dumps({"step": step, "samples": samples, "time": time.time()}))
