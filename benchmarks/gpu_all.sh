#!/usr/bin/env bash
# Everything that waits for a GPU, in under nine minutes: tests of the kernels, tuning of their tiles, the layer.
# Rows land in benchmarks/results/. PYTHON names the interpreter, python3 by default.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=()

step() { # step SECONDS NAME COMMAND...: within its time, and whatever comes of it the rest goes on
  local seconds=$1 name=$2 start=$SECONDS
  shift 2
  echo "=== $name: $*"
  timeout "$seconds" "$@" || failed+=("$name")
  echo "=== $name took $((SECONDS - start)) s"
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "there is no CUDA device here" >&2; exit 1; }
"$python" -c 'import supermoe.kernels' 2>/dev/null || "$python" -m pip install -q --no-deps --no-build-isolation -e . || exit 1
"$python" -c 'from supermoe import ops; print(*(f"{name}: {state}" for name, state in ops.backends().items()), sep="\n")'

# without the project's own options: pytest's plug-ins may be missing, and warnings of other versions are no errors
tests=(tests/test_kernels_{permute,gating,experts}.py tests/test_ops_triton_moe.py)
step 150 tests "$python" -m pytest -q -o addopts= -o filterwarnings= "${tests[@]}"
step 110 tuning "$python" benchmarks/tune_tiles.py --quick
step 240 moe_layer "$python" benchmarks/moe_layer.py --device cuda --name moe_layer_gpu --dtypes bfloat16 \
  --tokens 65536 262144 --dims 256 512 1024 --experts 64 --choices 1 2 \
  --contenders grouped_mm "transformers grouped_mm" tutel scattermoe megablocks sonicmoe liger

if ((${#failed[@]})); then
  echo "failed or out of time: ${failed[*]}" >&2
  exit 1
fi
