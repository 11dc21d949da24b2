#!/bin/bash
# Python in the Apptainer image CONTAINER, with the environment and in the folder of the caller; see cluster/env.sh.
fail() { echo "error: $*" >&2; exit 2; }

[ -e "${CONTAINER:-}" ] || fail "CONTAINER=${CONTAINER:-}: no such image: make it with \`apptainer build li-dit.sif apptainer.def\`"
command -v apptainer > /dev/null || fail "no apptainer on ${HOSTNAME:-this machine}: load its module in cluster/env.sh"

OPTIONS=()
[ ! -e /dev/nvidiactl ] || OPTIONS+=(--nv) # the driver's libraries; a login node has none
exec apptainer exec "${OPTIONS[@]}" "$CONTAINER" python "$@"
