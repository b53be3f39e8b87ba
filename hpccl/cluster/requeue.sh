# Requeue of a SLURM job by its own batch script, in bash. Source or paste this above srun, and below srun write
#
#     srun --kill-on-bad-exit=1 ... hpccl train ...
#     hpccl_finish $?
#
# hpccl_finish never returns. It requeues the job if running again can help and SLURM has not ended the job itself;
# else it exits with the code of the run. HPCCL_MAX_RESTARTS (1000) limits how often.
#
# srun's exit code is the highest of all ranks':
#   75                stopped on request and saved, or lost another rank  -> again
#   134 135 137 139   a rank was aborted or killed, or crashed            -> again
#   143               srun ended a rank that had no signal handlers yet, because another one ended -> again, in the
#                     job's first five restarts, since the other one may have failed outside of hpccl
#   233 to 236        srun could not reach a node                         -> again, by then SLURM knows which are down
#   201 202           a rank failed (1), or its configuration is wrong (2). Its partners end with 75 or 143: in a step
#                     hpccl adds 200 so that the failure is the highest -> not again
#   any other         not again

hpccl_ended=
# scancel, the time limit and a requeue from outside send TERM to this shell. The trap runs when srun has ended.
trap 'hpccl_ended=yes' TERM
trap : USR1 USR2 # meant for the ranks; by default they would end this shell

hpccl_finish() {
  local code=$1 job=${SLURM_JOB_ID:-} limit=${HPCCL_MAX_RESTARTS:-1000} restarts=${SLURM_RESTART_COUNT:-0} why='' state try
  # The number of an array's last task is that of the whole array: name the task.
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  case $code in
    0) exit 0 ;;
    75 | 134 | 135 | 137 | 139 | 233 | 234 | 235 | 236) ;;
    143) if [ "$restarts" -ge 5 ]; then why='ranks are ended before they listen, again and again'; fi ;;
    201 | 202) code=$((code - 200)) why='a rank says what to mend' ;;
    253) why='out of memory' ;;
    *) why='running again would not mend it' ;;
  esac
  if [ -z "$why" ] && [ -n "$hpccl_ended" ]; then why='SLURM ended the job'; fi
  if [ -z "$why" ] && [ "$restarts" -ge "$limit" ]; then why="restarted $restarts times, HPCCL_MAX_RESTARTS is $limit"; fi
  for try in 1 2 3 4 5 6; do # slurmctld may be restarting
    if [ -n "$why" ]; then break; fi
    if ! state=$(squeue --all --states=all --noheader --jobs="$job" --format=%T); then
      sleep 5
    elif [ "$state" != RUNNING ]; then
      why="SLURM calls the job ${state:-unknown}"
    else
      echo "hpccl: job $job ended with $code after $restarts restarts: requeue" # before SLURM ends this shell
      if scontrol requeue "$job"; then
        sleep 300
        exit "$code"
      fi
      sleep 5
    fi
  done
  echo "hpccl: job $job ended with $code after $restarts restarts: not requeued: ${why:-SLURM refused ($try times)}" >&2
  exit "$code"
}
