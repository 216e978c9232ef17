from __future__ import annotations

import pytest
import torch

from supermoe.ops import random_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.999])
def test_share_and_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = random_bytes.dropout(torch.ones(100_001, dtype=dtype), p).double()
    actual_p = min(max(round(256 * p), 1), 255) / 256
    share = (x == 0).double().mean()
    assert abs(share - actual_p) < 5 * (actual_p * (1 - actual_p) / len(x)) ** 0.5  # five standard errors
    torch.testing.assert_close(x[x != 0], torch.full_like(x[x != 0], 1 / (1 - actual_p)), rtol=0.004, atol=0)  # bf16


def test_every_byte_of_the_words_is_random() -> None:
    torch.manual_seed(0)
    dropped_8 = (random_bytes.dropout(torch.ones(8 * 20_000), 0.5) == 0).view(-1, 8).float().mean(dim=0)
    assert ((dropped_8 - 0.5).abs() < 0.02).all()  # five standard errors are 0.018


def test_gradient_passes_where_values_do() -> None:
    x = torch.randn(63, 5, requires_grad=True)
    y = random_bytes.dropout(x, 0.3)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)


def test_repeats_under_seed_and_state() -> None:
    x = torch.randn(7, 9)
    torch.manual_seed(3)
    first = random_bytes.dropout(x, 0.5)
    state = torch.get_rng_state()
    second = random_bytes.dropout(x, 0.5)
    torch.set_rng_state(state)
    assert torch.equal(second, random_bytes.dropout(x, 0.5))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, random_bytes.dropout(x, 0.5))


def test_off_when_not_training_or_p_is_zero() -> None:
    x = torch.randn(4)
    assert random_bytes.dropout(x, 0.5, training=False) is x
    assert random_bytes.dropout(x, 0.0) is x
    assert random_bytes.dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
