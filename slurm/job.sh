# What the batch scripts share; they source it, and it is not submitted itself.
#
# What becomes of a job that ends or is stopped, the environment of its programs, and `gpc_run`, which runs them. Names
# begin with gpc_, since the user's own file is sourced in between.
# shellcheck shell=bash

# as scontrol names it: the id of an array's last task is the array's too, and would stand for all of its tasks
gpc_job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || gpc_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
gpc_restarts=${SLURM_RESTART_COUNT:-0}

gpc_say() { echo "$(date +%FT%T) job $gpc_job: $*"; }

# what one start of the job leaves for the next: a line for each start, and one for how it ended
gpc_notes=$SLURM_SUBMIT_DIR/.gpc-dist-jobs/$SLURM_JOB_ID
mkdir "${gpc_notes%/*}" 2> /dev/null
if ! { echo started >> "$gpc_notes.starts"; } 2> /dev/null; then
  gpc_say "cannot write into $SLURM_SUBMIT_DIR: restarts are counted in place of failures"
  gpc_notes=$(mktemp -d)/$SLURM_JOB_ID
  trap 'rm -rf "${gpc_notes%/*}"' EXIT
fi

# what the program leaves for the end of its start: why it must not be tried again; that it came to nothing
export GPC_DIST_REFUSAL=$gpc_notes.refusal GPC_DIST_IDLE=$gpc_notes.idle
rm -f "$GPC_DIST_REFUSAL" "$GPC_DIST_IDLE"
gpc_stopped_early=

# How many starts in a row failed or came to nothing, this one included. Where lines are missing (the folder cannot be
# written, is full, or is not the same on all nodes), it is the number of all starts.
gpc_count_failures() {
  { echo failed >> "$gpc_notes.starts"; } 2> /dev/null &&
    awk -v restarts="$gpc_restarts" '
      $0 == "started" { starts++ }
      $0 == "failed" { failures++ }
      $0 == "count anew" { failures = 0 }
      END { if (starts <= restarts) exit 1; print failures }' "$gpc_notes.starts" ||
    echo $((gpc_restarts + 1))
}

gpc_count_anew() { { echo "count anew" >> "$gpc_notes.starts"; } 2> /dev/null; }

# The job's state, and whether it was requeued: if Slurm had lost this node, another start may run already. The controller
# may be away for a while: it is asked until it answers.
gpc_state() {
  local said told= state
  until said=$(scontrol show job "$gpc_job" 2>&1) || [[ $said == *"Invalid job id"* ]]; do
    [[ -n $told ]] || gpc_say "Slurm's controller does not answer: waiting for it" >&2
    told=yes
    sleep 1
  done
  state=$(grep -o ' JobState=[A-Z_]*' <<< "$said")
  [[ $said != *" Restarts="* || $said == *" Restarts=$gpc_restarts "* ]] || state+=", requeued"
  echo "$state"
}

gpc_requeue() {
  gpc_say "$1: requeued"
  scontrol requeue "$gpc_job" && return
  # once more, if the controller was away
  [[ $(gpc_state) != *RUNNING ]] || scontrol requeue "$gpc_job"
}

# Decide what becomes of the job, whose step ended with this exit code, and end the script with it.
gpc_finish() {
  local code=$1 idle=$gpc_stopped_early state count
  if [[ $code == 0 ]]; then
    rm -f "$gpc_notes.starts"
    exit 0
  fi
  [[ ! -e $GPC_DIST_IDLE ]] || idle=yes
  state=$(gpc_state)
  gpc_say "ended with exit code $code,$state"
  if [[ $state != *RUNNING ]]; then
    :  # cancelled, or requeued by Slurm
  elif [[ $code == 75 && -z $idle ]]; then
    gpc_count_anew
    gpc_requeue "stopped on request"
  elif [[ -s $GPC_DIST_REFUSAL ]]; then
    gpc_say "not requeued: it would fail again"
  else
    count=$(gpc_count_failures)
    if (( count > ${GPC_DIST_MAX_FAILURES:-3} )); then
      gpc_count_anew  # for one who requeues it by hand
      gpc_say "given up after $count failures"
      [[ $code != 75 ]] || gpc_say "it is stopped before it gets anywhere: give it a longer --time, or a shorter" \
        "warning (--signal=B:USR2@SECONDS)"
    elif [[ $code == 75 ]]; then
      gpc_requeue "failure $count, stopped before it got anywhere"
    else
      gpc_requeue "failure $count"
    fi
  fi
  exit "$code"
}

# A stop before there is a step to be stopped.
gpc_stop_early() {
  gpc_say "asked to stop"
  gpc_stopped_early=yes
  gpc_finish 75
}
trap gpc_stop_early USR2 TERM INT
[[ -z $gpc_stopped ]] || gpc_stop_early

set +u  # the user's file may ask for variables that are not set
[[ -z ${GPC_DIST_SETUP:-} ]] || source "$GPC_DIST_SETUP"
set -u
read -ra launcher <<< "${GPC_DIST_LAUNCHER:-}"
unset SLURM_CPUS_PER_GPU  # refused by srun in jobs without GPUs
unset SLURM_EXPORT_ENV    # --export is for this script: its step gets everything that is exported here

# a copy of the program beside this file stands before what is installed, and before the working folder
[[ ! -d $gpc_folder/gpc_dist ]] || export PYTHONPATH=$gpc_folder${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1

export MASTER_ADDR MASTER_PORT
MASTER_ADDR=127.0.0.1  # on one node nobody else has to find it
(( SLURM_JOB_NUM_NODES == 1 )) || MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# a port of this job and of this start of it, below those that the system hands out
MASTER_PORT=$((20000 + (8 * SLURM_JOB_ID + gpc_restarts % 8) % 12000))

# What only the programs of this start of the job know: srun takes the environment to the nodes, and others cannot read it.
gpc_secret() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# Run the job's only step, given as srun's command line, and end the script with its exit code.
gpc_run() {
  local step
  "$@" &
  step=$!
  trap 'gpc_say "asked to stop"; kill -USR2 "$step"' USR2 INT
  trap 'gpc_say "ended by Slurm"' TERM  # which tells the ranks itself
  while kill -0 "$step" 2> /dev/null; do wait "$step"; done  # a trapped signal interrupts wait
  wait "$step"
  gpc_finish $?
}
