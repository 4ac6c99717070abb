#!/usr/bin/env bash
# Everything that needs a GPU: the gpu-marked tests, training with NCCL and with gloo on one GPU, and the benchmarks, whose numbers
# go to benchmarks/results/*-cuda.json. All parts run, whatever fails; the exit code says whether any did.
#
#   bash benchmarks/gpu.sh [PYTHON]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${1:-python3}
OUT_DIR=$(mktemp -d)
trap 'rm -rf "$OUT_DIR"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

part() {
  local name=$1
  shift
  echo "== $name"
  local began=$SECONDS
  "$@" || failed+=("$name")
  echo "   $((SECONDS - began)) s"
}

train() {
  local ranks=$1 backend=$2
  "$PYTHON" launch/torchrun.py --standalone --local-addr=127.0.0.1 --nproc-per-node="$ranks" -m dhf.train \
    --device cuda --backend "$backend" --dtype float64 --steps 10 --run-dir "$OUT_DIR/$ranks"
}

compare() {
  "$PYTHON" - "$OUT_DIR" <<'CHECK'
import json, pathlib, sys

losses = {p.parent.name: [json.loads(row)["loss_after"] for row in p.open()] for p in pathlib.Path(sys.argv[1]).glob("*/metrics.jsonl")}
worst = max(abs(a / b - 1) for run in losses.values() for a, b in zip(run, losses["1"], strict=True))
print(f"largest relative difference of a loss between {', '.join(sorted(losses))} ranks in 10 steps: {worst:.1e}")
sys.exit(worst > 1e-9 or len(losses) < 3)
CHECK
}

part "tests" "$PYTHON" -m pytest -m gpu tests -p no:cacheprovider
part "training, 1 rank, NCCL" train 1 nccl
part "training, 2 ranks, gloo" train 2 gloo
part "training, 4 ranks, gloo" train 4 gloo
part "the same losses" compare
part "solves" "$PYTHON" benchmarks/solves.py --device cuda
part "overhead" "$PYTHON" benchmarks/overhead.py --device cuda
part "seed" "$PYTHON" benchmarks/seed_reuse.py --device cuda
part "products" "$PYTHON" benchmarks/products.py --device cuda --dtype float32
part "products, float64" "$PYTHON" benchmarks/products.py --device cuda --dtype float64 --cases "deep autoencoder,PINN"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
