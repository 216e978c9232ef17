"""The few operations that training time goes into, on packed tensors; each call picks what is fastest for it.

`reference` is plain PyTorch and defines what correct means; the other back ends (`choice.py`) are the same mathematics
arranged for speed. `use("reference")` forces one, `backends()` tells which are there and why.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from supermoe.ops.choice import backends, call, use
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


# --- mixture of experts -----------------------------------------------------------------------------------------------


def route(logits_NE: Tensor, k: int, score: str = "softmax", bias_E: Tensor | None = None) -> Routing:
    """Choose k experts per token from a router's fp32 logits.

    `score` is softmax or sigmoid. `bias_E` takes part in the choice only (loss-free balancing, arXiv 2408.15664). The
    weights are the chosen scores divided by their sum; with k = 1 they are the score itself, so that the router keeps
    a gradient (Switch, arXiv 2101.03961). A token whose scores are not finite gets k different experts and weights that
    are not finite either, so that the loss tells; other tokens are unharmed. Probabilities of 0 are finite scores.

    Raises:
        ValueError: for another `score`, and when there are fewer than k experts.
    """
    return call("route", logits_NE, k, score, bias_E)


def expert_ffn(
    x_ND: Tensor,
    expert_NK: Tensor,
    weight_NK: Tensor,
    w_in_EDF: Tensor,
    w_out_EFD: Tensor,
    activation: str,
    low_memory: bool = False,
) -> Tensor:
    """Weighted sum of the chosen experts' feed-forwards -> y_ND in the dtype of x.

    `activation` is gelu, silu, relu2 or swiglu; swiglu needs w_in of [E, D, 2F], the gate's half first. Expert -1 is
    a dropped row: it adds nothing and gets no gradient. Under autocast the products are made in its dtype.
    `low_memory` keeps less for the backward and computes it again, where the back end can.
    """
    dtype = _product_dtype(x_ND)
    stacks = w_in_EDF.to(dtype), w_out_EFD.to(dtype)
    y_ND = call("expert_ffn", x_ND.to(dtype), expert_NK, weight_NK, *stacks, activation, low_memory)
    return y_ND.to(x_ND.dtype)


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
    return call("history_attention", q_NHA, k_JHA, v_JHA, q_offsets_S, k_offsets_S, packing)


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
    return call(
        "indicator_attention", q_MHA, k_self_MHA, v_self_MHA, k_NHA, v_NHA, offsets_S, read_M, visible_M, packing
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
    return call("linear_cross_entropy", x_ND, weight_VD, bias_V, target_N, precision or _product_dtype(x_ND))


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
    precision = precision or _product_dtype(x_ND)
    return call("linear_cross_entropy_sets", x_ND, weight_VD, bias_V, offsets_N, ids, precision)


def sampled_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, negatives_J: Tensor, logq_V: Tensor
) -> Tensor:
    """Sampled softmax of the target against negatives shared by all rows -> loss_N.

    Logits are corrected by `logq_V`, the log probability with which each id is drawn (Yi et al., RecSys 2019), and a
    negative that is the row's own target is left out. Rows with target -1 have loss 0 and no gradient.
    """
    return call("sampled_cross_entropy", x_ND, weight_VD, bias_V, target_N, negatives_J, logq_V)


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero values with probability p and scale the rest to keep the mean.

    Repeats under the same torch seed and after restoring the RNG state. On a CPU p is rounded to a multiple of 1/256
    (at least one), for the sake of a generator that is six times faster.
    """
    return call("dropout", x, p, training)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on; fp64 it leaves alone."""
    kind = x.device.type
    wanted = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if wanted else x.dtype
