"""Dropout from random bytes made in bulk: on a CPU the generator, not the multiplication, is what dropout waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from supermoe.ops import reference


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """See `supermoe.ops.dropout`: on a CPU keeps where a random byte reaches p * 256."""
    if x.device.type != "cpu":
        return reference.dropout(x, p, training)
    if not training or p == 0:
        return x
    return _Dropout.apply(x, min(max(round(p * 256), 1), 255))


class _Dropout(torch.autograd.Function):
    """Keeps the bytes for the backward, a quarter of what a mask of floats takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(
            -(2**63), None
        )  # random_() leaves bit 63 out
        ctx.bytes, ctx.dropped = words.view(torch.uint8)[: x.numel()].view(x.shape), dropped
        return _kept(ctx.bytes, dropped, x.dtype).mul_(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _kept(ctx.bytes, ctx.dropped, grad.dtype).mul_(grad), None


def _kept(random: Tensor, dropped: int, dtype: torch.dtype) -> Tensor:
    """0 where the byte is below `dropped`, else the scale that keeps the mean."""
    # Bytes are whole numbers in every float type, bfloat16 included; comparing floats is what the CPU vectorises.
    return random.to(dtype).ge_(dropped).mul_(256 / (256 - dropped))
