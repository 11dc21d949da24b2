# shellcheck shell=bash
# What the scripts of this folder share; read by them, in the project's folder.

fail() { echo "error: $*" >&2; exit 2; }

. cluster/env.sh
export PYTHONUNBUFFERED=1

# Called by hand (on a login node) or as a job? Slurm runs a copy of the script from its spool folder.
by_hand() { [ -f "${0%/*}/jobs.sh" ]; }

# split_arguments "$@": leading options go to sbatch (OPTIONS), the rest is ours (ARGUMENTS).
split_arguments() {
  OPTIONS=()
  while [ $# -gt 0 ] && [[ $1 == -* ]]; do OPTIONS+=("$1"); shift; done
  # shellcheck disable=SC2034 # read by the scripts
  ARGUMENTS=("$@")
}

need_python() { [ -x "$PYTHON" ] || command -v "$PYTHON" > /dev/null || fail "no Python at $PYTHON: run \`make install\`, or set PYTHON in cluster/env.sh"; }
need_slurm() { command -v sbatch > /dev/null || fail "no sbatch here: this is no Slurm machine; without Slurm, $1"; }

# gpus_offered OPTIONS...: how many node groups of the partition that these options name (or of any) have GPUs.
gpus_offered() {
  local partition=${SBATCH_PARTITION:-} option
  for option in "$@"; do case $option in --partition=*) partition=${option#*=} ;; -p?*) partition=${option#-p} ;; esac; done
  sinfo -h -o %G ${partition:+-p "$partition"} | grep -c gpu || true
}

# submit sbatch's arguments: prints the job's number. --test-only first: what could never run is refused, not queued.
submit() { sbatch --parsable "$@" | cut -d';' -f1; }
