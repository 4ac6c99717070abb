#!/usr/bin/env bash
# Set up, and train with ranks that mpirun starts and MPI connects.
#
#   bash launch/mpirun.sh [RANKS] [FLAGS OF dhf.train]
#
# RANKS is 4 by default. MPIRUN is the launcher with its options, by default the one of the mpich that set-up installs:
#
#   MPIRUN="mpirun --hostfile hosts" bash launch/mpirun.sh 8
#
# Any MPICH or Open MPI will do; .venv must then be seen by every host. --backend gloo or nccl has mpirun start the ranks only.
# PYTHON names the interpreter for set-up.
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if take_ranks "${1:-}"; then shift; fi
set_up plot,mpi || exit $?

check_flags "$@"

find_mpirun "" || exit $?
version=$("${MPIRUN_COMMAND[@]}" --version 2>/dev/null | tr -s ' \t' ' ' | grep -m 1 -i -E 'version|open mpi|intel' || echo "unknown version")
echo "mpirun: $RANKS ranks by ${MPIRUN_COMMAND[*]} (${version# })"
exec "${MPIRUN_COMMAND[@]}" -n "$RANKS" "$VENV/bin/python" -m dhf.train "$@"
