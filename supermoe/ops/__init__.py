"""The few operations that training time goes into, on packed tensors; each call picks what is fastest for it.

`reference` is plain PyTorch and defines what correct means; `torch` is the same mathematics arranged for speed.
`use("reference")` forces one, `backends()` tells which are there and why.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from supermoe.ops import attention, cross_entropy, grouped, random_bytes, reference
from supermoe.ops.packing import IndicatorPacking, Packing, pack, pack_indicators
from supermoe.ops.reference import Routing, activate

__all__ = [
    "IndicatorPacking",
    "Packing",
    "Routing",
    "activate",
    "backends",
    "dropout",
    "expert_ffn",
    "history_attention",
    "indicator_attention",
    "linear_cross_entropy",
    "linear_cross_entropy_sets",
    "pack",
    "pack_indicators",
    "route",
    "sampled_cross_entropy",
    "use",
]

# oneDNN (GELU and 16-bit products on a CPU) keeps what it compiles for each size, 1024 of them. Packed batches have a
# size of their own each: it never finds one again, while the memory between what it keeps cannot be used and grows.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

BACKENDS = ("reference", "torch")
_forced: str | None = None


# --- mixture of experts -----------------------------------------------------------------------------------------------


def route(logits_NE: Tensor, k: int, score: str = "softmax", bias_E: Tensor | None = None) -> Routing:
    """Choose k experts per token from a router's fp32 logits.

    `score` is softmax or sigmoid. `bias_E` takes part in the choice only (loss-free balancing, arXiv 2408.15664). The
    weights are the chosen scores divided by their sum; with k = 1 they are the score itself, so that the router keeps
    a gradient (Switch, arXiv 2101.03961).
    """
    return reference.route(logits_NE, k, score, bias_E)


def expert_ffn(
    x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, activation: str
) -> Tensor:
    """Weighted sum of the chosen experts' feed-forwards -> y_ND in the dtype of x.

    `activation` is gelu, silu, relu2 or swiglu; swiglu needs w_in of [E, D, 2F], the gate's half first. Expert -1 is
    a dropped row: it adds nothing and gets no gradient. Under autocast the products are made in its dtype.
    """
    if _forced == "reference":
        return reference.expert_ffn(x_ND, expert_NK, weight_NK, w_in_EDF, w_out_EFD, activation)
    dtype = _autocast_dtype(x_ND)
    operands = x_ND.to(dtype), w_in_EDF.to(dtype), w_out_EFD.to(dtype)
    reason = grouped.refusal(*operands)
    if reason is not None:
        if _forced == "torch":
            _warn_once(f"expert_ffn runs on the reference although `torch` was asked for: {reason}")
        return reference.expert_ffn(x_ND, expert_NK, weight_NK, w_in_EDF, w_out_EFD, activation)
    return grouped.expert_ffn(operands[0], expert_NK, weight_NK, *operands[1:], activation).to(x_ND.dtype)


# --- attention --------------------------------------------------------------------------------------------------------


def history_attention(
    q_NHA: Tensor,
    k_JHA: Tensor,
    v_JHA: Tensor,
    q_offsets_S: Tensor,
    k_offsets_S: Tensor,
    packing: Packing | None = None,
) -> Tensor:
    """Causal attention inside each read -> o_NHA, scores scaled by 1 / sqrt(A).

    Read s has the queries `q_offsets_S[s]:q_offsets_S[s + 1]` and the keys `k_offsets_S[s]:k_offsets_S[s + 1]`,
    aligned at their ends: where there are more keys than queries, the first ones are cached history. In training both
    offsets are the same, and `packing` is `pack(q_offsets_S)`, made once per batch and shared by the layers; without it
    each call makes its own. Beside cached keys it has no use.
    """
    if _forced == "reference":
        return reference.history_attention(q_NHA, k_JHA, v_JHA, q_offsets_S, k_offsets_S)
    return attention.history_attention(q_NHA, k_JHA, v_JHA, q_offsets_S, k_offsets_S, packing)


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
    """Each indicator attends to the first `visible_M` keys of its read and to itself, to no other indicator -> o_MHA.

    Read s has the keys `offsets_S[s]:offsets_S[s + 1]`. An indicator that sees no event gives back its own value.
    `packing` is `pack_indicators(offsets_S, read_M, visible_M)`, made once per batch and shared by the layers.
    """
    if _forced == "reference":
        return reference.indicator_attention(q_MHA, k_self_MHA, v_self_MHA, k_NHA, v_NHA, offsets_S, read_M, visible_M)
    return attention.indicator_attention(
        q_MHA, k_self_MHA, v_self_MHA, k_NHA, v_NHA, offsets_S, read_M, visible_M, packing
    )


# --- losses -----------------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy of softmax(x weight^T + bias) against one target per row -> loss_N; keeps no [N, V] logits.

    Rows with target -1 have loss 0 and no gradient. The loss is fp32 (fp64 for fp64 inputs). `precision` is the dtype
    of the matrix products and the logits; default: autocast's, else that of x. Differentiable once, for x, weight and
    bias.
    """
    chosen = reference if _forced == "reference" else cross_entropy
    return chosen.linear_cross_entropy(x_ND, weight_VD, bias_V, target_N, precision or _autocast_dtype(x_ND))


def linear_cross_entropy_sets(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    offsets_N: Tensor,
    ids: Tensor,
    precision: torch.dtype | None = None,
) -> Tensor:
    """As `linear_cross_entropy` with a set of targets per row: loss_N = -mean of log p over the set.

    Row n has the targets `ids[offsets_N[n]:offsets_N[n + 1]]`; a row with an empty set has loss 0 and no gradient.
    """
    chosen = reference if _forced == "reference" else cross_entropy
    return chosen.linear_cross_entropy_sets(x_ND, weight_VD, bias_V, offsets_N, ids, precision or _autocast_dtype(x_ND))


def sampled_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, negatives_J: Tensor, logq_V: Tensor
) -> Tensor:
    """Sampled softmax of the target against negatives shared by all rows -> loss_N.

    Logits are corrected by `logq_V`, the log probability with which each id is drawn (Yi et al., RecSys 2019), and a
    negative that is the row's own target is left out. Rows with target -1 have loss 0 and no gradient.
    """
    return reference.sampled_cross_entropy(x_ND, weight_VD, bias_V, target_N, negatives_J, logq_V)


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero values with probability p and scale the rest to keep the mean.

    Repeats under the same torch seed and after restoring the RNG state. On a CPU p is rounded to a multiple of 1/256
    (at least one), for the sake of a generator that is six times faster.
    """
    if _forced == "reference" or x.device.type != "cpu":
        return reference.dropout(x, p, training)
    return random_bytes.dropout(x, p, training)


# --- choice -----------------------------------------------------------------------------------------------------------


def use(backend: str | None) -> None:
    """Force one backend for every op ("reference" or "torch"); None lets each call pick again."""
    global _forced
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"there is no ops backend {backend!r}; known: {', '.join(BACKENDS)}")
    _forced = backend


def backends() -> dict[str, str]:
    """Each backend and in one sentence whether it is active and why."""
    forced = "" if _forced is None else f", forced by ops.use({_forced!r})"
    if _forced == "reference":
        return {"reference": f"active{forced}", "torch": f"idle: `reference` is{forced[1:]}"}
    return {
        "reference": "active where `torch` does not take the operands, such as experts in fp64 or of odd widths",
        "torch": f"active{forced}: attention by length, chunked cross-entropy, grouped experts, bulk dropout",
    }


def _autocast_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
