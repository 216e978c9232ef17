from __future__ import annotations

import pytest
import torch
from ops_checks import (
    ACTIVATIONS,
    EXPERTS,
    assert_as_exact_as_torch,
    assert_same,
    choices,
    layer,
    operands,
    values_and_grads,
)
from torch import Tensor

from supermoe import ops
from supermoe.ops import experts, reference

ROUNDING = 1e-5  # fp32 sums over at most 100 rows of products of order 1


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 24 rows, so that experts begin and end inside chunks and lie across several."""
    monkeypatch.setattr(experts, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(experts, "_SMALL_CHUNK_BYTES", 0)
    monkeypatch.setattr(experts, "_MIN_CHUNK", 24)


def dropping(expert_NK: Tensor) -> Tensor:
    dropped_NK = expert_NK.clone()
    dropped_NK[::3, 0] = -1
    dropped_NK[5:6] = -1
    return dropped_NK


def loads() -> dict[str, Tensor]:
    """Choices of 63 tokens, even and uneven."""
    return {
        "spread": choices(63, 2),
        "every": choices(63, EXPERTS),
        "dropped": dropping(choices(63, 2)),
        "dropped in front": torch.tensor([[-1], [2], [0]]),
        "last two empty": choices(63, 2, experts=2),
        "first empty": choices(63, 2, experts=3) + 1,
        "all on one": torch.full((63, 1), 2),
        "one token": torch.tensor([[3, 1]]),
        "none": torch.zeros(0, 2, dtype=torch.int64),
        "none kept": torch.full((7, 2), -1),
    }


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("load", loads())
def test_agrees_with_the_reference(load: str, low_memory: bool) -> None:
    expert_NK = loads()[load]
    inputs = operands(*expert_NK.shape)
    ours, theirs = (layer(module, expert_NK, "gelu", low_memory) for module in (experts, reference))
    assert_same(ours, theirs, inputs, tolerance=ROUNDING)  # of a sum: a gradient with stride 0
    assert_same(ours, theirs, inputs, torch.linspace(-1, 1, len(expert_NK))[:, None], ROUNDING)
    exact = [tensor.double() for tensor in inputs]
    assert_same(ours, theirs, exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_activations_in_every_layout(activation: str, low_memory: bool) -> None:
    expert_NK, inputs = dropping(choices(100, 2)), operands(100, 2, activation)
    ours, theirs = (layer(module, expert_NK, activation, low_memory) for module in (experts, reference))
    assert_same(ours, theirs, inputs, tolerance=ROUNDING)
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_exact_as_torch(ours, theirs, inputs, dtype)


@pytest.mark.parametrize("load", [name for name in loads() if name != "none"])
def test_sixteen_bits_are_as_exact_as_torch(load: str) -> None:
    expert_NK = loads()[load]
    pair = (layer(experts, expert_NK), layer(reference, expert_NK))
    assert_as_exact_as_torch(*pair, operands(*expert_NK.shape), torch.bfloat16)


def test_odd_widths() -> None:
    expert_NK = choices(63, 2)
    x, g, w_in, w_out = operands(63, 2)
    odd = x[:, :15], g, w_in[:, :15, :31], w_out[:, :31, :15]
    assert_same(layer(experts, expert_NK), layer(reference, expert_NK), odd, tolerance=ROUNDING)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    x, g, w_in, w_out = operands(5, 2, activation, experts=3)
    columns = 6 if activation == "swiglu" else 3
    small = x[:, :2], g, w_in[:, :2, :columns], w_out[:, :3, :2]
    leaves = [tensor.double().requires_grad_() for tensor in small]
    assert torch.autograd.gradcheck(layer(experts, choices(5, 2, experts=3), activation), leaves)


def test_uninitialised_memory_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    expert_NK = choices(63, 2, experts=3)
    torch.use_deterministic_algorithms(True)  # which fills torch.empty with NaN
    try:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [tensor.to(dtype) for tensor in operands(63, 2)]
            assert all(value.isfinite().all() for value in values_and_grads(layer(experts, expert_NK), inputs))
    finally:
        torch.use_deterministic_algorithms(False)


def test_low_memory_keeps_no_hidden_rows() -> None:
    x, g, w_in, w_out = (tensor.requires_grad_() for tensor in operands(100, 2))
    kept = []
    for low_memory in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            ops.expert_ffn(x, choices(100, 2), g, w_in, w_out, "gelu", low_memory)
        kept.append(sum(sizes))
    inputs = sum(tensor.numel() for tensor in (x, g, w_in, w_out))
    assert kept[1] <= inputs + g.numel()  # with the weights in the dtype of the products
    assert kept[0] >= kept[1] + 200 * (2 * 32 + 16)
