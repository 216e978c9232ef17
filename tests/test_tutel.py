"""The back end on Tutel, which is not on PyPI: these tests run wherever it has been built."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from ops_checks import ACTIVATIONS, EXPERTS, assert_as_exact_as_torch, assert_same, choices, layer, operands
from torch import Tensor

from supermoe import ops
from supermoe.config import MoEConfig
from supermoe.model.moe import MoE
from supermoe.ops import choice, reference, tutel

ROUNDING = 1e-5  # fp32 sums over at most 100 rows of products of order 1
absent = choice._off("tutel")
needs_tutel = pytest.mark.skipif(absent is not None, reason=str(absent))
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])])


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[None]:
    yield
    ops.use(None)


def check(expert_NK: Tensor, device: str, activation: str = "gelu", weights: Tensor | None = None) -> None:
    inputs = [tensor.to(device) for tensor in operands(*expert_NK.shape, activation)]
    expert_NK = expert_NK.to(device)
    weights = None if weights is None else weights.to(device)
    assert tutel.refusal("expert_ffn", inputs[0], expert_NK, *inputs[1:], activation) is None
    assert_same(layer(tutel, expert_NK, activation), layer(reference, expert_NK, activation), inputs, weights, ROUNDING)


@needs_tutel
@on_devices
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 100])
@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_agrees_with_the_reference(num_tokens: int, k: int, device: str) -> None:
    check(choices(num_tokens, k), device)  # the gradient has stride 0
    check(choices(num_tokens, k), device, weights=torch.linspace(-1, 1, num_tokens)[:, None])


@needs_tutel
@on_devices
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, device: str) -> None:
    check(choices(63, 2), device, activation)


@needs_tutel
@on_devices
def test_uneven_loads_and_dropped_rows(device: str) -> None:
    check(torch.full((63, 1), 2), device)  # all rows on one expert, the others empty
    expert_NK = choices(63, 2)
    expert_NK[::3, 0] = -1
    expert_NK[5] = -1
    check(expert_NK, device)
    check(torch.full((7, 2), -1), device)


@needs_tutel
@on_devices
def test_strided_operands(device: str) -> None:
    x, g, w_in, w_out = (tensor.to(device) for tensor in operands(20, 2))
    expert_NK = choices(20, 2).to(device)
    strided = [tensor.t().contiguous().t() for tensor in (x, expert_NK, g)]
    y = tutel.expert_ffn(*strided, w_in, w_out, "gelu")
    assert torch.equal(y, tutel.expert_ffn(x, expert_NK, g, w_in, w_out, "gelu"))


@needs_tutel
@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_torch(dtype: torch.dtype, device: str) -> None:
    expert_NK = choices(100, 2).to(device)
    inputs = [tensor.to(device) for tensor in operands(100, 2)]
    assert_as_exact_as_torch(layer(tutel, expert_NK), layer(reference, expert_NK), inputs, dtype)


@needs_tutel
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_a_whole_layer(capacity_factor: float | None) -> None:
    torch.manual_seed(0)
    moe = MoE(MoEConfig(experts=4, top_k=2, capacity_factor=capacity_factor), 16, "gelu")
    x_ND, results = torch.randn(50, 16), []
    for backend in ("reference", "tutel"):
        ops.use(backend)
        y_ND, routing = moe(x_ND)
        results.append([y_ND, *torch.autograd.grad(y_ND.square().sum(), list(moe.parameters()))])
        assert bool((routing.expert_NK < 0).any()) == (capacity_factor is not None)
    torch.testing.assert_close(results[0], results[1], rtol=ROUNDING, atol=ROUNDING)


@needs_tutel
def test_fp64_is_refused_with_the_reason() -> None:
    ops.use("tutel")
    x, g, w_in, w_out = (tensor.double() for tensor in operands(3, 1))
    with pytest.raises(ValueError, match=r"expert_ffn cannot run on the ops backend 'tutel'.*moves rows in fp32"):
        ops.expert_ffn(x, choices(3, 1), g, w_in, w_out, "gelu")
    assert ops.route(torch.zeros(2, 3, dtype=torch.float64), 1).probs_NE.dtype == torch.float64  # not Tutel's


def test_a_buffer_beyond_32_bits_is_refused() -> None:
    x_ND = torch.empty(1, 1).expand(2**20, 2**11)
    w_in_EDF = torch.empty(1, 1, 1).expand(4, 2**11, 8)
    even_NK = torch.arange(2**20)[:, None] % 4
    sizes = x_ND[:-4], even_NK[:-4], even_NK[:-4], w_in_EDF
    assert tutel.refusal("expert_ffn", *sizes, w_in_EDF.mT, "gelu") is None
    full_NK = torch.zeros_like(even_NK)
    reason = tutel.refusal("expert_ffn", x_ND, full_NK, full_NK, w_in_EDF, w_in_EDF.mT, "gelu")
    assert "fullest of 4 experts has 1048576 rows of width 2048" in str(reason)


def test_without_tutel_the_remedy_is_its_own_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tutel", None)
    choice._not_importable.cache_clear()
    assert ops.backends()["tutel"].startswith("off: the package `tutel` cannot be imported")
    with pytest.raises(ValueError, match=r"'tutel' cannot be used here.*github\.com/microsoft/Tutel"):
        ops.use("tutel")
    choice._not_importable.cache_clear()
