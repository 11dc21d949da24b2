"""The file that says how far a finished run has trained."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from model.common.files import naming_full_disk, write_atomic
from model.common.records import read_record

FINISHED = "finished.json"


@dataclass
class Finished:
    """Content of the file."""

    step: int = 0
    samples: int | None = None
    time: float = 0.0


def is_finished(run: Path, samples: int) -> bool:
    """True if a run is finished; one that was finished with fewer samples than are asked for now goes on.

    Args:
        run: the run's folder.
        samples: length of the stage.
    """
    path = run / FINISHED
    # The record counts whole batches, so it may have more samples than the stage asked for.
    try:
        trained = read_record(path, Finished, "remove it if the stage is not finished").samples
    except FileNotFoundError:
        return False
    return trained is None or samples <= trained


def mark_finished(run: Path, step: int, samples: int) -> None:
    """Record that a run is finished after `step` steps and `samples` samples."""
    with naming_full_disk(run):
        write_atomic(run / FINISHED, json.dumps(asdict(Finished(step, samples, time.time()))))
