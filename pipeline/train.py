"""Train a stage: one process per GPU, started by srun, torchrun, or alone.

    python -m pipeline.train demo --dry-run
    python -m pipeline.train demo optim.lr=2e-4
    torchrun --standalone --nproc-per-node 8 -m pipeline.train li_dit_1b_256 data.store=s3://bucket/prefix
    sbatch cluster/train.sh li_dit_1b_256

Exit codes:
    0   the stage is finished
    85  a checkpoint was committed and the stage is to be started again: after SIGUSR1, SIGTERM,
        a `stop` file in the run's folder, or --minutes
    2   an error that the user can fix, printed in one line
    1   a crash

An error on one rank ends all ranks within seconds. A rank that hangs is named, with its phase
(pipeline/runtime/watchdog.py).
"""

from pipeline.runtime.stopping import STOP_FILE, Stop, refuse_stop_file

STOP = Stop()
if __name__ == "__main__":
    STOP.install()  # importing torch takes seconds, and a signal in that time must not be lost

import argparse

from model.common.errors import command
from model.common.extras import require

if __name__ == "__main__":
    command(require)("train", "deepspeed")  # before the modules below, which import it

from pipeline.engine.network import network_sizes
from pipeline.engine.processes import exit_process, join_process_group
from pipeline.engine.settings import check_settings
from pipeline.runtime.finished import is_finished
from pipeline.runtime.run_lock import lock_run
from pipeline.runtime.watchdog import Heartbeat, Watchdog
from pipeline.stage.config import StageConfig, check_start_from, dump_stage, load_stage
from pipeline.stage.corpus import check_files, resolve
from pipeline.training.trainer import Trainer

STUCK_SHARE = 0.9
"""Share of the collectives' timeout after which the watchdog names ranks that hang."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("stage", help="name of a shipped stage, or path of a YAML")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that override the stage's, such as optim.lr=2e-4",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print the resolved stage, check it against its store, and exit",
    )
    add("--minutes", type=float, help="save and exit with code 85 after this many minutes")
    return parser.parse_intermixed_args(arguments)


def dry_run(stage: StageConfig) -> None:
    """Print the resolved stage, and check it against its store.

    Raises:
        UserError: if the stage and the store do not match.
    """
    check_start_from(stage)
    resolved, corpus = resolve(stage)
    dit, widths = network_sizes(resolved, corpus)
    print(dump_stage(resolved))
    check_files(resolved, corpus)
    rows = sum(corpus.rows.values())
    print(f"# {corpus}: {rows:,} pairs in {len(corpus.rows)} buckets; LLM widths {widths}; DiT {dit}")


@command
def main() -> None:
    """Run the command line."""
    arguments = parse()
    stage = load_stage(arguments.stage, arguments.overrides)
    check_settings(stage)

    # before the process group is joined, so that one process on a login node can do it
    if arguments.dry_run:
        dry_run(stage)
        return

    # exit code 0, not an error: jobs that were queued in advance may start after the stage is finished
    if is_finished(stage.run, stage.samples):
        print(
            f"{stage.name}: already finished, see {stage.run}; give name=... to train it again, or more "
            "samples=... to go on"
        )
        return

    STOP.watch(stage.run / STOP_FILE, arguments.minutes)
    ranks = join_process_group(stage.engine.timeout_minutes)
    heartbeat = Heartbeat()
    # below the collectives' own timeout, whose message would not say which rank hangs
    watchdog = Watchdog(ranks, heartbeat, STUCK_SHARE * 60 * stage.engine.timeout_minutes)
    try:
        if ranks.rank == 0:
            lock_run(stage.run)
            refuse_stop_file(stage.run)
        code = Trainer(stage, ranks, STOP, heartbeat).run()
    # KeyboardInterrupt and SystemExit too: the peers would wait for this rank until the timeout
    except BaseException as error:
        watchdog.fail(error)
    watchdog.close()
    exit_process(code)


if __name__ == "__main__":
    main()
