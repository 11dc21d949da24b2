# shellcheck shell=bash disable=SC2034
# Settings of this site: the only file to edit. All jobs of cluster/ read it, on the login node and on compute nodes.
# For a second site, copy it and set LI_DIT_ENV to the copy.
# A value in the environment wins if the line says ${NAME:-...}.

# -- software: modules, a virtual environment, a container ---------------------------------------------------------------
# module load cuda/12.8
PYTHON=${PYTHON:-$PWD/.venv/bin/python}        # the Python with li-dit installed, at the same path on all nodes
export CONTAINER=${CONTAINER:-}                # an Apptainer image, made of apptainer.def, such as $PWD/li-dit.sif: all Python runs inside of it
[ -z "$CONTAINER" ] || PYTHON=$PWD/cluster/python.sh
# export APPTAINER_BIND=/shared,/local         # folders besides the project's, the home and /tmp that a container sees
SRUN_OPTIONS=()                                # options of every srun; a container (pyxis): (--container-image=li-dit.sqsh --container-mounts="$PWD")

# -- Slurm: an sbatch option on the command line wins over these ----------------------------------------------------------
# The SBATCH_ variables also apply to plain `sbatch cluster/train.sh`, in a shell with `source cluster/env.sh`.
# export SBATCH_ACCOUNT=... SBATCH_PARTITION=... SBATCH_TIMELIMIT=2-00:00:00
TRAIN_OPTIONS=(--mem=0)                        # cluster/train.sh called by hand: all memory of a node; for example (--mem=0 --nodes=8 --gpus-per-node=8)
SHARD_OPTIONS=(--array=0-15%8)                 # cluster/pairs.sh: tasks, and after % the maximum at a time
ENCODE_OPTIONS=(--array=0-15%8)                # cluster/encode.sh; for example (--array=0-63%16 --gpus-per-node=1)
SAMPLE_OPTIONS=()                              # the last job of cluster/pretrain.sh; for example (--gpus-per-node=1)
PROMPTS=${PROMPTS:-cluster/prompts.txt}        # prompts of that job

# -- folders and stores ------------------------------------------------------------------------------------------------------
# export XDG_CACHE_HOME=/local/$USER           # cache of shards of s3:// stores: use a fast disk of the node
# export AWS_ENDPOINT_URL=... AWS_PROFILE=...  # the store's credentials, in any way that AWS supports
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

# -- memory: without it, text of changing length leaves unused holes in the GPUs' memory ----------------------------------
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# -- network -----------------------------------------------------------------------------------------------------------------
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5 GLOO_SOCKET_IFNAME=eth0

# -- limits of a training job ----------------------------------------------------------------------------------------------
SAVE_SECONDS=${SAVE_SECONDS:-230}              # kill ranks that have not saved so long after being asked to stop; less than --signal's lead - 60
STALL_SECONDS=${STALL_SECONDS:-1800}           # kill ranks that have written nothing to metrics, logs and checkpoints for so long
PREFLIGHT=${PREFLIGHT:-1}                      # 0 = do not check the nodes before step 1
export PREFLIGHT_CACHE_GB=${PREFLIGHT_CACHE_GB:-5}         # required free space of the local cache
export PREFLIGHT_SHM_GB=${PREFLIGHT_SHM_GB:-1}             # required size of /dev/shm, through which loader processes pass batches
