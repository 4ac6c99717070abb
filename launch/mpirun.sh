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

RANKS=4
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  RANKS=$1
  shift
fi
if [ "$RANKS" -lt 1 ]; then
  echo "error: $RANKS ranks; give 1 or more" >&2
  exit 2
fi
set_up plot,mpi || exit $?

# flags that do not parse are refused once, here, and not by every rank
"$VENV/bin/python" -m dhf.train "$@" --print-config >/dev/null || exit $?
for flag in "$@"; do
  case $flag in --help | -h | --print-config*) exec "$VENV/bin/python" -m dhf.train "$@" ;; esac
done

mpirun=("$VENV/bin/mpiexec")
if [ -n "${MPIRUN:-}" ]; then read -r -a mpirun <<<"$MPIRUN"; fi
command -v "${mpirun[0]}" >/dev/null || {
  echo "error: ${mpirun[0]} was not found; set MPIRUN to your MPI's mpirun" >&2
  exit 2
}
version=$("${mpirun[@]}" --version 2>/dev/null | tr -s ' \t' ' ' | grep -m 1 -i -E 'version|open mpi|intel' || echo "unknown version")
echo "mpirun: $RANKS ranks by ${mpirun[*]} (${version# })"
exec "${mpirun[@]}" -n "$RANKS" "$VENV/bin/python" -m dhf.train "$@"
