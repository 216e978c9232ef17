"""What the benchmarks of experts are compared with computes what it should, as far as it is installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
contenders = importlib.import_module("moe_contenders")

DIM, HIDDEN, EXPERTS = 16, 32, 4


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    yield
    contenders.leave_group()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", contenders.CONTENDERS)
def test_output_and_gradients(name: str, k: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if torch.float32 in contenders.CONTENDERS[name].dtypes else torch.bfloat16
    layer = contenders.make(name, DIM, HIDDEN, EXPERTS, k, dtype, device)
    if isinstance(layer, str):
        pytest.skip(layer)
    x_ND = torch.randn(64, DIM, device=device, dtype=dtype, requires_grad=True)
    y_ND = layer(x_ND)
    loss = y_ND.float().square().sum()
    grads = torch.autograd.grad(loss, [x_ND, *layer.parameters()])
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
    if layer.exact:
        truth_ND = contenders.expected(name, x_ND.float(), HIDDEN, EXPERTS, k)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05  # sums of 32 products; a few roundings of 1/256
        torch.testing.assert_close(y_ND.float(), truth_ND, rtol=tolerance, atol=tolerance)
        (truth_grad,) = torch.autograd.grad(truth_ND.square().sum(), x_ND)
        torch.testing.assert_close(grads[0].float(), truth_grad.float(), rtol=10 * tolerance, atol=10 * tolerance)


def test_what_is_absent_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tutel", None)
    assert contenders.make("tutel", DIM, HIDDEN, EXPERTS, 2, torch.float32, "cpu").startswith("tutel: ")
    assert "top-2, not top-1" in contenders.make("fairscale", DIM, HIDDEN, EXPERTS, 1, torch.float32, "cpu")
    assert "on cuda only" in contenders.make("liger", DIM, HIDDEN, EXPERTS, 2, torch.bfloat16, "cpu")


def test_gated_weights_are_twice_as_wide() -> None:
    shapes = [w.shape for w in contenders.draw("swiglu", DIM, HIDDEN, EXPERTS)]
    assert shapes == [(EXPERTS, DIM), (EXPERTS, DIM, 2 * HIDDEN), (EXPERTS, HIDDEN, DIM)]
