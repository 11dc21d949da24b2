#!/bin/bash
# Submit everything from a dataset's sources to images: plan, pairs, encodings, snapshot, stages, samples.
usage() {
  cat <<'HELP'
usage: cluster/pretrain.sh [sbatch options] DATASET.yaml STAGE [STAGE ...] [key=value ...]

Submits jobs that run one after the other, and prints them: the plan and the pairs (cluster/pairs.sh), latents and text
families (cluster/encode.sh), the snapshot, a training job per stage (cluster/stages.sh), and the images of some
prompts. sbatch options and settings apply to the training jobs; those of the array jobs are SHARD_OPTIONS and
ENCODE_OPTIONS in cluster/env.sh.
HELP
}

[ -f cluster/jobs.sh ] || { echo "error: no cluster/jobs.sh in $PWD: run this in the project's folder" >&2; exit 2; }
. cluster/jobs.sh
open_script "$@"
need_slurm "run make demo, or the commands that it prints"
split_arguments "$@"
need_dataset cluster/pretrain.sh
DATASET=${ARGUMENTS[0]}
split_stages "${ARGUMENTS[@]:1}"
[ ${#STAGES[@]} -gt 0 ] || fail "no stage named; see cluster/pretrain.sh --help"
check_stages "$DATASET"

# queue NAME CONDITION SBATCH_ARGUMENTS...: submit a job that waits for the last one, and print it.
LAST=''
queue() {
  local name=$1 condition=$2 after=()
  shift 2
  [ -z "$LAST" ] || after=(--dependency="$condition:$LAST" --kill-on-invalid-dep=yes)
  LAST=$(submit --job-name="$name" "${after[@]}" "$@")
  [ -n "$LAST" ] || exit 2
  print_job "$LAST" "$name" "${after[0]:+${after[0]#*=}}"
}

print_job JOB WHAT AFTER
queue plan '' "${SHARD_OPTIONS[@]}" cluster/pairs.sh --plan "$DATASET"
queue pairs afterok "${SHARD_OPTIONS[@]}" cluster/pairs.sh "$DATASET"
queue encode afterok "${ENCODE_OPTIONS[@]}" cluster/encode.sh "$DATASET"
queue snapshot afterany cluster/run.sh data_prep snapshot "$DATASET" # afterany: it reports the tasks that failed
submit_stages "$LAST"
queue samples afterok "${SAMPLE_OPTIONS[@]}" cluster/run.sh pipeline.sample "${RUNS[-1]}" --prompts "$PROMPTS"
echo "images: ${RUNS[-1]}/samples; state: squeue --me, python -m pipeline.status ${RUNS[-1]}"
