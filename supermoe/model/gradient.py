"""Values that pass forward as they are and let only a share of their gradient flow back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def share_gradient(x: Tensor, share: float | Tensor) -> Tensor:
    """The same values, without a copy; their gradient times `share`.

    A scalar tensor is read when the gradient passes, so that it may be decided after the forward pass.
    """
    return _ShareGradient.apply(x, share)


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float | Tensor) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.share, None
