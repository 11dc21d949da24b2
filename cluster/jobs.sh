# shellcheck shell=bash
# Functions of the scripts in this folder, which source this file in the project's folder.

fail() { echo "error: $*" >&2; exit 2; }

# shellcheck source=cluster/env.sh
. "${LI_DIT_ENV:-cluster/env.sh}"
export PYTHONUNBUFFERED=1

# by_hand: true on a login node, false in a job. Slurm runs a copy of the script from its spool folder.
by_hand() { [ -f "${0%/*}/jobs.sh" ]; }

# split_arguments "$@": OPTIONS are the leading options, for sbatch; ARGUMENTS are the rest.
split_arguments() {
  OPTIONS=()
  while [ $# -gt 0 ] && [[ $1 == -* ]]; do OPTIONS+=("$1"); shift; done
  local word
  for word in "$@"; do case $word in -*) fail "$word: write sbatch options before the rest" ;; esac; done
  # shellcheck disable=SC2034 # read by the scripts
  ARGUMENTS=("$@")
}

# open_script "$@": print the script's `usage` if it is asked for or there are no arguments, and check for a Python.
open_script() {
  case ${1:-} in -h | --help) usage; exit 0 ;; '') usage >&2; exit 2 ;; esac
  [ -x "$PYTHON" ] || command -v "$PYTHON" > /dev/null || fail "no Python at $PYTHON: run \`make install\`, or set PYTHON in cluster/env.sh"
}
need_slurm() { command -v sbatch > /dev/null || fail "no sbatch here: this machine has no Slurm; without it, $1"; }

# read_dataset SCRIPT WITHOUT_SLURM "$@": split the arguments of pairs.sh or encode.sh, and check for Slurm and the dataset.
read_dataset() {
  split_arguments "${@:3}"
  need_slurm "$2"
  need_dataset "$1"
}

# warn_without_limit OPTIONS...: warn of an array, the last one in sbatch's options, all of whose tasks may run at once.
warn_without_limit() {
  local array=''
  while [ $# -gt 0 ]; do
    case $1 in --array=*) array=${1#*=} ;; -a?*) array=${1#-a} ;; --array | -a) array=${2:-} ;; esac
    shift
  done
  case $array in '' | *%*) return ;; *[-,]*) ;; *) return ;; esac
  echo "warning: --array=$array has no %: if all of its tasks run at once, they all wait for the slowest GPU; write" \
    "four tasks per GPU and the number of GPUs after %, as in --array=0-63%16" >&2
}

need_dataset() { [ -f "${ARGUMENTS[0]:-}" ] || fail "${ARGUMENTS[0]:-no dataset named}: no such file; see $1 --help"; }

# gpus_offered OPTIONS...: print the number of node groups with GPUs in the partition of these options, or the default one.
gpus_offered() {
  local partition=${SBATCH_PARTITION:-} option
  for option in "$@"; do case $option in --partition=*) partition=${option#*=} ;; -p?*) partition=${option#-p} ;; esac; done
  sinfo -h -o '%P %G' ${partition:+-p "$partition"} | awk -v named="$partition" '(named || $1 ~ /\*$/) && /gpu/' | grep -c . || true
}

# join_train_options: put TRAIN_OPTIONS before OPTIONS. Slurm refuses two of --mem, --mem-per-cpu and --mem-per-gpu together.
join_train_options() {
  local option
  for option in "${TRAIN_OPTIONS[@]}"; do
    case " ${OPTIONS[*]} $option" in *" --mem"*" --mem"*) ;; *) set -- "$@" "$option" ;; esac
  done
  OPTIONS=("$@" "${OPTIONS[@]}")
}

# submit SBATCH_ARGUMENTS...: submit a job and print its number. --test-only refuses a job that could never run.
submit() {
  sbatch --test-only "$@" 2> >(grep -v 'to start at' | name_array_limit >&2) || exit 2
  sbatch --parsable "$@" | cut -d';' -f1
}

# name_array_limit: pass sbatch's messages on, with what it does not say about arrays.
name_array_limit() {
  local line
  while read -r line; do
    case $line in *'Invalid job array'*) line="$line: the last task is at most $(scontrol show config | awk '$1 == "MaxArraySize" { print $3 - 1 }') here" ;; esac
    echo "$line"
  done
}

# array_step COMMAND ARGUMENTS...: run `python -m data_prep COMMAND` for this array task. Near the time limit, stop it and
# queue the task again: committed parts are kept, so only the current one is repeated.
array_step() {
  "$PYTHON" -m data_prep "$@" &
  local step=$! rc=0
  # shellcheck disable=SC2064 # $step is meant to expand now
  trap "echo '== time limit near: queued again'; kill $step; requeue_task" USR1
  wait $step || rc=$?
  trap - USR1
  [ $rc -eq 0 ] || { echo "== $1 ended with code $rc; committed parts are kept, run the task again"; exit $rc; }
}

# has_key KEY DATASET.yaml: true if the dataset has this key.
has_key() { grep -q "^$1:" "$2"; }

requeue_task() { scontrol requeue "$SLURM_JOB_ID" && exit 0; }

# -- stages that run one after the other ----------------------------------------------------------------------------------------------

# split_stages ARGUMENTS...: STAGES and SETTINGS (key=value).
split_stages() {
  STAGES=() SETTINGS=()
  local word
  for word in "$@"; do
    case $word in *=*) SETTINGS+=("$word") ;; *) STAGES+=("$word") ;; esac
  done
  for word in "${SETTINGS[@]}"; do
    case $word in name=* | start_from=*) [ ${#STAGES[@]} -eq 1 ] || fail "$word would apply to all ${#STAGES[@]} stages" ;; esac
  done
}

# check_stages DATASET_OR_EMPTY: check all stages before the first is submitted; RUNS are their folders.
check_stages() {
  RUNS=()
  local gpus stage more=()
  join_train_options
  gpus=$(gpus_offered "${OPTIONS[@]}")
  [ -z "$1" ] || more+=(--made-here "$1")
  for stage in "${STAGES[@]}"; do
    RUNS+=("$("$PYTHON" -m pipeline.operations.preflight --gpus "$gpus" "${more[@]}" "$stage" "${SETTINGS[@]}")") || exit $?
    [ ${#RUNS[@]} -gt 1 ] || more+=(--after-another)
  done
}

print_job() { printf '%-8s %-32s %s\n' "$1" "$2" "${3:-}"; }

# submit_stages JOB_OR_EMPTY: submit each stage after the one before it, the first after JOB; LAST is the last job.
submit_stages() {
  local number stage after=()
  LAST=$1
  for number in "${!STAGES[@]}"; do
    stage=${STAGES[$number]}
    [ -z "$LAST" ] || after=(--dependency="afterok:$LAST" --kill-on-invalid-dep=yes)
    [ "$number" -eq 0 ] || set -- "$1" "start_from=${RUNS[$((number - 1))]}"
    LAST=$(submit --job-name="$(basename "$stage" .yaml)" "${OPTIONS[@]}" "${after[@]}" \
      cluster/train.sh "$stage" "${SETTINGS[@]}" "${@:2}")
    [ -n "$LAST" ] || exit 2
    print_job "$LAST" "train $stage" "${after[*]:+${after[0]#*=}}"
  done
}
