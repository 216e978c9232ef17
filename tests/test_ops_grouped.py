from __future__ import annotations

import pytest
import torch
from ops_checks import ACTIVATIONS, DIM, EXPERTS, assert_as_exact_as_torch, assert_same, choices, layer, operands
from torch import Tensor

from supermoe.ops import grouped, reference

ROUNDING = 1e-5  # fp32 sums over at most 100 rows of products of order 1


def check(expert_NK: Tensor, activation: str = "gelu", weights: Tensor | None = None, experts: int = EXPERTS) -> None:
    inputs = operands(*expert_NK.shape, activation, experts)
    assert_same(
        layer(grouped, expert_NK, activation), layer(reference, expert_NK, activation), inputs, weights, ROUNDING
    )


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 100])
@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_agrees_with_the_reference(num_tokens: int, k: int) -> None:
    check(choices(num_tokens, k))
    check(choices(num_tokens, k), weights=torch.linspace(-1, 1, num_tokens)[:, None])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    check(choices(63, 2), activation)


def test_one_expert() -> None:
    check(torch.zeros(9, 1, dtype=torch.int64), experts=1)


def test_uneven_loads() -> None:
    check(torch.full((63, 1), 2))  # all rows on one expert, the others empty
    check(choices(63, 2, experts=3))  # the last expert empty


def test_dropped_rows_add_nothing() -> None:
    expert_NK = choices(63, 2)
    expert_NK[::3, 0] = -1
    expert_NK[5] = -1
    check(expert_NK)
    check(torch.full((7, 2), -1))
    x, g, w_in, w_out = operands(63, 2)
    assert not grouped.expert_ffn(x, expert_NK, g, w_in, w_out, "gelu")[5].any()


def test_reference_against_a_loop_over_tokens() -> None:
    expert_NK = choices(9, 2)
    expert_NK[4, 1] = -1
    x, g, w_in, w_out = (tensor.double() for tensor in operands(9, 2))
    expected = torch.stack(
        [
            sum(
                (
                    g[n, j] * (torch.relu(x[n] @ w_in[e]) ** 2 @ w_out[e])
                    for j, e in enumerate(expert_NK[n].tolist())
                    if e >= 0
                ),
                start=torch.zeros(DIM, dtype=torch.float64),
            )
            for n in range(9)
        ]
    )
    torch.testing.assert_close(reference.expert_ffn(x, expert_NK, g, w_in, w_out, "relu2"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    expert_NK = choices(100, 2)
    assert_as_exact_as_torch(layer(grouped, expert_NK), layer(reference, expert_NK), operands(100, 2), dtype)


def test_gradcheck_of_the_reference() -> None:
    x, g, w_in, w_out = operands(5, 2, experts=3)
    small = x[:, :2], g, w_in[:, :2, :3], w_out[:, :3, :2]
    leaves = [tensor.double().requires_grad_() for tensor in small]
    assert torch.autograd.gradcheck(layer(reference, choices(5, 2, experts=3)), leaves)


def test_gradcheck_of_dispatch_and_combine() -> None:
    order = torch.tensor([3, 0, 4, 1])  # of 3 tokens x 2 choices; pairs 2 and 5 are dropped
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: grouped._Dispatch.apply(x, order, 2), (x,))
    assert torch.autograd.gradcheck(lambda r, w: grouped._Combine.apply(r, w, order), (rows, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_widths_and_dtypes_that_grouped_mm_does_not_take(dtype: torch.dtype) -> None:
    expert_NK = choices(63, 2, experts=3)
    expert_NK[::5, 1] = -1
    x, g, w_in, w_out = (tensor.to(dtype) for tensor in operands(63, 2))
    odd = x[:, :15], g, w_in[:, :15, :31], w_out[:, :31, :15]
    tolerance = ROUNDING if dtype == torch.float32 else 1e-12
    assert_same(layer(grouped, expert_NK), layer(reference, expert_NK), odd, tolerance=tolerance)
