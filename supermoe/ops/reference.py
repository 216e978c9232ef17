"""Every op in plain PyTorch: what correct means. Faster implementations are tested against it and fall back to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from supermoe.ops.packing import IndicatorPacking, Packing


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to: all that dispatch, losses and statistics see of a router."""

    expert_NK: Tensor  # int64, best first; -1: dropped
    weight_NK: Tensor  # fp32, of the experts' outputs
    counts_E: Tensor  # int64, tokens per expert
    probs_NE: Tensor  # fp32 scores of all experts, before any bias
    aux_loss: Tensor | None = None  # scalar; set by the router that has one
    # for the auxiliary losses, from a back end that has them at hand:
    mean_score_E: Tensor | None = None  # mean over tokens of the scores divided by their sum
    z: Tensor | None = None  # scalar, mean of logsumexp(logits)^2


def activate(hidden: Tensor, activation: str) -> Tensor:
    """The feed-forward's nonlinearity: [..., F] -> [..., F], and for `swiglu` [..., 2F] -> [..., F] (gate first)."""
    if activation == "gelu":
        return F.gelu(hidden)
    if activation == "silu":
        return F.silu(hidden)
    if activation == "relu2":
        return F.relu(hidden).square()
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value
    raise ValueError(f"activation must be gelu, silu, relu2 or swiglu, got {activation!r}")


def top_k(ranked_NE: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, largest first -> int64 [N, K]."""
    return ranked_NE.topk(k, dim=-1).indices


def route(
    logits_NE: Tensor,
    k: int,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    choose: Callable[[Tensor, int], Tensor] = top_k,
) -> Routing:
    """See `supermoe.ops.route`; `choose` finds the k best columns of every row."""
    if not 1 <= k <= logits_NE.shape[1]:
        raise ValueError(f"cannot choose k = {k} of {logits_NE.shape[1]} experts: model.moe.top_k must be 1 to experts")
    if score == "softmax":
        log_score_NE = logits_NE.log_softmax(dim=-1)
    elif score == "sigmoid":
        log_score_NE = F.logsigmoid(logits_NE)
    else:
        raise ValueError(f"score must be softmax or sigmoid, got {score!r}")
    probs_NE = log_score_NE.exp()
    with torch.no_grad():
        ranked_NE = probs_NE if bias_E is None else probs_NE + bias_E
        expert_NK = choose(ranked_NE, k)
        counts_E = torch.bincount(expert_NK.flatten(), minlength=logits_NE.shape[1])
    chosen_NK = log_score_NE.gather(1, expert_NK)
    # One normalised weight is the constant 1, which would leave the router without a gradient from the task.
    weight_NK = chosen_NK.exp() if k == 1 else chosen_NK.softmax(dim=-1)
    return Routing(expert_NK, weight_NK, counts_E, probs_NE)


def expert_ffn(
    x_ND: Tensor,
    expert_NK: Tensor,
    weight_NK: Tensor,
    w_in_EDF: Tensor,
    w_out_EFD: Tensor,
    activation: str,
    low_memory: bool = False,
) -> Tensor:
    """See `supermoe.ops.expert_ffn`: one pass over the experts, each on its own rows; `low_memory` changes nothing."""
    y_ND = torch.zeros_like(x_ND)
    for expert, (w_in_DF, w_out_FD) in enumerate(zip(w_in_EDF.unbind(0), w_out_EFD.unbind(0), strict=True)):
        token_R, slot_R = torch.where(expert_NK == expert)
        out_RD = activate(x_ND[token_R] @ w_in_DF, activation) @ w_out_FD
        y_ND = y_ND.index_add(0, token_R, (out_RD * weight_NK[token_R, slot_R, None]).to(y_ND.dtype))
    return y_ND


def history_attention(
    q_NHA: Tensor,
    k_JHA: Tensor,
    v_JHA: Tensor,
    q_offsets_S: Tensor,
    k_offsets_S: Tensor,
    packing: Packing | None = None,
) -> Tensor:
    """See `supermoe.ops.history_attention`: one read after the other, with an explicit mask and without `packing`."""
    outputs = []
    q_lengths, k_lengths = q_offsets_S.diff().tolist(), k_offsets_S.diff().tolist()
    for q_LHA, k_LHA, v_LHA in zip(q_NHA.split(q_lengths), k_JHA.split(k_lengths), v_JHA.split(k_lengths), strict=True):
        scores_HLL = torch.einsum("qha,kha->hqk", q_LHA, k_LHA) * q_NHA.shape[-1] ** -0.5
        past_LL = torch.ones(scores_HLL.shape[1:], dtype=torch.bool, device=q_NHA.device).tril(len(k_LHA) - len(q_LHA))
        weights_HLL = scores_HLL.masked_fill(~past_LL, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,kha->qha", weights_HLL, v_LHA))
    return torch.cat(outputs) if outputs else q_NHA.clone()


def indicator_attention(
    q_MHA: Tensor,
    k_self_MHA: Tensor,
    v_self_MHA: Tensor,
    k_NHA: Tensor,
    v_NHA: Tensor,
    offsets_S: Tensor,
    read_M: Tensor,
    visible_M: Tensor,
    packing: IndicatorPacking | None = None,
) -> Tensor:
    """See `supermoe.ops.indicator_attention`: one indicator after the other, without `packing`."""
    outputs = []
    starts, counts = offsets_S[read_M].tolist(), visible_M.tolist()
    for m, (start, count) in enumerate(zip(starts, counts, strict=True)):
        k_LHA = torch.cat([k_NHA[start : start + count], k_self_MHA[m : m + 1]])
        v_LHA = torch.cat([v_NHA[start : start + count], v_self_MHA[m : m + 1]])
        weights_HL = (torch.einsum("ha,kha->hk", q_MHA[m], k_LHA) * q_MHA.shape[-1] ** -0.5).softmax(dim=-1)
        outputs.append(torch.einsum("hk,kha->ha", weights_HL, v_LHA))
    return torch.stack(outputs) if outputs else q_MHA.clone()


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    precision: torch.dtype | None = None,
) -> Tensor:
    """See `supermoe.ops.linear_cross_entropy`: all logits at once."""
    logits_NV = _logits(x_ND, weight_VD, bias_V, precision)
    return F.cross_entropy(logits_NV, target_N, ignore_index=-1, reduction="none")


def linear_cross_entropy_sets(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    offsets_N: Tensor,
    ids: Tensor,
    precision: torch.dtype | None = None,
) -> Tensor:
    """See `supermoe.ops.linear_cross_entropy_sets`: all logits at once."""
    log_p_NV = _logits(x_ND, weight_VD, bias_V, precision).log_softmax(dim=-1)
    sizes_N = offsets_N.diff()
    row = torch.repeat_interleave(torch.arange(len(sizes_N), device=ids.device), sizes_N)
    share = sizes_N.to(log_p_NV.dtype).reciprocal()[row]
    return -log_p_NV.new_zeros(len(sizes_N)).index_add(0, row, log_p_NV[row, ids] * share)


def sampled_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, negatives_J: Tensor, logq_V: Tensor
) -> Tensor:
    """See `supermoe.ops.sampled_cross_entropy`."""
    asked_N = target_N >= 0
    row_N = target_N.clamp(min=0)
    offset_V = -logq_V if bias_V is None else bias_V - logq_V
    positive_N = widen((x_ND * weight_VD[row_N]).sum(-1)) + offset_V[row_N]
    negative_NJ = widen(x_ND @ weight_VD[negatives_J].t()) + offset_V[negatives_J]
    negative_NJ = negative_NJ.masked_fill(target_N[:, None] == negatives_J, -torch.inf)
    return asked_N * (torch.cat([positive_N[:, None], negative_NJ], dim=1).logsumexp(dim=1) - positive_N)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """See `supermoe.ops.dropout`."""
    return F.dropout(x, p, training)


def widen(x: Tensor) -> Tensor:
    """Losses are taken in fp32, or in fp64 when that is what came in."""
    return x if x.dtype == torch.float64 else x.float()


def _logits(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, precision: torch.dtype | None) -> Tensor:
    if precision is not None:
        x_ND, weight_VD = x_ND.to(precision), weight_VD.to(precision)
    logits_NV = widen(x_ND @ weight_VD.t())
    return logits_NV if bias_V is None else logits_NV + bias_V
