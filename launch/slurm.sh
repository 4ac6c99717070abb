# shellcheck shell=bash
# Sourced by slurm_*.sbatch: what a batch script does before and after the ranks. `begin`, `say_start`, then `run_ranks`.
#
# A job is requeued by this script when its time is nearly over, or when a partition with a GraceTime pre-empts it: SLURM
# itself requeues only a job that is still running when it pre-empts it. Nothing else is requeued.

# shellcheck source=launch/setup.sh
. "$ROOT/launch/setup.sh"

say() { echo "slurm: $*"; }

WARNED=     # SLURM has announced the end of the job's time, by SIGUSR2 to this shell alone (--signal=B:USR2@SECONDS)
ENDED=      # SLURM ends the job, by SIGTERM to all its processes: pre-empted, cancelled, or out of time
FORWARD=    # the process that passes SIGUSR2 on to the ranks
SIGNALLED=
ATTEMPT=$((${SLURM_RESTART_COUNT:-0} + 1))
# SLURM_JOB_ID alone may name the whole array
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}

# the ranks hear of it from srun; otherwise their own clock stops them 60 seconds before the end
trap 'WARNED=1 SIGNALLED=1; say "SIGUSR2: the time is nearly over"; [ -z "$FORWARD" ] || kill -USR2 "$FORWARD"' USR2
trap 'ENDED=1 SIGNALLED=1' TERM

# begin EXTRAS THREADS FLAGS...: set up, and set FLAGS, RUN_DIR, MASTER_ADDR and MASTER_PORT
begin() {
  local extras=$1 threads=$2 flag
  shift 2
  set_up "$extras" || exit $?
  # what the shell that submitted the job was started with is not about this job
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID
  # an array job's %a is the number of the task
  FLAGS=(--run-dir "runs/slurm-$JOB" --resume auto --threads "$threads" "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
  for flag in "$@"; do
    case $flag in --help | -h | --print-config*) exec "$VENV/bin/python" -m dhf.train "${FLAGS[@]}" ;; esac
    [ "$flag" != --overwrite ] || {
      echo "error: --overwrite would start anew after every requeue; leave it out: each job has a run directory of its own" >&2
      exit 2
    }
  done
  # flags that do not parse are refused once, here, and not by every rank
  RUN_DIR=$("$VENV/bin/python" -c '
import sys
from dhf.errors import UsageError
from dhf.run.config import parse
try:
    print(parse(sys.argv[1:]).run_dir)
except UsageError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)' "${FLAGS[@]}") || exit $?
  # whatever the first start went on from, a restart goes on from the job's own checkpoint
  if [ "$ATTEMPT" -gt 1 ] && [ -e "$RUN_DIR/checkpoints/LATEST" ]; then FLAGS+=(--resume auto); fi
  mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${MASTER_ADDR:-$(address_of "${NODES[0]}")}
  # below the ports that the system gives out; another one for every job and attempt
  export MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 17 + ATTEMPT) % 12000))}
  local end
  # older versions of SLURM do not set it
  end=$(date -d "$(squeue -h -j "$JOB" -o %e)" +%s 2>/dev/null) && export SLURM_JOB_END_TIME=$end
}

# address_of NODE: its address, since not every cluster's names of nodes resolve
address_of() { scontrol -o show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p'; }
export -f address_of

say_start() { # RANKS HOW
  say "job $JOB, attempt $ATTEMPT: $1 ranks on ${#NODES[@]} node(s) (${NODES[*]}), $2, run directory $RUN_DIR"
}

# run_ranks COMMAND...: start the ranks and wait for them; ends the script with dhf.train's exit code
run_ranks() {
  local code result checkpoint pid
  checkpoint=$(latest)
  result=$(identity)
  "$@" &
  pid=$!
  # mpich's mpirun would die of it
  if [ "$1" = srun ]; then FORWARD=$pid; fi
  while :; do
    SIGNALLED=
    wait "$pid" && code=0 || code=$?
    [ -n "$SIGNALLED" ] || break
  done
  FORWARD=
  REASON=
  if [ "$(identity)" != "$result" ] && [ -e "$RUN_DIR/result.json" ]; then
    # launchers flatten exit codes
    local said=$code
    code=$(from_result exit_code)
    REASON=$(from_result reason)
    say "exit code $code ($REASON), from $RUN_DIR/result.json; the launcher's was $said"
  else
    # SIGUSR2 ends a rank that has not got as far as to wait for it
    if [ -n "$WARNED" ] && [ "$code" = 140 ]; then code=75; fi
    case $code in
      0 | 2 | 3 | 4 | 5 | 75) say "exit code $code" ;;
      *) say "exit code 5: the launcher's was $code, and there is no result of this attempt" && code=5 ;;
    esac
  fi
  settle "$code" "$checkpoint"
  exit "$code"
}

# settle CODE CHECKPOINT: requeue the job if that is due, and say why or why not
settle() {
  local job state preempted why most=${DHF_MAX_RESTARTS:-50}
  [ "$1" = 75 ] || { say "not requeued: the run did not stop for a signal or the end of time" && return; }
  job=$(scontrol -o show job "$JOB")
  state=$(sed -n 's/.* JobState=\([^ ]*\) .*/\1/p' <<<"$job")
  preempted=$(sed -n 's/.* PreemptTime=\([^ ]*\) .*/\1/p' <<<"$job")
  if [ -n "$ENDED" ] || [ "$state" != RUNNING ]; then
    say "not requeued by this script: SLURM has ended the job, and requeues it if it was pre-empted"
    return
  fi
  if [ "${preempted:-None}" != None ]; then
    why="pre-empted"
  elif [ -z "$WARNED" ] && [ "$REASON" != TIME_LIMIT ]; then
    say "not requeued: it was stopped by a signal, and its time is not over"
    return
  elif [ "$(latest)" = "$2" ]; then
    say "not requeued: no step was done since the start, and another start would do none either; give it more --time"
    return
  else
    why="its time is nearly over"
  fi
  if [ "$ATTEMPT" -gt "$most" ]; then
    say "not requeued: it was restarted $most times (DHF_MAX_RESTARTS)"
    return
  fi
  say "requeueing: $why; it goes on at $(latest)"
  scontrol requeue "$JOB" || say "scontrol could not requeue it: sbatch --no-requeue, or the site forbids it"
}

latest() { cat "$RUN_DIR/checkpoints/LATEST" 2>/dev/null || echo step-0; }

identity() { stat -c '%i %y' "$RUN_DIR/result.json" 2>/dev/null; }

from_result() { sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}$/\1/p" "$RUN_DIR/result.json"; }
