#!/usr/bin/env bash
# Everything that waits for a GPU, in under nine minutes: tests of the kernels, tuning of their tiles, the benchmarks.
# Rows land in benchmarks/results/. `QUICK=1` takes a few shapes only.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
quick=${QUICK:+--quick}
failed=()

step() { # step SECONDS NAME COMMAND...: one after the other, each within its time, the rest goes on
  local seconds=$1 name=$2
  shift 2
  echo "=== $name: $*"
  local start=$SECONDS
  timeout "$seconds" "$@" || failed+=("$name")
  echo "=== $name took $((SECONDS - start)) s"
}

"$python" -c 'import torch; assert torch.cuda.is_available()' || { echo "there is no CUDA device here" >&2; exit 1; }
"$python" -c 'import supermoe.kernels' 2>/dev/null || "$python" -m pip install -q --no-deps --no-build-isolation -e . || exit 1
"$python" -c 'import triton, torch; print("triton", triton.__version__, "torch", torch.__version__, torch.cuda.get_device_name())'

# without the project's own options: pytest's plug-ins may be missing, and warnings of other versions are no errors
tests=(tests/test_kernels_permute.py tests/test_kernels_gating.py tests/test_kernels_experts.py tests/test_ops_triton_moe.py)
step 150 tests "$python" -m pytest -q -o addopts= -o filterwarnings= "${tests[@]}"
step 100 tuning "$python" benchmarks/tune_tiles.py $quick
step 150 moe_layer "$python" benchmarks/moe_layer.py $quick
step 60 routing "$python" benchmarks/routing.py $quick
step 60 attention "$python" benchmarks/attention.py $quick

if ((${#failed[@]})); then
  echo "failed or out of time: ${failed[*]}" >&2
  exit 1
fi
