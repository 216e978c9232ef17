"""The few operations that training time goes into, on packed tensors; each picks the fastest implementation present.

`reference` is plain PyTorch and defines what correct means; `torch` is the same mathematics arranged for speed.
`use("reference")` forces one, `backends()` tells which are there and why.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from supermoe.ops import reference
from supermoe.ops.reference import Routing, activate

_forced: str | None = None


def route(logits_NE: Tensor, k: int, score: str = "softmax", bias_E: Tensor | None = None) -> Routing:
    """Choose k experts per token from a router's fp32 logits.

    `bias_E` takes part in the choice only (loss-free balancing, arXiv 2408.15664). The weights are the chosen scores divided by
    their sum; with k = 1 they are the score itself, so that the router keeps a gradient (Switch, arXiv 2101.03961).
    """
    return reference.route(logits_NE, k, score, bias_E)


def expert_ffn(
    x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, activation: str
) -> Tensor:
    """Weighted sum of the chosen experts' feed-forwards -> y_ND in the dtype of x.

    `activation` is gelu, silu, relu2 or swiglu; swiglu needs w_in of [E, D, 2F], the gate's half first. Expert -1 is a dropped
    row: it adds nothing and gets no gradient.
    """
    return reference.expert_ffn(x_ND, expert_NK, weight_NK, w_in_EDF, w_out_EFD, activation)


def history_attention(
    q_NHA: Tensor, k_JHA: Tensor, v_JHA: Tensor, q_offsets_S: Tensor, k_offsets_S: Tensor, packing: object = None
) -> Tensor:
    """Causal attention inside each read -> o_NHA.

    Read s has the queries `q_offsets_S[s]:q_offsets_S[s + 1]` and the keys `k_offsets_S[s]:k_offsets_S[s + 1]`, aligned at their
    ends: where there are more keys than queries, the first ones are cached history. In training both offsets are the same.
    `packing` is `pack(q_offsets_S)`, made once per batch and shared by the layers; without it the op makes its own.
    """
    return reference.history_attention(q_NHA, k_JHA, v_JHA, q_offsets_S, k_offsets_S)


def indicator_attention(
    q_MHA: Tensor,
    k_self_MHA: Tensor,
    v_self_MHA: Tensor,
    k_NHA: Tensor,
    v_NHA: Tensor,
    offsets_S: Tensor,
    read_M: Tensor,
    visible_M: Tensor,
    packing: object = None,
) -> Tensor:
    """Each indicator attends to the first `visible_M` keys of its read and to itself -> o_MHA; never to another indicator.

    `packing` is `pack_indicators(offsets_S, read_M, visible_M)`, made once per batch and shared by the layers.
    """
    return reference.indicator_attention(q_MHA, k_self_MHA, v_self_MHA, k_NHA, v_NHA, offsets_S, read_M, visible_M)


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy of softmax(x weight^T + bias) against one target per row -> loss_N, without keeping [N, V] logits.

    Rows with target -1 have loss 0 and no gradient. The loss is fp32 (fp64 for fp64 inputs); `precision` is the dtype of the
    matrix products alone. Differentiable once, for x, weight and bias.
    """
    return reference.linear_cross_entropy(x_ND, weight_VD, bias_V, target_N, precision)


def linear_cross_entropy_sets(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    offsets_N: Tensor,
    ids: Tensor,
    precision: torch.dtype | None = None,
) -> Tensor:
    """As `linear_cross_entropy` with a set of targets per row: loss_N = -mean of log p over `ids[offsets_N[n]:offsets_N[n + 1]]`.

    `offsets_N` is [N + 1]; a row with an empty set has loss 0 and no gradient.
    """
    return reference.linear_cross_entropy_sets(x_ND, weight_VD, bias_V, offsets_N, ids, precision)


def sampled_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, negatives_J: Tensor, logq_V: Tensor
) -> Tensor:
    """Sampled softmax against negatives shared by all rows -> loss_N.

    Logits are corrected by `logq_V`, the log probability of drawing each id (arXiv 2019 RecSys "sampling-bias-corrected"), and
    a negative that is the row's own target is left out. Rows with target -1 have loss 0 and no gradient.
    """
    return reference.sampled_cross_entropy(x_ND, weight_VD, bias_V, target_N, negatives_J, logq_V)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each value with probability p and scale the rest by 1 / (1 - p); repeats under the same torch seed or RNG state."""
    return reference.dropout(x, p, training)


def use(backend: str | None) -> None:
    """Force one backend for every op ("reference" or "torch"); None picks per call again."""
    global _forced
    _forced = backend


def pack(offsets_S: Tensor) -> object:
    """Group reads of like length, once per batch, for `history_attention`."""
    return None


def pack_indicators(offsets_S: Tensor, read_M: Tensor, visible_M: Tensor) -> object:
    """Group reads of like length, once per batch, for `indicator_attention`."""
    return None
