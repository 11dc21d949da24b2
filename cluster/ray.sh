#!/bin/bash
#SBATCH --job-name=ray
#SBATCH --output=cluster/logs/%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# Run steps of data preparation on a Ray cluster inside of one Slurm job.
usage() {
  cat <<'HELP'
usage: sbatch --nodes=4 [--gpus-per-node=8] [sbatch options] cluster/ray.sh [--steps=A,B] DATASET.yaml [key=value ...]

Starts Ray on all nodes of the job, and runs `python -m data_prep STEP DATASET.yaml --engine ray` for each of the steps,
by default plan,pairs. Workers take the next parts when they are free, so fast and slow nodes end together, and a node
that fails costs the parts that it had. It needs the extra `ray`.

The job may be killed and run again at any time: committed parts are kept. Near its time limit it queues itself again.
HELP
}

[ -f cluster/jobs.sh ] || { echo "error: no cluster/jobs.sh in $PWD: run this in the project's folder" >&2; exit 2; }
. cluster/jobs.sh
open_script "$@"
by_hand && fail "this is a job: sbatch --nodes=4 cluster/ray.sh $*"
STEPS=plan,pairs
case $1 in --steps=*) STEPS=${1#*=}; shift ;; esac
[ -f "${1:-}" ] || fail "${1:-no dataset named}: no such file; see cluster/ray.sh --help"
"$PYTHON" -c 'import ray' 2> /dev/null || fail "no Ray here: $PYTHON -m pip install -c constraints.txt -e '.[ray]'"

FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
HEAD=$(scontrol show node -o "$FIRST" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
PORT=$((20000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0}) % 20000)) # a new one for each start: the old one may still be in use
DONE=cluster/logs/ray-$SLURM_JOB_ID.done # Ray's launcher ends with code 0 also if it could not start
PATH=$(dirname "$PYTHON"):$PATH          # it calls `ray`
export PATH RAY_USAGE_STATS_ENABLED=0
rm -f "$DONE"

# The first node runs the steps, the others stay until they have ended. In a container, Python is the container's.
INNER=$PYTHON COMMANDS=true
[ -z "$CONTAINER" ] || INNER=python
for step in ${STEPS//,/ }; do
  COMMANDS+=" && $(printf '%q ' "$INNER" -m data_prep "$step" "$@" --engine ray)"
done
COMMANDS+=" && touch $DONE"
srun "${SRUN_OPTIONS[@]}" --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
  "$PYTHON" -m ray.scripts.scripts symmetric-run --address "$HEAD:$PORT" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_ON_NODE" -- bash -c "$COMMANDS" &
SRUN=$! rc=0
trap 'echo "== time limit near: queued again"; kill $SRUN; requeue_task' USR1
wait $SRUN || rc=$?
trap - USR1
[ $rc -ne 0 ] || [ -f "$DONE" ] || { echo "== Ray did not start, see above"; rc=1; }
rm -f "$DONE"
[ $rc -eq 0 ] || { echo "== ended with code $rc; committed parts are kept, run it again"; exit $rc; }
