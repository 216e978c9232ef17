"""The router: scores, choice, weights, loads and balance statistics in one pass over the logits; one for the gradient.

With l the logits of a token, s = softmax(l) or sigmoid(l): the k best of s + bias are chosen; their weights are s over
the sum of the chosen, or s itself for k = 1 (`supermoe.ops.route`). Loads are counted by integer atomics, whose result
does not depend on their order; the float statistics are partial sums per program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SCORES = ("softmax", "sigmoid")
MAX_EXPERTS = 1024  # a program holds all scores of a token
_ELEMENTS = 4096  # of the scores that a program holds


def route_fwd(
    logits_NE: Tensor, k: int, score: str, bias_E: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choice, weights, loads, scores and balance statistics -> expert_NK, weight_NK, counts_E, probs_NE, balance.

    `balance` [E + 1]: the mean over tokens of the scores divided by their sum, then the mean of logsumexp(l)^2.
    """
    num_tokens, num_experts = logits_NE.shape
    expert_NK = logits_NE.new_empty(num_tokens, k, dtype=torch.int64)
    weight_NK = logits_NE.new_empty(num_tokens, k)
    counts_E = logits_NE.new_zeros(num_experts, dtype=torch.int64)
    probs_NE = torch.empty_like(logits_NE)
    blocks = _blocks(num_tokens, num_experts)
    balance_BE = logits_NE.new_empty(blocks["programs"], num_experts + 1)
    if num_tokens:
        _route_fwd_kernel[(blocks.pop("programs"),)](
            logits_NE, bias_E, expert_NK, weight_NK, counts_E, probs_NE, balance_BE, num_tokens, 1 / num_tokens,
            E=num_experts, K=k, K_BLOCK=triton.next_power_of_2(k), SOFTMAX=score == "softmax", **blocks,
        )  # fmt: skip
    return expert_NK, weight_NK, counts_E, probs_NE, balance_BE.sum(0)


def route_bwd(
    logits_NE: Tensor,
    expert_NK: Tensor,
    weight_NK: Tensor,
    score: str,
    dweight_NK: Tensor | None,
    dprobs_NE: Tensor | None,
    dbalance: Tensor | None,
) -> Tensor:
    """Gradient of the logits from those of weights, scores and balance statistics (None: zero) -> dlogits_NE."""
    num_tokens, num_experts = logits_NE.shape
    dlogits_NE = torch.empty_like(logits_NE)
    blocks = _blocks(num_tokens, num_experts)
    if num_tokens:
        _route_bwd_kernel[(blocks.pop("programs"),)](
            logits_NE, expert_NK, weight_NK, dweight_NK, dprobs_NE, dbalance, dlogits_NE, num_tokens, 1 / num_tokens,
            E=num_experts, K=expert_NK.shape[1], SOFTMAX=score == "softmax", **blocks,
        )  # fmt: skip
    return dlogits_NE


def _blocks(num_tokens: int, num_experts: int) -> dict[str, int]:
    columns = triton.next_power_of_2(num_experts)
    rows = max(_ELEMENTS // columns, 1)
    return {"programs": triton.cdiv(num_tokens, rows), "ROWS": rows, "COLUMNS": columns}


@triton.jit
def _scores(logits, SOFTMAX: tl.constexpr):
    """Scores, their logarithms, softmax and logsumexp of a tile of logits, padded by -inf."""
    top = tl.max(logits, axis=1)
    lse = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), axis=1))
    log_softmax = logits - lse[:, None]
    softmax = tl.exp(log_softmax)
    if SOFTMAX:
        return softmax, log_softmax, softmax, lse
    else:
        log_score = tl.minimum(logits, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logits)))
        return tl.exp(log_score), log_score, softmax, lse


@triton.jit
def _route_fwd_kernel(
    logits_NE, bias_E, expert_NK, weight_NK, counts_E, probs_NE, balance_BE, num_tokens, share,
    E: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = token < num_tokens
    inside = real[:, None] & (column < E)[None, :]
    place = token.to(tl.int64)[:, None] * E + column[None, :]
    logits = tl.load(logits_NE + place, mask=inside, other=-float("inf"))
    logits = tl.where(real[:, None], logits, 0.0)
    score, log_score, _, lse = _scores(logits, SOFTMAX)
    tl.store(probs_NE + place, score, mask=inside)

    rank = score
    if bias_E is not None:
        rank += tl.load(bias_E + column, mask=column < E, other=0.0)[None, :]
    # What is not finite ranks last among the experts, so that even then k different ones are chosen.
    rank = tl.where(rank > -3.0e38, rank, -3.0e38)
    rank = tl.where((column < E)[None, :], rank, -float("inf"))
    choice = tl.arange(0, K_BLOCK)
    chosen = tl.full((ROWS, K_BLOCK), -float("inf"), tl.float32)
    load = tl.zeros((COLUMNS,), tl.int32)
    for j in tl.static_range(K):
        best = tl.argmax(rank, axis=1)
        hit = column[None, :] == best[:, None]
        chosen = tl.where(choice[None, :] == j, tl.sum(tl.where(hit, log_score, 0.0), axis=1)[:, None], chosen)
        rank = tl.where(hit, -float("inf"), rank)
        load += tl.sum((hit & real[:, None]).to(tl.int32), axis=0)
        tl.store(expert_NK + token.to(tl.int64) * K + j, best.to(tl.int64), mask=real)
    tl.atomic_add(counts_E + column, load.to(tl.int64), mask=(column < E) & (load > 0), sem="relaxed")
    weight = tl.exp(chosen)
    if K > 1:
        weight = tl.exp(chosen - tl.max(chosen, axis=1)[:, None])
        weight /= tl.sum(weight, axis=1)[:, None]
    address = weight_NK + token.to(tl.int64)[:, None] * K + choice[None, :]
    tl.store(address, weight, mask=real[:, None] & (choice < K)[None, :])

    score = tl.where(inside, score, 0.0)
    mean = score if SOFTMAX else score / tl.maximum(tl.sum(score, axis=1), 1e-12)[:, None]
    balance = balance_BE + tl.program_id(0) * (E + 1)
    tl.store(balance + column, tl.sum(mean, axis=0) * share, mask=column < E)
    tl.store(balance + E, tl.sum(tl.where(real, lse * lse, 0.0), axis=0) * share)


@triton.jit
def _route_bwd_kernel(
    logits_NE, expert_NK, weight_NK, dweight_NK, dprobs_NE, dbalance, dlogits_NE, num_tokens, share,
    E: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = token < num_tokens
    inside = real[:, None] & (column < E)[None, :]
    place = token.to(tl.int64)[:, None] * E + column[None, :]
    logits = tl.load(logits_NE + place, mask=inside, other=-float("inf"))
    logits = tl.where(real[:, None], logits, 0.0)
    score, _, softmax, lse = _scores(logits, SOFTMAX)

    dlog_score = tl.zeros((ROWS, COLUMNS), tl.float32)
    if dweight_NK is not None:
        pair = token.to(tl.int64) * K
        mean = tl.zeros((ROWS,), tl.float32)
        if K > 1:  # weights that sum to one
            for j in tl.static_range(K):
                weight = tl.load(weight_NK + pair + j, mask=real, other=0.0)
                mean += weight * tl.load(dweight_NK + pair + j, mask=real, other=0.0)
        for j in tl.static_range(K):
            expert = tl.load(expert_NK + pair + j, mask=real, other=0)
            weight = tl.load(weight_NK + pair + j, mask=real, other=0.0)
            dchosen = weight * (tl.load(dweight_NK + pair + j, mask=real, other=0.0) - mean)
            dlog_score += tl.where(column[None, :] == expert[:, None], dchosen[:, None], 0.0)
    if dprobs_NE is not None:
        dlog_score += score * tl.load(dprobs_NE + place, mask=inside, other=0.0)
    if dbalance is not None:
        dmean = tl.load(dbalance + column, mask=column < E, other=0.0)[None, :] * share
        if SOFTMAX:
            dlog_score += score * dmean
        else:
            normal = score / tl.maximum(tl.sum(tl.where(inside, score, 0.0), axis=1), 1e-12)[:, None]
            dlog_score += normal * (dmean - tl.sum(tl.where(inside, normal * dmean, 0.0), axis=1)[:, None])
    if SOFTMAX:
        dlogits = dlog_score - score * tl.sum(tl.where(inside, dlog_score, 0.0), axis=1)[:, None]
    else:
        dlogits = dlog_score * (1.0 - score)
    if dbalance is not None:
        dlogits += softmax * (2.0 * share * tl.load(dbalance + E) * lse)[:, None]
    tl.store(dlogits_NE + place, dlogits, mask=inside)
