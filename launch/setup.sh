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
