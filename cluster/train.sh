#!/bin/bash
#SBATCH --job-name=train
#SBATCH --output=cluster/logs/%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --nodes=1
#SBATCH --exclusive
# Train a stage on a Slurm cluster to its end, in as many jobs as it takes.
usage() {
  cat <<'HELP'
usage: sbatch [sbatch options] cluster/train.sh STAGE [key=value ...]
       cluster/train.sh [sbatch options] STAGE [key=value ...]

Run it in the project's folder. The second form checks the stage, its store and the GPUs first, and submits only what
can run; it adds the options of cluster/env.sh, such as --mem=0, which the first form leaves to you. Write sbatch options as one word: --nodes=8 --gpus-per-node=8
--time=2-00:00:00.

Starts one process per GPU (--gpus-per-node) or, without GPUs, one per task (--ntasks-per-node, else one per node).
Before the time limit, and when preempted, all ranks save at a step boundary; the job queues itself again and resumes.
It does so after a crash too, but not after the third at the same step. A canceled job, a finished stage and a user's
error are never queued again. `scancel --signal=USR1 --batch JOB` saves and restarts a job now; a file `stop` in the
run's folder saves and ends it.

Logs: runs/<name>/logs: rank_00000.txt and so on, srun.txt, and the job's own output, which repeats rank 0.
State: python -m pipeline.status runs/<name>
HELP
}

[ -f cluster/jobs.sh ] || { echo "error: no cluster/jobs.sh in $PWD: run this in the project's folder" >&2; exit 2; }
. cluster/jobs.sh
open_script "$@"

submit_by_hand() {
  split_arguments "$@"
  [ ${#ARGUMENTS[@]} -gt 0 ] || fail "no stage named; see cluster/train.sh --help"
  need_slurm "run python -m pipeline.train ${ARGUMENTS[0]}"
  join_train_options
  "$PYTHON" -m pipeline.operations.preflight --gpus "$(gpus_offered "${OPTIONS[@]}")" "${ARGUMENTS[@]}" > /dev/null || exit $?
  JOB=$(submit --job-name="$(basename "${ARGUMENTS[0]}" .yaml)" "${OPTIONS[@]}" cluster/train.sh "${ARGUMENTS[@]}")
  [ -n "$JOB" ] || exit 2
  echo "Submitted batch job $JOB"
  exit 0
}

job_field() { scontrol show job -o "$SLURM_JOB_ID" | grep -o " $1=[^ ]*" | cut -d= -f2-; }

# -- the ranks ---------------------------------------------------------------------------------------------------------------
SRUN='' STEP=-1 STOP_ASKED='' WHY=''

# USR1: the time limit is near, or preemption. TERM: canceled, requeued, preempted. The ranks then save and exit.
ask_to_stop() {
  STOP_ASKED=${STOP_ASKED:-$SECONDS}
  if [ -n "$SRUN" ] && kill -0 "$SRUN" 2> /dev/null; then kill -USR1 "$SRUN"; fi
}

kill_ranks() {
  [ -z "$WHY" ] || return 0
  WHY=$1
  echo "== $WHY: killing the ranks"
  scancel --signal=KILL "$SLURM_JOB_ID.$STEP" || kill -KILL "$SRUN"
}

# launch LOG MODE COMMAND...: one process per task; sets RC.
launch() {
  local log=$1 mode=$2
  shift 2
  STEP=$((STEP + 1))
  srun "${SRUN_OPTIONS[@]}" --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * PER_NODE)) \
    --ntasks-per-node="$PER_NODE" --cpus-per-task="$CPUS" --gpu-bind=none --output="$log" --open-mode="$mode" \
    "$@" 2>> "$RUN/logs/srun.txt" &
  SRUN=$!
  [ -z "$STOP_ASKED" ] || ask_to_stop
  local checks=0
  while kill -0 "$SRUN" 2> /dev/null; do
    sleep 0.5 &
    wait $! || true # a signal ends this wait early, after its trap has run
    checks=$((checks + 1))
    [ $((checks % 4)) -ne 0 ] || watch_ranks
  done
  wait "$SRUN" && RC=0 || RC=$?
  SRUN=''
}

watch_ranks() {
  if [ -n "$STOP_ASKED" ] && [ $((SECONDS - STOP_ASKED)) -ge "$SAVE_SECONDS" ]; then
    kill_ranks "did not save within $SAVE_SECONDS s of being asked to stop"
  elif [ -z "$(find "$RUN" -maxdepth 2 -newermt "-$STALL_SECONDS seconds" -print -quit)" ]; then
    kill_ranks "nothing was written for $STALL_SECONDS s"
  elif ! grep -q "\"job\": \"$SLURM_JOB_ID\", \"restart\": ${SLURM_RESTART_COUNT:-0}," "$RUN/attempt.json"; then
    kill_ranks "another job has taken over $RUN"
    exit 1
  fi
}

requeue() {
  trap '' TERM USR1
  case $JOB in
    *' JobState=RUNNING '*) [ "$(job_field JobState)" = RUNNING ] || { echo "== canceled or requeued meanwhile"; exit 0; } ;;
  esac
  scontrol requeue "$SLURM_JOB_ID" || { echo "== could not queue itself again: submit the same command to resume"; exit 85; }
  if [ -n "$1" ]; then
    local excluded
    excluded=$(job_field ExcNodeList)
    [ "$excluded" != '(null)' ] && excluded=$excluded,$1 || excluded=$1
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded" || echo "== could not exclude $1"
  fi
  exit 0
}

# -- the job -------------------------------------------------------------------------------------------------------------------
by_hand && submit_by_hand "$@"
trap ask_to_stop USR1 TERM
JOB_OUTPUT=$(job_field StdOut)
export JOB_OUTPUT
QUEUE=$(timeout 60 squeue -h --me -o '%A %T')
RUN=$("$PYTHON" -m pipeline.operations.attempts begin --jobs "$QUEUE" "$@") || { rc=$?; [ $rc -eq 3 ] && exit 0; exit $rc; }

PER_NODE=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-1} / SLURM_JOB_NUM_NODES))}}
[ "$PER_NODE" -gt 0 ] || PER_NODE=1
CPUS=$((SLURM_CPUS_ON_NODE / PER_NODE))
[ "$CPUS" -gt 0 ] || CPUS=1
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node -o "$FIRST" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)}
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0}) % 20000)) # a new one for each start: the old one may still be in use
LI_DIT_ATTEMPT=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} # a rank that outlives this attempt commits no checkpoint
export MASTER_ADDR MASTER_PORT LI_DIT_ATTEMPT
echo "== $RUN: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_JOB_NUM_NODES x $PER_NODE processes on $SLURM_JOB_NODELIST"

touch "$RUN/logs/rank_00000.txt" "$RUN/logs/srun.txt"
tail -q -n 0 -s 0.2 -F "$RUN/logs/rank_00000.txt" "$RUN/logs/srun.txt" &
TAIL=$!
trap 'kill "$TAIL" 2> /dev/null || true' EXIT

BAD=''
if [ "$PREFLIGHT" != 0 ]; then
  rm -rf "$RUN/preflight"
  mkdir "$RUN/preflight"
  launch "$RUN/preflight/rank_%5t.txt" truncate "$PYTHON" -m pipeline.operations.node_check --report "$RUN/preflight" "$@"
  [ -n "$STOP_ASKED" ] || "$PYTHON" -m pipeline.operations.preflight --verdict "$RUN/preflight" --nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')" ||
    { RC=$?; BAD=$(cat "$RUN/preflight/bad_nodes" 2> /dev/null || true); }
fi
if [ -n "$STOP_ASKED" ]; then
  RC=85 # asked to stop before the first step: nothing to save
elif [ "$PREFLIGHT" = 0 ] || [ "$RC" -eq 0 ]; then
  MASTER_PORT=$((MASTER_PORT + 1))
  launch "$RUN/logs/rank_%5t.txt" append "$PYTHON" -m pipeline.train "$@"
fi
sleep 0.3 # until tail has printed the last lines

JOB=$(scontrol show job -o "$SLURM_JOB_ID")
"$PYTHON" -m pipeline.operations.attempts end "$RUN" --rc "$RC" --job "$JOB" --why "$WHY" --bad-nodes "$BAD" && rc=0 || rc=$?
[ "$rc" -ne 85 ] || requeue "$BAD"
exit "$rc"
