"""A `python -m data_prep` and `python -m pipeline.sample` that only keep a record of who did what."""

import json
import os
import sys
import time
from pathlib import Path

from model.common.share import Share

TASKS = int(os.environ.get("FAKE_TASKS", "3"))

module, *words = sys.argv[1:]
record = Path(os.environ["FAKE_RECORD"])
share = Share.from_environment()
with (record / "done.jsonl").open("a") as file:
    file.write(
        json.dumps({"command": [module, *words], "share": [share.index, share.count], "time": time.time()})
        + "\n"
    )
if module == "data_prep" and words[0] in ("plan", "text"):
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    (record / f"{words[0]}.{share.index}").touch()
waiting = [str(index) for index in range(TASKS) if not (record / f"plan.{index}").exists()]
if words[0] == "plan" and waiting:
    print(
        f"plan: {len(waiting)} of {TASKS} source files are not scanned yet (tasks {', '.join(waiting)}); the "
        "last task to scan finishes the plan"
    )
if words[0] == "snapshot" and (
    left := [str(index) for index in range(TASKS) if not (record / f"text.{index}").exists()]
):
    print(
        f"error: text: `LI_DIT_TASKS={TASKS} sbatch --array={','.join(left)} cluster/encode.sh {words[1]}`",
        file=sys.stderr,
    )
    sys.exit(2)
