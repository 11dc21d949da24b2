#!/bin/bash
#SBATCH --job-name=run
#SBATCH --output=cluster/logs/%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
# Run one of the project's commands as a job.
usage() {
  cat <<'HELP'
usage: sbatch [sbatch options] cluster/run.sh MODULE [arguments ...]

Runs `python -m MODULE arguments` with the settings of cluster/env.sh, for example
  sbatch cluster/run.sh data_prep snapshot DATASET.yaml
  sbatch --gpus-per-node=1 cluster/run.sh pipeline.sample runs/li_dit_1b_256 --prompts prompts.txt
HELP
}

[ -f cluster/jobs.sh ] || { echo "error: no cluster/jobs.sh in $PWD: run this in the project's folder" >&2; exit 2; }
. cluster/jobs.sh
open_script "$@"
by_hand && fail "this is a job: sbatch cluster/run.sh $*"
exec "$PYTHON" -m "$@"
