#!/usr/bin/env bash
# Set up, and run the tests.
#
#   bash launch/test.sh [--all] [ARGUMENTS OF pytest]
#
# --all runs the tests that take minutes, too.
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up plot,mpi,test || exit $?
cd "$ROOT"
exec "$VENV/bin/python" -m pytest "$@"
