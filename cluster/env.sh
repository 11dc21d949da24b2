# shellcheck shell=bash disable=SC2034
# The settings of this site: the one file to edit. Every job of cluster/ reads it, on the login node and on compute nodes.
# For a second site, copy it and set LI_DIT_ENV to the copy.
# A value that is already in the environment wins where the line says ${NAME:-...}.

# -- software: modules, a virtual environment, a container ---------------------------------------------------------------
# module load cuda/12.8
PYTHON=${PYTHON:-$PWD/.venv/bin/python}        # the Python with li-dit installed, at the same path on all nodes
SRUN_OPTIONS=()                                # to every srun; a container (pyxis): (--container-image=li-dit.sqsh --container-mounts="$PWD")

# -- Slurm: any sbatch option on the command line wins over these ----------------------------------------------------------
# The SBATCH_ variables also serve plain `sbatch cluster/train.sh`, in a shell that did `source cluster/env.sh`.
# export SBATCH_ACCOUNT=... SBATCH_PARTITION=... SBATCH_TIMELIMIT=2-00:00:00
TRAIN_OPTIONS=()                               # cluster/train.sh called by hand; for instance (--nodes=8 --gpus-per-node=8)
SHARD_OPTIONS=(--array=0-15%8)                 # cluster/pairs.sh: tasks, and after % how many at a time
ENCODE_OPTIONS=(--array=0-15%8)                # cluster/encode.sh; for instance (--array=0-63%16 --gpus-per-node=1)
SAMPLE_OPTIONS=()                              # the last job of cluster/pretrain.sh; for instance (--gpus-per-node=1)
PROMPTS=${PROMPTS:-cluster/prompts.txt}        # what it draws

# -- where things are ------------------------------------------------------------------------------------------------------
# export XDG_CACHE_HOME=/local/$USER           # shards of s3:// stores are cached below it: a fast disk of the node
# export AWS_ENDPOINT_URL=... AWS_PROFILE=...  # the store's credentials, by any of the usual AWS means
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

# -- network -----------------------------------------------------------------------------------------------------------------
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5 GLOO_SOCKET_IFNAME=eth0

# -- when a training job steps in ----------------------------------------------------------------------------------------------
SAVE_SECONDS=${SAVE_SECONDS:-230}              # ranks asked to stop that have not saved by then are killed; less than --signal's lead less 60
STALL_SECONDS=${STALL_SECONDS:-1800}           # so are ranks that wrote nothing at all, in metrics, logs and checkpoints, for so long
PREFLIGHT=${PREFLIGHT:-1}                      # 0: no check of the nodes before step 1
export PREFLIGHT_CACHE_GB=${PREFLIGHT_CACHE_GB:-5}         # free space that the local cache must have
export PREFLIGHT_SHM_GB=${PREFLIGHT_SHM_GB:-1}             # size that /dev/shm must have: loader processes pass batches through it
