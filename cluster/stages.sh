#!/bin/bash
# Submit stages that follow one another.
usage() {
  cat <<'HELP'
usage: cluster/stages.sh [sbatch options] STAGE STAGE ... [key=value ...]

Submits a training job for each stage (see cluster/train.sh). Each waits until the one before it is finished and starts from its
weights (start_from=; start_weights=ema or raw in the stage's YAML); if one fails, those after it are cancelled. Settings and sbatch
options go to all stages. The same command again goes on where it stopped: finished stages are passed over.
HELP
}

[ -f cluster/jobs.sh ] || { echo "error: no cluster/jobs.sh in $PWD: type this in the project's folder" >&2; exit 2; }
. cluster/jobs.sh
open_script "$@"
need_slurm "run python -m pipeline.train for one stage after the other"
split_arguments "$@"
split_stages "${ARGUMENTS[@]}"
[ ${#STAGES[@]} -gt 0 ] || fail "no stage named; see cluster/stages.sh --help"
check_stages ''
say_job JOB WHAT AFTER
submit_stages ''
