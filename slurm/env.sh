# Sourced by every template (bash), on the job's first node. Nothing here is specific to a site: what yours needs
# (module load, conda activate, NCCL_SOCKET_IFNAME, ...) goes into slurm/site.sh beside this file, which git ignores.
#
# HPCCL_HOME      the folder of the repository; by default where sbatch was called
# HPCCL_LAUNCH    put before the command of every rank, such as `apptainer exec --nv image.sif`

HPCCL_HOME=${HPCCL_HOME:-$SLURM_SUBMIT_DIR}
if [ -f "$HPCCL_HOME/slurm/site.sh" ]; then
  . "$HPCCL_HOME/slurm/site.sh" || {
    echo "hpccl: the last command of '$HPCCL_HOME/slurm/site.sh' failed with $?; mend it, or end the file with 'true'" >&2
    exit 2
  }
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ -d "$HPCCL_HOME/.venv/bin" ]; then
  PATH=$HPCCL_HOME/.venv/bin:$PATH
fi
export HPCCL_HOME PATH

. "$HPCCL_HOME/hpccl/cluster/requeue.sh" || { # hpccl_finish, and traps of signals
  echo "hpccl: '$HPCCL_HOME' is not the folder of the repository; submit from there, or set HPCCL_HOME" >&2
  exit 2
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since SLURM 22.05, srun does not take --cpus-per-task from the job
fi
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
if [ -n "${NCCL_SOCKET_IFNAME:-}" ]; then # gloo and NCCL use the same network
  export NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}
fi

# What starts each rank. A rank that dies ends the step (by SLURM's default, the others would hang). A warning signal
# that arrives while Python is still importing would kill it: blocked, it stays pending until hpccl has its handlers.
read -r -a hpccl_launch <<<"${HPCCL_LAUNCH:-}"
hpccl_srun=(srun --kill-on-bad-exit=1)
hpccl_rank=("${hpccl_launch[@]}" env --block-signal=USR1 --block-signal=USR2 HPCCL_STEP=1) # a single task is a rank too

echo "hpccl: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}, $(date '+%F %T')"
