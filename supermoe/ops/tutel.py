"""Expert feed-forwards between Tutel's kernels: rows go to padded buffers and back, in fp32 whatever their dtype.

Tutel (arXiv 2206.03382) counts a row's slot by a cumulative sum over one-hot masks, copies rows to their slots
(`fast_encode`) and fetches and weighs them (`fast_decode`). Every expert has the fullest one's room: nothing is dropped
here. Differentiable once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from supermoe.ops.reference import activate

_COUNTABLE = 2**31 - 1  # its kernels address elements with 32 bits


def refusal(op: str, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_in_EDF: Tensor, *others: Any) -> str | None:
    """Why Tutel cannot take these operands; None if it can."""
    if x_ND.dtype == torch.float64:
        return "Tutel moves rows in fp32, so that results in fp64 would be wrong from the eighth digit on"
    if x_ND.is_cuda and not hasattr(import_module("tutel_custom_kernel"), "inject_source"):
        return "this Tutel was built without CUDA"
    (num_tokens, dim), num_experts = x_ND.shape, len(w_in_EDF)
    if num_tokens * num_experts * dim > _COUNTABLE:  # no expert can have more rows than there are tokens
        room = int(_one_hot(expert_NK, num_experts).sum(dim=0).max())
        if max(num_tokens, num_experts * room) * dim > _COUNTABLE:
            return (
                f"the fullest of {num_experts} experts has {room} rows of width {dim}, and Tutel's padded buffer holds "
                f"fewer than 2^31 numbers; use smaller batches or a capacity factor"
            )
    return None


def expert_ffn(
    x_ND: Tensor,
    expert_NK: Tensor,
    weight_NK: Tensor,
    w_in_EDF: Tensor,
    w_out_EFD: Tensor,
    activation: str,
    low_memory: bool = False,
) -> Tensor:
    """See `supermoe.ops.expert_ffn`; `low_memory` changes nothing."""
    from tutel import moe

    # All first choices before all second ones, as Tutel's own routing has them; expert -1 has no mask and no slot.
    num_experts, k = len(w_in_EDF), expert_NK.shape[1]
    mask_RE = _one_hot(expert_NK, num_experts)
    slot_R = (moe.fast_cumsum_sub_one(mask_RE) * mask_RE).sum(dim=1)
    room = max(1, int(mask_RE.sum(dim=0).max()))
    expert_KN, weight_KN = expert_NK.t().contiguous(), weight_NK.t().contiguous()
    plan = (num_experts, expert_KN.unbind(), slot_R.view(k, -1).unbind(), weight_KN.unbind(), room, None)
    # In fp32 here already: Tutel keeps its kernels by device only, so that one call in fp16 would spoil those in fp32.
    rows_EGD = moe.fast_encode(x_ND.float().contiguous(), plan).to(x_ND.dtype)
    out_EGD = activate(rows_EGD @ w_in_EDF, activation) @ w_out_EFD
    return moe.fast_decode(out_EGD.float(), plan).to(x_ND.dtype)


def _one_hot(expert_NK: Tensor, num_experts: int) -> Tensor:
    """Which expert each row goes to -> int32 [K * N, E], first choices first."""
    expert_R = expert_NK.t().flatten()
    return (expert_R[:, None] == torch.arange(num_experts, device=expert_R.device)).int()
