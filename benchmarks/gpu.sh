#!/usr/bin/env bash
# Everything that needs a GPU: the gpu-marked tests, training with NCCL and with gloo on one GPU, and the benchmarks.
#
#   bash benchmarks/gpu.sh [PYTHON]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${1:-python3}
OUT=$(mktemp -d)

echo "== tests"
"$PYTHON" -m pytest -m gpu tests
for ranks in 1 2 4; do
  echo "== training, $ranks rank(s)"
  backend=gloo
  if [ "$ranks" -eq 1 ]; then backend=nccl; fi
  "$PYTHON" launch/torchrun.py --standalone --local-addr=127.0.0.1 --nproc-per-node="$ranks" -m dhf.train \
    --device cuda --backend "$backend" --dtype float64 --steps 10 --run-dir "$OUT/$ranks"
done
"$PYTHON" - "$OUT" <<'CHECK'
import json, pathlib, sys

losses = {p.parent.name: [json.loads(row)["loss_after"] for row in p.open()] for p in pathlib.Path(sys.argv[1]).glob("*/metrics.jsonl")}
worst = max(abs(a / b - 1) for run in losses.values() for a, b in zip(run, losses["1"]))
print(f"largest relative difference of a loss between 1, 2 and 4 ranks after 10 steps: {worst:.1e}")
sys.exit(worst > 1e-6)
CHECK
echo "== benchmarks"
"$PYTHON" benchmarks/seed_reuse.py --device cuda
"$PYTHON" benchmarks/overhead.py --device cuda
rm -rf "$OUT"
