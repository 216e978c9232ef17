"""Softmax over a field's vocabulary, asked at every event: what next-item tasks and pre-training share."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from supermoe import ops
from supermoe.data.batch import Batch
from supermoe.data.schema import FIRST_ID, Schema
from supermoe.typed_yaml import UserError, nearest

MAX_FULL_SOFTMAX = 10_000  # classes up to which `negatives: auto` takes all of them
AUTO_NEGATIVES = 512

Negatives = Literal["auto", "all"] | int


def check_category(schema: Schema, field: str | None, key: str) -> str:
    """The field if it is a category of the schema; the error names `key`."""
    if field not in schema.fields:
        raise UserError(f"{key}: there is no field '{field}', {nearest(str(field), schema.fields)}")
    if schema.fields[field].kind != "category":
        raise UserError(
            f"{key}: the field '{field}' is of kind {schema.fields[field].kind}; only a category can be predicted here"
        )
    return field


def next_ids(batch: Batch, field: str) -> Tensor:
    """Id of the field at the next event of the same read -> int64 [N]; below `FIRST_ID`: nothing to predict.

    A read's last event predicts nothing: what follows it may belong to another split.
    """
    next_N = batch.fields[field].roll(-1)
    next_N[batch.offsets_S[1:][batch.offsets_S.diff() > 0] - 1] = 0
    return next_N


class EventSoftmax:
    """Cross-entropy of one field's ids at event positions: full, or sampled with a logQ correction.

    Negatives are drawn log-uniformly over the vocabulary, which is sorted by falling count (uniformly for hashed
    fields), and are shared by all positions of the batch.
    """

    def __init__(self, schema: Schema, field: str, negatives: Negatives = "auto", precision: str = "fp32"):
        self.field = field
        self.num_classes = schema.fields[field].size - FIRST_ID
        self.hashed = schema.fields[field].hash_size is not None
        auto = AUTO_NEGATIVES if self.num_classes > MAX_FULL_SOFTMAX else "all"
        chosen = auto if negatives == "auto" else negatives
        self.num_negatives = None if chosen == "all" else int(chosen)
        self.precision = torch.bfloat16 if precision == "bf16" else None

    def prior(self, counts_V: Tensor | None) -> Tensor:
        """Share of each class among the field's values in training time, smoothed by one -> fp32 [V - 2]."""
        counts = torch.zeros(self.num_classes) if counts_V is None else counts_V[FIRST_ID:].float()
        return (counts + 1) / (counts + 1).sum()

    def losses(self, head: Any, x_ND: Tensor, target_N: Tensor) -> Tensor:
        """Loss of predicting the ids `target_N` (all >= FIRST_ID) from the event outputs -> [N]."""
        query_ND = head.query(x_ND)
        if self.num_negatives is None:
            weight_VD, bias_V = head.table()
            weight, bias = weight_VD[FIRST_ID:], bias_V[FIRST_ID:]
            if len(target_N) == 0:  # still part of the graph, so that every rank has every gradient
                return (query_ND @ weight.t() + bias).sum(dim=-1)
            return ops.linear_cross_entropy(query_ND, weight, bias, target_N - FIRST_ID, self.precision)
        ids = torch.cat([target_N, self._draw(x_ND.device) + FIRST_ID])
        weight, bias, place = head.rows(ids)  # also where nothing is predicted: other ranks may wait for this one
        log_q = bias.new_zeros(len(bias)).index_put((place,), self.log_q(ids - FIRST_ID).to(bias.dtype))
        target, negatives = place[: len(target_N)], place[len(target_N) :]
        return ops.sampled_cross_entropy(query_ND, weight, bias, target, negatives, log_q)

    def log_q(self, classes: Tensor) -> Tensor:
        """Log probability of drawing each of these classes -> fp32, of the same shape."""
        if self.hashed:
            return torch.full(classes.shape, -math.log(self.num_classes), device=classes.device)
        return torch.log(torch.log1p(1 / (classes.float() + 1)) / math.log(self.num_classes + 1))

    def _draw(self, device: torch.device) -> Tensor:
        uniform_J = torch.rand(self.num_negatives or 0, device=device, dtype=torch.float64)
        classes_J = (
            uniform_J * self.num_classes if self.hashed else torch.expm1(uniform_J * math.log(self.num_classes + 1))
        )
        return classes_J.long().clamp(max=self.num_classes - 1)


def set_field_bias(head: Any, prior_C: Tensor) -> None:
    """Start a field head at the prior; padding and unknown, which are never predicted, at the rarest class's."""
    head.start_at(torch.cat([prior_C.min().expand(FIRST_ID), prior_C]))


def entropy(prior_C: Tensor) -> float:
    """Expected loss of answering the prior, in nats."""
    return float(-(prior_C.double() * prior_C.double().log()).sum())
