"""Dropout from random bytes made in bulk: on a CPU the generator, not the multiplication, is what dropout waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """See `supermoe.ops.dropout`: keeps where a random byte reaches p * 256."""
    if not training or p == 0:
        return x
    dropped = min(max(round(p * 256), 1), 255)
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)  # random_() leaves bit 63 out
    # Bytes are whole numbers in every float type, bfloat16 included; comparing floats is what the CPU vectorises.
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape).to(x.dtype).ge_(dropped)
    return x * keep.mul_(256 / (256 - dropped))
