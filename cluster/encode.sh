#!/bin/bash
#SBATCH --job-name=encode
#SBATCH --output=cluster/logs/%x-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Encode a dataset's pairs, images with its VAE and captions with its LLMs, in an array of tasks with one GPU each.
usage() {
  cat <<'HELP'
usage: sbatch --array=0-63%16 --gpus-per-node=1 [sbatch options] cluster/encode.sh DATASET.yaml [key=value ...]
       cluster/encode.sh [sbatch options] DATASET.yaml [key=value ...]

Each task runs `python -m data_prep latents`, `captions` if the dataset has any, and `text` for its share. The second form adds
ENCODE_OPTIONS of cluster/env.sh, and also submits the snapshot, which runs when all tasks have ended. %16 = at most
16 tasks at a time.

Give the array four tasks per GPU or more, as here 64 tasks for 16 GPUs: a task has a fixed share of the work, so with
one task per GPU all GPUs wait for the slowest one. With four, a fast GPU takes the next task.

Tasks may be killed and run again at any time: committed parts are kept, and the snapshot prints the --array= list of
the tasks that are missing.
HELP
}

[ -f cluster/jobs.sh ] || { echo "error: no cluster/jobs.sh in $PWD: run this in the project's folder" >&2; exit 2; }
. cluster/jobs.sh
open_script "$@"

if by_hand; then
  read_dataset cluster/encode.sh "run python -m data_prep latents, captions if it has any, then text, then snapshot" "$@"
  warn_without_limit "${ENCODE_OPTIONS[@]}" "${OPTIONS[@]}"
  encode=$(submit "${ENCODE_OPTIONS[@]}" "${OPTIONS[@]}" cluster/encode.sh "${ARGUMENTS[@]}")
  [ -n "$encode" ] || exit 2
  # afterany: if a task fails, the snapshot reports which
  snapshot=$(submit --job-name=snapshot --dependency="afterany:$encode" cluster/run.sh data_prep snapshot "${ARGUMENTS[@]}")
  echo "encode $encode"
  echo "snapshot $snapshot"
  exit 0
fi

# warn_of_all_at_once: in the array's first task, warn if nothing limits the number of its tasks that run at once.
warn_of_all_at_once() {
  [ "${SLURM_ARRAY_TASK_COUNT:-1}" -gt 1 ] && [ "${SLURM_ARRAY_TASK_ID:-}" = "${SLURM_ARRAY_TASK_MIN:-}" ] || return 0
  command -v scontrol > /dev/null || return 0
  local job
  job=$(scontrol show job "$SLURM_JOB_ID" 2> /dev/null) || return 0
  case $job in
    *ArrayTaskThrottle=[1-9]*) ;;
    *ArrayTaskId=*) echo "warning: this array has no %: if all of its tasks run at once, they all wait for the slowest GPU; as" \
      "many as there are GPUs: scontrol update JobId=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID} ArrayTaskThrottle=16" >&2 ;;
  esac
}

warn_of_all_at_once
array_step latents "$@"
# A task captions the parts whose text it encodes next.
if has_key captions "$1"; then array_step captions "$@"; fi
array_step text "$@"
