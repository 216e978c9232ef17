from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from supermoe import ops
from supermoe.ops import attention, cross_entropy, grouped


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[None]:
    yield
    ops.use(None)


def layer(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, w_in, w_out = (torch.randn(*s, generator=generator).to(dtype) for s in [(9, 8), (3, 8, 16), (3, 16, 8)])
    routing = ops.route(torch.randn(9, 3, generator=generator), 2)
    return ops.expert_ffn(x, routing.expert_NK, routing.weight_NK, w_in, w_out, "gelu")


def test_forced_backends_agree() -> None:
    results = []
    for backend in ("reference", "torch", None):
        ops.use(backend)
        results.append(layer(torch.float32))
    torch.testing.assert_close(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_reference_is_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "expert_ffn", None)
    monkeypatch.setattr(attention, "history_attention", None)
    monkeypatch.setattr(cross_entropy, "linear_cross_entropy", None)
    ops.use("reference")
    layer(torch.float32)
    x, offsets = torch.randn(4, 1, 8), torch.tensor([0, 4])
    ops.history_attention(x, x, x, offsets, offsets)
    ops.linear_cross_entropy(x[:, 0], x[:, 0], None, torch.arange(4))


def test_autocast_sets_the_dtype_of_the_products() -> None:
    exact = layer(torch.float32)
    x, weight, target = torch.randn(30, 8), torch.randn(40, 8), torch.arange(30)
    loss = ops.linear_cross_entropy(x, weight, None, target)
    with torch.autocast("cpu", torch.bfloat16):
        rough, rough_loss = layer(torch.float32), ops.linear_cross_entropy(x, weight, None, target)
    for ours, expected in ((rough, exact), (rough_loss, loss)):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, expected)
        assert (ours - expected).norm() < 0.02 * expected.norm()  # a few roundings of 1/256


def test_autocast_leaves_fp64_alone() -> None:
    exact = layer(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(torch.float64), exact)


def test_dropout_of_the_reference_is_exact_in_p() -> None:
    torch.manual_seed(0)
    ops.use("reference")
    share = (ops.dropout(torch.ones(1_000_000), 0.001) == 0).float().mean()
    assert abs(share - 0.001) < 2e-4  # six standard errors; bytes would give 1/256
