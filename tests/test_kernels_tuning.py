from __future__ import annotations

import sys
from pathlib import Path

import pytest
from kernel_tests import needs_device

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import tune_tiles

from supermoe.kernels import tiles

pytestmark = needs_device


def test_every_choice_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(tune_tiles.torch.cuda, "is_available", lambda: False)
    shape = tune_tiles.TINY[0]
    (rows,) = [tune_tiles.measure(shape, "cpu", tune_tiles.torch.float32)]
    tune_tiles.report(rows)
    printed = capsys.readouterr().out
    open_choices = {kernel for (kernel, _, _), candidates in tiles.TILES.items() if len(candidates) > 1}
    for kernel in open_choices - {"fused_fwd"}:  # its candidates differ in nothing but what the layer shows
        assert kernel in printed
    for part in ("router, PyTorch", "plan", "layer, several kernels"):
        assert part in printed
