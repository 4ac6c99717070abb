# shellcheck shell=bash
# Sourced by the launch scripts: `set_up EXTRAS` makes .venv if it is missing or stale, and installs dhf[EXTRAS] into it.
# PYTHON names another interpreter (3.10 or newer) than python3.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

set_up() {
  local extras=$1 python=${PYTHON:-python3} stamp
  command -v "$python" >/dev/null || {
    echo "error: $python was not found; install Python 3.10 or newer, or set PYTHON" >&2
    return 2
  }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version) is too old; dhf needs Python 3.10 or newer: set PYTHON" >&2
    return 2
  }
  local version='import sys; print(sys.version.split()[0])'
  stamp="$extras $(cat "$ROOT/pyproject.toml" "$ROOT/launch/constraints.txt" | "$python" -c '
import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
  # two launches at once must not install into one another
  exec 9>"$ROOT/.venv.lock"
  if command -v flock >/dev/null; then flock 9; fi
  if [ "$("$VENV/bin/python" -c "$version" 2>/dev/null)" != "$("$python" -c "$version")" ]; then
    echo "set-up: making $VENV"
    "$python" -m venv --clear "$VENV" || {
      echo "error: python could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
      return 2
    }
  elif grep -qxF "$stamp" "$VENV/dhf-installed" 2>/dev/null; then
    exec 9>&-
    return 0
  fi
  echo "set-up: installing dhf[$extras] (once; torch is a large download)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$ROOT/launch/constraints.txt" --editable "${ROOT}[$extras]" || {
    echo "error: pip could not install dhf[$extras]; see above" >&2
    return 2
  }
  echo "$stamp" >>"$VENV/dhf-installed"
  exec 9>&-
}

# take_ranks ARGUMENT: set RANKS to it if it is a number, else to 4, and say which by the status
take_ranks() {
  RANKS=4
  [[ $1 =~ ^[0-9]+$ ]] || return 1
  RANKS=$1
  if [ "$RANKS" -lt 1 ]; then
    echo "error: $RANKS ranks; give 1 or more" >&2
    exit 2
  fi
}

# check_flags FLAGS...: refuse flags of dhf.train that do not parse, once and not by every rank; answer --help and --print-config
check_flags() {
  local flag
  "$VENV/bin/python" -m dhf.train "$@" --print-config >/dev/null || exit $?
  for flag in "$@"; do
    case $flag in --help | -h | --print-config*) exec "$VENV/bin/python" -m dhf.train "$@" ;; esac
  done
}

# find_mpirun HINT: set MPIRUN_COMMAND to MPIRUN, split at spaces, or to the mpich that set-up installs; HINT ends the error
find_mpirun() {
  MPIRUN_COMMAND=("$VENV/bin/mpiexec")
  if [ -n "${MPIRUN:-}" ]; then read -r -a MPIRUN_COMMAND <<<"$MPIRUN"; fi
  command -v "${MPIRUN_COMMAND[0]}" >/dev/null || {
    echo "error: ${MPIRUN_COMMAND[0]} was not found; set MPIRUN to your MPI's mpirun$1" >&2
    return 2
  }
}
