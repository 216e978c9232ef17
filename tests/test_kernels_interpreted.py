from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")


@pytest.mark.timeout(600)  # half a minute of CPU time, on a machine that is busy
@pytest.mark.parametrize("name", ["permute", "gating", "experts", "tuning"])
def test_in_the_interpreter(name: str) -> None:
    """In a process of its own: whether kernels are interpreted is decided once, when Triton is imported."""
    test = Path(__file__).with_name(f"test_kernels_{name}.py")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", str(test)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=test.parents[1])
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
