"""Tasks that rank the ids of a field: what a user will take next, out of everything there is.

Scores hold `top_k` [n, k] ids by falling score (-1: no more), their `scores`, and, where labels are known, `rank` [n]:
the place of the best relevant id in the full ranking (1 is first, 0: nothing relevant).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from supermoe.data.batch import Batch, SetLabels
from supermoe.data.schema import FIRST_ID, LabelSchema, Schema
from supermoe.model.heads import HeadSpec
from supermoe.objectives import measures
from supermoe.objectives.event_softmax import EventSoftmax, Negatives, check_category, entropy, next_ids, set_field_bias
from supermoe.objectives.task import MIN_PRIOR_LOSS, Labels, Scores, Task, TaskConfig, repeat_row, set_rows
from supermoe.typed_yaml import ALL_TIME

MAX_LOGITS = 1 << 24  # logits held at once while ranking


class RankingConfig(TaskConfig):
    """What both ranking tasks are told."""

    top_k: int = Field(20, ge=10)  # ids kept per example in predictions
    filter_seen: bool = False  # never rank what the user's visible history already holds


class _Ranking(Task):
    """Metrics, prior and decoding of ranked ids."""

    main_metric = "ndcg@10"
    can_be_taught = False  # predictions hold the top of the ranking only
    prior_C: Tensor  # popularity of the ids from FIRST_ID on

    def __init__(self, config: Any, *, name: str, label: LabelSchema, schema: Schema):
        super().__init__(config, name=name, label=label, schema=schema)
        self.field = check_category(schema, label.field, f"tasks.{name}.label.field")
        self.softmax = EventSoftmax(schema, self.field)

    def init_head(self, head: Any) -> None:
        head.table()  # where it is sharded this is refused now, and not at the first evaluation
        set_field_bias(head, self.prior_C)

    def prior_scores(self, num_examples: int) -> Scores:
        score, index = self.prior_C.topk(min(self.config.top_k, len(self.prior_C)))
        return {"top_k": repeat_row(index + FIRST_ID, num_examples), "scores": repeat_row(score, num_examples)}

    def metrics(self, scores: Scores, labels: Labels) -> dict[str, float]:
        row, ids = relevant_ids(labels)
        num_rows = len(scores["top_k"])
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row.numpy(), minlength=num_rows))])
        return measures.ranking(scores["top_k"], offsets, ids.numpy(), k=10)

    def undefined(self, labels: Labels) -> str:
        return super().undefined(labels) or ("" if len(relevant_ids(labels)[0]) else "no example has an id to find")

    def rank(self, logits_BV: Tensor, batch: Batch, first: int = 0) -> dict[str, Tensor]:
        """Scores of the consecutive examples from `first` on, from their logits over the whole vocabulary."""
        num_rows, num_ids = logits_BV.shape
        logits_BV[:, :FIRST_ID] = -torch.inf
        if self.config.filter_seen:
            row, ids = seen_ids(batch, self.field, self.schema, first, first + num_rows)
            logits_BV[row, ids] = -torch.inf
        score, top = logits_BV.topk(min(self.config.top_k, num_ids - FIRST_ID))
        found = {"top_k": top.masked_fill(score == -torch.inf, -1), "scores": score}
        if self.name in batch.labels:
            row, ids = relevant_ids(batch.labels[self.name])
            inside = (row >= first) & (row < first + num_rows)
            row, ids = row[inside] - first, ids[inside]
            none_B = logits_BV.new_full((num_rows,), torch.nan)
            best_B = none_B.scatter_reduce(0, row, logits_BV[row, ids], "amax", include_self=False)
            rank_B = 1 + (logits_BV > best_B[:, None]).sum(dim=1)
            found["rank"] = torch.where(best_B.isnan(), 0, rank_B)
        return found


class Retrieval(_Ranking):
    """A set of ids of a field, all of them relevant: full softmax over the vocabulary, summed over the set.

    An example's loss is divided by the best DCG@10 that its set allows, as its NDCG@10 is: a mean over the set would
    let small sets, which say little about the ranking, outweigh large ones.
    """

    class Config(RankingConfig):
        type: str = "retrieval"
        label_kind: ClassVar[str] = "set"

    def head_spec(self) -> HeadSpec:
        return HeadSpec(kind="field", field=self.field)

    def fit_prior(self, labels: Labels, counts_V: Tensor | None = None) -> None:
        self._asked_training(labels)
        row, ids = relevant_ids(labels)
        sizes_B = torch.bincount(row)
        weight = (1 / best_dcg(sizes_B).double())[row]
        counts_V = torch.zeros(self.schema.fields[self.field].size, dtype=torch.double).index_add(0, ids, weight)
        self.prior_C = self.softmax.prior(counts_V)
        loss = -(counts_V[FIRST_ID:] * self.prior_C.log()).sum() / max(int((sizes_B > 0).sum()), 1)
        self.prior_loss = max(float(loss), MIN_PRIOR_LOSS)

    def count(self, batch: Batch) -> int:
        return int(relevant_ids(batch.labels[self.name])[0].unique().numel())

    def loss(self, head: Any, output: Any, batch: Batch) -> tuple[Tensor, int]:
        row, ids = relevant_ids(batch.labels[self.name])
        log_p_BC = self.logits(head, output, batch)[:, FIRST_ID:].log_softmax(dim=-1)
        sizes_B = torch.bincount(row, minlength=batch.num_examples)
        return -(log_p_BC[row, ids - FIRST_ID] / best_dcg(sizes_B)[row]).sum(), int((sizes_B > 0).sum())

    def scores(self, head: Any, output: Any, batch: Batch) -> dict[str, Tensor]:
        return self.rank(self.logits(head, output, batch), batch)


class NextItem(_Ranking):
    """The id of a field at the next event, learnt at every event of the history and asked at the last visible one."""

    class Config(RankingConfig):
        type: str = "next_item"
        label_kind: ClassVar[str] = "class"
        negatives: Negatives = "auto"  # softmax over all ids, over this many sampled ones, or by vocabulary size
        head_precision: Literal["fp32", "bf16"] = "fp32"

    def __init__(self, config: Any, *, name: str, label: LabelSchema, schema: Schema):
        super().__init__(config, name=name, label=label, schema=schema)
        self.softmax = EventSoftmax(schema, self.field, config.negatives, config.head_precision)

    def head_spec(self) -> HeadSpec:
        return HeadSpec(kind="field", field=self.field, reads="event")

    def fit_prior(self, labels: Labels, counts_V: Tensor | None = None) -> None:
        self.prior_C = self.softmax.prior(counts_V)
        self.prior_loss = max(entropy(self.prior_C), MIN_PRIOR_LOSS)

    def count(self, batch: Batch) -> int:
        return int((next_ids(batch, self.field) >= FIRST_ID).sum())

    def loss(self, head: Any, output: Any, batch: Batch) -> tuple[Tensor, int]:
        next_N = next_ids(batch, self.field)
        position = torch.nonzero(next_N >= FIRST_ID)[:, 0]
        loss = self.softmax.losses(head, output.event_ND.index_select(0, position), next_N[position])
        return loss.float().sum(), len(position)

    def scores(self, head: Any, output: Any, batch: Batch) -> dict[str, Tensor]:
        weight_VD, bias_V = head.table()
        last_B = batch.offsets_S[batch.read_B] + batch.visible_B - 1
        has_events_B = batch.visible_B > 0
        x_BD = output.event_ND.new_zeros(batch.num_examples, output.event_ND.shape[1])
        x_BD[has_events_B] = output.event_ND[last_B[has_events_B]]
        # Where nothing was seen the bias ranks alone, which starts as popularity.
        query_BD = torch.where(has_events_B[:, None], head.query(x_BD), 0.0)
        chunk = max(1, MAX_LOGITS // len(weight_VD))
        parts = [
            self.rank((query_BD[i : i + chunk] @ weight_VD.t() + bias_V).float(), batch, i)
            for i in range(0, max(len(query_BD), 1), chunk)
        ]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def best_dcg(sizes_B: Tensor, k: int = 10) -> Tensor:
    """DCG@k of a perfect ranking of sets of these sizes -> float32 [B]; that of one id for an empty set."""
    gains_K = 1 / torch.log2(torch.arange(2, k + 2, device=sizes_B.device))
    return gains_K.cumsum(0)[sizes_B.clamp(1, k) - 1]


def relevant_ids(labels: Labels) -> tuple[Tensor, Tensor]:
    """(example, id) of everything that should be found; ids below `FIRST_ID` name nothing."""
    if isinstance(labels, SetLabels):
        row, ids = set_rows(labels), labels.ids
    else:
        row, ids = torch.arange(len(labels), device=labels.device), labels
    known = ids >= FIRST_ID
    return row[known], ids[known]


def seen_ids(batch: Batch, field: str, schema: Schema, first: int, last: int) -> tuple[Tensor, Tensor]:
    """(example - first, id) of a field in the visible histories of examples `first` to `last`, bags included."""
    read_B, visible_B = batch.read_B[first:last], batch.visible_B[first:last]
    row = torch.repeat_interleave(torch.arange(len(read_B), device=read_B.device), visible_B)
    before_B = visible_B.cumsum(0) - visible_B
    event = torch.arange(len(row), device=row.device) + (batch.offsets_S[read_B] - before_B)[row]
    rows, ids = [row], [batch.fields[field][event]]
    for name, bag in schema.bags.items():  # a bag over all time knows what lies before the events that were read
        if bag.field == field and bag.window == ALL_TIME:
            offsets = batch.bags[name].offsets[first : last + 1]
            rows.append(torch.repeat_interleave(torch.arange(len(read_B), device=row.device), offsets.diff()))
            ids.append(batch.bags[name].ids[int(offsets[0]) : int(offsets[-1])])
    return torch.cat(rows), torch.cat(ids)
