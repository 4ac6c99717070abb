#!/usr/bin/env bash
# Set up, and train with several ranks on this machine.
#
#   bash launch/local.sh [RANKS] [FLAGS OF dhf.train]
#
# RANKS is 4 by default; 1 runs one process without torchrun. PYTHON names the interpreter for set-up.
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

RANKS=4
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  RANKS=$1
  shift
fi
if [ "$RANKS" -lt 1 ]; then
  echo "error: $RANKS ranks; give 1 or more" >&2
  exit 2
fi
set_up plot || exit $?

# flags that do not parse are refused once, here, and not by every rank
"$VENV/bin/python" -m dhf.train "$@" --print-config >/dev/null || exit $?
for flag in "$@"; do
  case $flag in --help | -h | --print-config*) exec "$VENV/bin/python" -m dhf.train "$@" ;; esac
done
if [ "$RANKS" -eq 1 ]; then
  exec "$VENV/bin/python" -m dhf.train "$@"
fi

CORES=$("$VENV/bin/python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > RANKS ? CORES / RANKS : 1))}
exec "$VENV/bin/python" "$ROOT/launch/torchrun.py" --standalone --local-addr=127.0.0.1 --nproc-per-node="$RANKS" \
  -m dhf.train "$@"
