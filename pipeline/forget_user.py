"""Delete a user's embedding from a run: `python -m pipeline.forget_user RUN NUMBER`.

The row becomes zero in every checkpoint of the run: weights, moments and averages. `forgotten.json` in the
run keeps the number, so that the run, and stages that start from it, do not learn the row again from a
snapshot that still has the user.

The name and the list of the user's images are in the dataset: `python -m data_prep users DATASET.yaml
--forget NAME` deletes them and prints the number. Copies elsewhere (uploads, exports, files of single users)
are not touched.
"""

import argparse
from pathlib import Path

from model.adapter import ADAPTERS_PREFIX
from model.common.errors import UserError, command
from pipeline.checkpoint.forget import forget_row
from pipeline.runtime.run_lock import lock_run
from pipeline.stage.config import load_run
from pipeline.stage.forgotten import add_forgotten

TABLE = f"{ADAPTERS_PREFIX}users.table.weight"


def forget_user(run: Path, number: int) -> list[str]:
    """Delete the row of user `number` from all checkpoints of a run, for good, and return their names.

    Raises:
        UserError: if the run has no checkpoints, no users, or no such user.
    """
    count = load_run(run).users.count
    if not count:
        raise UserError(f"{run} has no users: name the folder of a run that trained some")
    if not 0 <= number < count:
        raise UserError(f"{run}: no user {number}, it has 0 to {count - 1}: correct the number")
    folders = sorted((run / "checkpoints").glob("step_*"))
    if not folders:
        raise UserError(f"{run} has no checkpoints: name another run")
    # First, so that a kill leaves no row that is zero and would be learned again.
    add_forgotten(run, [number])
    for folder in folders:
        forget_row(folder, TABLE, number)
    return [folder.name for folder in folders]


@command
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.forget_user", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("number", type=int, metavar="NUMBER", help="number of the user")
    arguments = parser.parse_args()
    # Training would write the row again.
    lock_run(arguments.run)
    names = forget_user(arguments.run, arguments.number)
    print(
        f"{arguments.run}: the row of user {arguments.number} is zero in {', '.join(names)}; copies "
        "elsewhere (uploads, exports, files of single users) are yours to delete"
    )


if __name__ == "__main__":
    main()
