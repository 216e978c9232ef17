"""Softmax over a large vocabulary without [N, V] logits: chunks of rows that stay in cache, gradient made on the way.

For one chunk, P = softmax(x W^T + b) is the only [rows, V] tensor, and every pass over it is one of three matrix
products or the softmax itself. The targets' part of the gradient, -1 at each target, never touches P: it is one
weighted row of W per row of x, and one weighted row of x per row of W. The bias is a column of ones beside x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supermoe.ops.reference import widen

_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # of P: on a CPU what stays in one core's L2 cache
_MIN_ROWS = 64  # below this the matrix products lose more than the cache gives


class _Targets(NamedTuple):
    """Row n's targets are `ids[offsets[n]:offsets[n + 1]]`, at least one, each weighing `share`."""

    offsets: Tensor  # int64 [N + 1]
    ids: Tensor  # int64 [T]
    row: Tensor  # int64 [T]
    share: Tensor  # [T], one over the size of its row's set


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, precision: torch.dtype | None = None
) -> Tensor:
    """See `supermoe.ops.linear_cross_entropy`."""
    asked_N = target_N >= 0
    ids = target_N[asked_N]
    row = torch.arange(len(ids) + 1, device=ids.device)
    targets = _Targets(row, ids, row[:-1], torch.ones_like(ids, dtype=widen(x_ND[:0]).dtype))
    return _on_rows(asked_N, x_ND, weight_VD, bias_V, targets, precision)


def linear_cross_entropy_sets(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    offsets_N: Tensor,
    ids: Tensor,
    precision: torch.dtype | None = None,
) -> Tensor:
    """See `supermoe.ops.linear_cross_entropy_sets`."""
    sizes_N = offsets_N.diff()
    asked_N = sizes_N > 0
    sizes = sizes_N[asked_N]
    row = torch.repeat_interleave(torch.arange(len(sizes), device=ids.device), sizes)
    offsets = F.pad(sizes.cumsum(0), (1, 0))
    targets = _Targets(offsets, ids, row, sizes[row].to(widen(x_ND[:0]).dtype).reciprocal())
    return _on_rows(asked_N, x_ND, weight_VD, bias_V, targets, precision)


def _on_rows(
    asked_N: Tensor,
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: _Targets,
    precision: torch.dtype | None,
) -> Tensor:
    """Losses of the rows that have targets, zeros elsewhere."""
    everywhere = len(targets.offsets) - 1 == len(x_ND)
    rows = None if everywhere else asked_N.nonzero().squeeze(1)
    loss = _LinearCrossEntropy.apply(
        x_ND if rows is None else x_ND.index_select(0, rows), weight_VD, bias_V, *targets, precision or x_ND.dtype
    )
    return loss if rows is None else loss.new_zeros(len(x_ND)).index_copy(0, rows, loss)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_VD, bias_V, offsets, ids, row, share, precision):
        targets = _Targets(offsets, ids, row, share)
        wanted = any(ctx.needs_input_grad[:3])
        loss_N, grads = _pass(x_ND, weight_VD, bias_V, targets, precision, wanted)
        ctx.precision = precision
        ctx.save_for_backward(x_ND, weight_VD, bias_V, *targets, *grads)
        return loss_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        x_ND, weight_VD, bias_V, *rest = ctx.saved_tensors
        grads = rest[4:]
        scale = grad_N[:1]
        if not torch.equal(grad_N, scale.expand_as(grad_N)):  # rows weigh differently: make the sums over rows anew
            _, grads = _pass(x_ND, weight_VD, bias_V, _Targets(*rest[:4]), ctx.precision, True, grad_N)
            scale = torch.ones_like(scale)
        dx_ND, dw_VD, *db_V = [g * scale if len(scale) else g for g in grads]
        return dx_ND.to(x_ND.dtype), dw_VD.to(weight_VD.dtype), *(db_V or [None]), None, None, None, None, None


def _pass(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: _Targets,
    precision: torch.dtype,
    with_grad: bool,
    scale_N: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Losses, and the gradients of their sum (weighted by `scale_N`) for x, weight and, if there is one, bias."""
    (num_rows, dim), num_classes = x_ND.shape, len(weight_VD)
    wide, device = targets.share.dtype, x_ND.device
    chunk = _chunk_rows(num_rows, num_classes * precision.itemsize, device)
    starts = range(0, num_rows, chunk)
    x_NK, weight_KV = _operands(x_ND, weight_VD, bias_V, len(starts) * chunk, precision)
    scaled_NK = x_NK
    if scale_N is not None:
        scaled_NK = x_NK * F.pad(scale_N, (0, len(x_NK) - num_rows))[:, None].to(precision)
    dx_ND = torch.empty(len(x_NK), dim, dtype=wide, device=device)
    dw_KV = torch.zeros(weight_KV.shape, dtype=wide, device=device)
    p_RV = torch.empty(chunk, num_classes, dtype=precision, device=device)
    p_T = torch.empty_like(targets.share)
    place_T = targets.row % chunk * num_classes + targets.ids  # in its chunk's P
    first_target = targets.offsets[[*starts, num_rows]].tolist()
    with torch.autocast(device.type, enabled=False):
        for start, first, last in zip(starts, first_target[:-1], first_target[1:], strict=True):
            rows = slice(start, start + chunk)
            torch.mm(x_NK[rows], weight_KV, out=p_RV)
            torch.softmax(p_RV, dim=1, out=p_RV)
            p_T[first:last] = p_RV.take(place_T[first:last])
            if with_grad:
                dx_ND[rows] = p_RV @ weight_KV[:dim].t()
                dw_KV += scaled_NK[rows].t() @ p_RV
        log_p_T = _log(p_T, targets, x_NK, weight_KV, chunk)
        loss_N = p_T.new_zeros(num_rows).index_add_(0, targets.row, log_p_T * targets.share, alpha=-1)
        if not with_grad:
            return loss_N, []
        return loss_N, _finish(dx_ND[:num_rows], dw_KV, x_ND, weight_VD, bias_V, targets, scale_N)


def _chunk_rows(num_rows: int, row_bytes: int, device: torch.device) -> int:
    """Rows of a chunk; all chunks have one size, the last is filled up, and sizes come in steps.

    On a CPU the 16-bit products compile and keep a kernel per size.
    """
    fitting = _CHUNK_BYTES[device.type] // row_bytes // _MIN_ROWS * _MIN_ROWS
    return max(_MIN_ROWS, min(fitting, -(-num_rows // _MIN_ROWS) * _MIN_ROWS))


def _operands(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, num_rows: int, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x, with zero rows up to `num_rows`, and weight^T; a bias is a row of weight^T beside a column of ones in x."""
    (num_real, dim), extra = x_ND.shape, int(bias_V is not None)
    x_NK = x_ND.new_zeros(num_rows, dim + extra, dtype=precision)
    x_NK[:num_real, :dim] = x_ND
    x_NK[:num_real, dim:] = 1
    weight_KV = weight_VD.t().to(precision)
    if bias_V is None:
        return x_NK, weight_KV.contiguous()
    return x_NK, torch.cat([weight_KV, bias_V[None].to(precision)])


def _log(p_T: Tensor, targets: _Targets, x_NK: Tensor, weight_KV: Tensor, chunk: int) -> Tensor:
    """log p of each target; where p underflowed, from the logits once more."""
    log_p_T = p_T.log()
    for lost in (p_T < torch.finfo(x_NK.dtype).tiny).nonzero().squeeze(1).split(chunk):
        log_p_RV = widen(x_NK[targets.row[lost]] @ weight_KV).log_softmax(dim=1)
        log_p_T[lost] = log_p_RV.gather(1, targets.ids[lost, None]).squeeze(1)
    return log_p_T


def _finish(
    dx_ND: Tensor,
    dw_KV: Tensor,
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: _Targets,
    scale_N: Tensor | None,
) -> list[Tensor]:
    """Take the targets' part off the gradients that P alone gives."""
    offsets, ids, row, share = targets
    dx_ND -= F.embedding_bag(ids, weight_VD.to(share.dtype), offsets[:-1], mode="sum", per_sample_weights=share)
    if scale_N is not None:
        dx_ND *= scale_N[:, None]
        share = share * scale_N[row]
    dw_VD = dw_KV[: x_ND.shape[1]].t().contiguous()
    dw_VD.index_add_(0, ids, x_ND[row].to(share.dtype) * share[:, None], alpha=-1)
    if bias_V is None:
        return [dx_ND, dw_VD]
    return [dx_ND, dw_VD, dw_KV[-1].index_add(0, ids, share, alpha=-1)]
