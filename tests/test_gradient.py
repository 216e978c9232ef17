from __future__ import annotations

import torch

from supermoe.model.gradient import share_gradient


def test_values_pass_and_a_share_of_the_gradient_returns() -> None:
    x = torch.randn(3, requires_grad=True)
    y = share_gradient(x, 0.25)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert torch.equal(x.grad, 0.25 * 2 * x.detach())


def test_a_tensors_share_is_read_when_the_gradient_passes() -> None:
    x, share_T = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float64)
    loss = sum(share_gradient(x, share).sum() for share in share_T)
    share_T.copy_(torch.tensor([0.0, 3.0]))
    loss.backward()
    assert x.grad.tolist() == [3.0, 3.0]
    assert x.grad.dtype == torch.float32
