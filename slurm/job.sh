# What the batch scripts share; they source it, and it is not submitted itself.
#
# The environment of the job's programs, then `run_step`, which runs them and decides what becomes of the job.
# shellcheck shell=bash

[[ -z ${GPC_DIST_SETUP:-} ]] || source "$GPC_DIST_SETUP"
read -ra launcher <<< "${GPC_DIST_LAUNCHER:-}"
unset SLURM_CPUS_PER_GPU  # refused by srun in jobs without GPUs

export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# a port of this job and of this start of it, below those that the system hands out
MASTER_PORT=$((20000 + (8 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0} % 8) % 12000))

# compiled kernels: on the node's own disk, since parallel builds on a shared one disturb each other
cache=${TMPDIR:-/tmp}/gpc-dist-$(id -u)
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}

# what one start of the job leaves for the next: how often it failed, and why it must not be tried again
notes=$SLURM_SUBMIT_DIR/.gpc-dist-jobs
mkdir -p "$notes"
failures=$notes/$SLURM_JOB_ID.failures
export GPC_DIST_REFUSAL=$notes/$SLURM_JOB_ID.refusal

# as scontrol names it: the id of an array's last task is the array's too, and would stand for all of its tasks
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

say() { echo "$(date +%FT%T) job $SLURM_JOB_ID: $*"; }

requeue() {
  say "$1: requeued"
  scontrol requeue "$job"
  exit "$code"
}

# Run the job's only step, given as srun's command line, and end the script with its exit code.
run_step() {
  trap 'say "asked to stop"; kill -USR2 "$step"' USR2
  trap 'say "ended by Slurm"' TERM  # which tells the ranks itself
  "$@" &
  step=$!
  while kill -0 "$step" 2> /dev/null; do wait "$step"; done  # a trapped signal interrupts wait
  wait "$step"
  code=$?

  state=$(scontrol show job "$job" | grep -o ' JobState=[A-Z_]*')
  [[ $code == 0 ]] || say "ended with exit code $code,$state"
  if [[ $code == 0 ]]; then
    rm -f "$failures"
  elif [[ $state != *RUNNING ]]; then
    :  # cancelled, or requeued by Slurm
  elif [[ $code == 75 ]]; then
    requeue "stopped on request"
  elif [[ -s $GPC_DIST_REFUSAL ]]; then
    say "not requeued: it would fail again"
  else
    echo "$code" >> "$failures"
    count=$(wc -l < "$failures")
    (( count > ${GPC_DIST_MAX_FAILURES:-3} )) || requeue "failure $count"
    say "given up after $count failures"
  fi
  exit "$code"
}
