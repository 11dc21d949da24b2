#!/bin/bash
# Submit stages that run one after the other.
usage() {
  cat <<'HELP'
usage: cluster/stages.sh [sbatch options] STAGE STAGE ... [key=value ...]

Submits a training job for each stage (see cluster/train.sh). Each stage waits until the one before it is finished, and
starts from its weights (start_from=; start_weights=ema or raw in the stage's YAML). If a stage fails, the stages after
it are canceled. Settings and sbatch options apply to all stages. Run the same command again to continue where it
stopped: finished stages are skipped.
HELP
}

[ -f cluster/jobs.sh ] || { echo "error: no cluster/jobs.sh in $PWD: run this in the project's folder" >&2; exit 2; }
. cluster/jobs.sh
open_script "$@"
need_slurm "run python -m pipeline.train for one stage after the other"
split_arguments "$@"
split_stages "${ARGUMENTS[@]}"
[ ${#STAGES[@]} -gt 0 ] || fail "no stage named; see cluster/stages.sh --help"
check_stages ''
print_job JOB WHAT AFTER
submit_stages ''
