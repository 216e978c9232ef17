"""Where the tests of the kernels run: on a GPU, or with TRITON_INTERPRET=1 on a CPU in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")

# Read once, as Triton does: whether a kernel is interpreted is decided when it is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter multiplies the bit patterns of bf16 (triton#11584).
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]

needs_device = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU; test_kernels_interpreted.py runs it on a CPU"
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

if DEVICE == "cuda":  # what cuBLAS asks for in deterministic mode
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def repair_interpreter() -> None:
    """Loop bounds loaded from memory: numpy 2.4 no longer takes what Triton before 3.9 gives it (triton#9171)."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair


if INTERPRETED:
    repair_interpreter()
