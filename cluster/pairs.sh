#!/bin/bash
#SBATCH --job-name=shard
#SBATCH --output=cluster/logs/%x-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Make a dataset's pairs with an array of tasks.
usage() {
  cat <<'HELP'
usage: sbatch --array=0-63%16 [sbatch options] cluster/pairs.sh [--plan] DATASET.yaml [key=value ...]
       cluster/pairs.sh [sbatch options] DATASET.yaml [key=value ...]

Each task runs `python -m data_prep plan` and then `python -m data_prep pairs` for its share; --plan: only the first. A task that has
done its share of the plan while others have not leaves its place to them and queues itself again. The second form submits the plan
and, when it is done, the pairs, with SHARD_OPTIONS of cluster/env.sh. %16 = at most 16 tasks at a time.

Tasks may be killed and run again at any time: what is committed stays. The snapshot (cluster/encode.sh) names what is missing.
HELP
}

[ -f cluster/jobs.sh ] || { echo "error: no cluster/jobs.sh in $PWD: type this in the project's folder" >&2; exit 2; }
. cluster/jobs.sh
open_script "$@"

if by_hand; then
  read_dataset cluster/pairs.sh "run python -m data_prep plan, then python -m data_prep pairs" "$@"
  plan=$(submit --job-name=plan "${SHARD_OPTIONS[@]}" "${OPTIONS[@]}" cluster/pairs.sh --plan "${ARGUMENTS[@]}")
  [ -n "$plan" ] || exit 2
  pairs=$(submit --job-name=pairs --dependency="afterok:$plan" --kill-on-invalid-dep=yes "${SHARD_OPTIONS[@]}" "${OPTIONS[@]}" \
    cluster/pairs.sh "${ARGUMENTS[@]}")
  echo "plan $plan"
  echo "pairs $pairs"
  exit 0
fi

ONLY_PLAN=''
if [ "$1" = --plan ]; then ONLY_PLAN=1; shift; fi
said=$(mktemp)
tail -q -n +1 -s 0.2 -F "$said" &
TAIL=$!
trap 'sleep 0.3; kill "$TAIL"; rm "$said"' EXIT
array_step plan "$@" > "$said"
if [ -n "$ONLY_PLAN" ]; then exit 0; fi
if grep -q 'not scanned yet' "$said"; then
  echo "== the plan waits for other tasks: queued again"
  requeue_task
fi
array_step pairs "$@"
