#!/usr/bin/env bash
# Set up, and train with several ranks on this machine.
#
#   bash launch/local.sh [RANKS] [FLAGS OF dhf.train]
#
# RANKS is 4 by default; 1 runs one process without torchrun. PYTHON names the interpreter for set-up.
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if take_ranks "${1:-}"; then shift; fi
set_up plot || exit $?

check_flags "$@"
if [ "$RANKS" -eq 1 ]; then
  exec "$VENV/bin/python" -m dhf.train "$@"
fi

CORES=$("$VENV/bin/python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > RANKS ? CORES / RANKS : 1))}
exec "$VENV/bin/python" "$ROOT/launch/torchrun.py" --standalone --local-addr=127.0.0.1 --nproc-per-node="$RANKS" \
  -m dhf.train "$@"
