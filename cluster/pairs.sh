#!/bin/bash
#SBATCH --job-name=pairs
#SBATCH --output=cluster/logs/%x-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Write a dataset's pairs, in an array of tasks.
usage() {
  cat <<'HELP'
usage: sbatch --array=0-63%16 [sbatch options] cluster/pairs.sh [--plan|--annotate] DATASET.yaml [key=value ...]
       cluster/pairs.sh [sbatch options] DATASET.yaml [key=value ...]

Each task runs `python -m data_prep plan` and then `python -m data_prep pairs` for its share; with --plan, only the
first, with --annotate, `annotate` instead. A task that finishes its share of the plan before the other tasks queues itself again, to make room for them, and ends with an error that names
those that are no longer queued.
The second form submits the plan and, after it, the pairs, with SHARD_OPTIONS of cluster/env.sh; between them, if the
dataset has `annotations`, `annotate` with ENCODE_OPTIONS. %16 = at most 16 tasks at a time.

Tasks may be killed and run again at any time: committed parts are kept. The snapshot (cluster/encode.sh) reports what
is missing.
HELP
}

[ -f cluster/jobs.sh ] || { echo "error: no cluster/jobs.sh in $PWD: run this in the project's folder" >&2; exit 2; }
. cluster/jobs.sh
open_script "$@"

if by_hand; then
  read_dataset cluster/pairs.sh "run python -m data_prep plan, then python -m data_prep pairs" "$@"
  plan=$(submit --job-name=plan "${SHARD_OPTIONS[@]}" "${OPTIONS[@]}" cluster/pairs.sh --plan "${ARGUMENTS[@]}")
  [ -n "$plan" ] || exit 2
  before=$plan annotate=''
  if has_key annotations "${ARGUMENTS[0]}"; then
    annotate=$(submit --job-name=annotate --dependency="afterok:$plan" --kill-on-invalid-dep=yes "${ENCODE_OPTIONS[@]}" "${OPTIONS[@]}" \
      cluster/pairs.sh --annotate "${ARGUMENTS[@]}")
    [ -n "$annotate" ] || exit 2
    before=$annotate
  fi
  pairs=$(submit --job-name=pairs --dependency="afterok:$before" --kill-on-invalid-dep=yes "${SHARD_OPTIONS[@]}" "${OPTIONS[@]}" \
    cluster/pairs.sh "${ARGUMENTS[@]}")
  echo "plan $plan"
  [ -z "$annotate" ] || echo "annotate $annotate"
  echo "pairs $pairs"
  exit 0
fi

# lost_tasks OUTPUT: print the tasks that the plan's OUTPUT waits for and that are not in the queue, as for --array=.
lost_tasks() {
  local queued task
  queued=" $(squeue --me -h -r -n "$SLURM_JOB_NAME" -o %K | tr '\n' ' ') "
  for task in $(sed -n 's/.*not scanned yet (tasks \([0-9, ]*\)).*/\1/p' "$1" | tr -d ,); do
    [ -n "${LI_DIT_TASKS:-}" ] || task=$((task + SLURM_ARRAY_TASK_MIN))
    case $queued in *" $task "*) ;; *) echo "$task" ;; esac
  done | paste -s -d,
}
tasks_in_all() { echo "${LI_DIT_TASKS:-$((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1))}"; }

if [ "$1" = --annotate ]; then shift; array_step annotate "$@"; exit 0; fi
ONLY_PLAN=''
if [ "$1" = --plan ]; then ONLY_PLAN=1; shift; fi
output=$(mktemp)
tail -q -n +1 -s 0.2 -F "$output" &
TAIL=$!
trap 'sleep 0.3; kill "$TAIL"; rm "$output"' EXIT
array_step plan "$@" > "$output"
if [ -n "$ONLY_PLAN" ]; then exit 0; fi
if grep -q 'not scanned yet' "$output"; then
  # Twice, since a task may scan the last file and end between the two looks.
  if [ -n "$(lost_tasks "$output")" ]; then array_step plan "$@" > "$output"; fi
  lost=$(lost_tasks "$output")
  [ -z "$lost" ] || fail "the plan waits for tasks that are no longer queued: run them again, LI_DIT_TASKS=$(tasks_in_all) sbatch --array=$lost cluster/pairs.sh $*"
  echo "== the plan is waiting for other tasks: queued again"
  requeue_task
fi
array_step pairs "$@"
