"""Tasks that rank the ids of a field: what a user will take next, out of everything there is.

Scores hold `top_k` [n, k] ids by falling score (-1: no more), their `scores`, and, where labels are known, `rank` [n]:
the place of the best relevant id in the full ranking (1 is first, 0: nothing relevant).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from supermoe.data.batch import Batch, SetLabels
from supermoe.data.schema import FIRST_ID, LabelSchema, Schema
from supermoe.model.heads import HeadSpec
from supermoe.model.packed import read_of_events, visible_events
from supermoe.objectives import measures
from supermoe.objectives.event_softmax import EventSoftmax, Negatives, check_category, entropy, next_ids, set_field_bias
from supermoe.objectives.task import MIN_PRIOR_LOSS, Labels, Scores, Task, TaskConfig, repeat_row, set_rows
from supermoe.typed_yaml import ALL_TIME

CELLS = 1 << 21  # logits ranked at a time: all of a batch's leave the caches, and take twice as long
NOT_RANKED = {"top_k": -1, "scores": -torch.inf, "rank": 0}


class RankingConfig(TaskConfig):
    """What both ranking tasks are told."""

    top_k: int = Field(20, ge=10)  # ids kept per example in predictions
    filter_seen: bool = False  # never rank what the user's visible history already holds


class _Ranking(Task):
    """Metrics, prior and decoding of ranked ids."""

    main_metric = "ndcg@10"
    prior_C: Tensor  # popularity of the ids from FIRST_ID on
    start_C: Tensor  # what the head's logits start from, likewise

    def __init__(self, config: Any, *, name: str, label: LabelSchema, schema: Schema):
        super().__init__(config, name=name, label=label, schema=schema)
        self.field = check_category(schema, label.field, f"tasks.{name}.label.field")
        self.softmax = EventSoftmax(schema, self.field)

    def init_head(self, head: Any) -> None:
        head.table()  # where it is sharded this is refused now, and not at the first evaluation
        set_field_bias(head, self.start_C)

    def prior_scores(self, num_examples: int) -> Scores:
        score, index = self.prior_C.topk(min(self.config.top_k, len(self.prior_C)))
        return {"top_k": repeat_row(index + FIRST_ID, num_examples), "scores": repeat_row(score, num_examples)}

    def metrics(self, scores: Scores, labels: Labels) -> dict[str, float]:
        row, ids = relevant_ids(labels)
        num_rows = len(scores["top_k"])
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row.numpy(), minlength=num_rows))])
        return measures.ranking(scores["top_k"], offsets, ids.numpy(), k=10)

    @property
    def can_be_taught(self) -> bool:
        """No: predictions hold the top of the ranking only."""
        return False

    def undefined(self, labels: Labels) -> str:
        return super().undefined(labels) or ("" if len(relevant_ids(labels)[0]) else "no example has an id to find")

    def log_probability(self, head: Any, output: Any, batch: Batch, row: Tensor, ids: Tensor) -> Tensor:
        """Of these ids, at these examples -> fp32 [len(ids)]."""
        wanted_W, place = row.unique(return_inverse=True)
        log_p_WC = self.logits(head, *self._at(wanted_W, output, batch))[:, FIRST_ID:].log_softmax(dim=-1)
        return log_p_WC[place, ids - FIRST_ID]

    def scores_for_metrics(self, head: Any, output: Any, batch: Batch) -> dict[str, Tensor]:
        wanted_W = relevant_ids(batch.labels[self.name])[0].unique()
        found = self.scores(head, *self._at(wanted_W, output, batch))
        return {
            key: values.new_full((batch.num_examples, *values.shape[1:]), NOT_RANKED[key]).index_copy(
                0, wanted_W, values
            )
            for key, values in found.items()
        }

    def _at(self, wanted_W: Tensor, output: Any, batch: Batch) -> tuple[Any, Batch]:
        """Some examples alone: those with something to find are often few, and each is scored against all ids."""
        if len(wanted_W) == batch.num_examples:
            return output, batch
        return replace(output, task_BX={self.name: output.task_BX[self.name][wanted_W]}), batch.take(wanted_W)

    def scores(self, head: Any, output: Any, batch: Batch) -> dict[str, Tensor]:
        per_chunk = max(1, CELLS // self.schema.fields[self.field].size)
        chunks = torch.arange(batch.num_examples, device=batch.read_B.device).split(per_chunk)
        found = [self._rank_at(chunk, head, output, batch) for chunk in chunks]
        return {key: torch.cat([part[key] for part in found]) for key in found[0]}

    def _rank_at(self, wanted_W: Tensor, head: Any, output: Any, batch: Batch) -> dict[str, Tensor]:
        output, batch = self._at(wanted_W, output, batch)
        return self.rank(self.logits(head, output, batch), batch)

    def rank(self, logits_BV: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Scores from the logits over the whole vocabulary, which are overwritten."""
        logits_BV[:, :FIRST_ID] = -torch.inf
        if self.config.filter_seen:
            logits_BV[seen_ids(batch, self.field, self.schema)] = -torch.inf
        score, top = logits_BV.topk(min(self.config.top_k, logits_BV.shape[1] - FIRST_ID))
        found = {"top_k": top.masked_fill(score == -torch.inf, -1), "scores": score}
        if self.name in batch.labels:
            row, ids = relevant_ids(batch.labels[self.name])
            none_B = logits_BV.new_full((len(logits_BV),), torch.nan)
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
        self.prior_C = self.start_C = self.softmax.prior(counts_V)
        loss = -(counts_V[FIRST_ID:] * self.prior_C.log()).sum() / max(int((sizes_B > 0).sum()), 1)
        self.prior_loss = max(float(loss), MIN_PRIOR_LOSS)

    def count(self, batch: Batch) -> int:
        return int(relevant_ids(batch.labels[self.name])[0].unique().numel())

    def loss(self, head: Any, output: Any, batch: Batch) -> tuple[Tensor, int]:
        row, ids = relevant_ids(batch.labels[self.name])
        sizes_B = torch.bincount(row, minlength=batch.num_examples)
        log_p = self.log_probability(head, output, batch, row, ids)
        return -(log_p / best_dcg(sizes_B)[row]).sum(), int((sizes_B > 0).sum())


class NextItem(_Ranking):
    """The id of a field at the next event, learnt at every event of the history and from the labels at cuts.

    Where training examples have labels, with cuts in time, these teach how an answer at a cut differs from one in
    the middle of a history (`NextFieldHead`).
    """

    class Config(RankingConfig):
        type: str = "next_item"
        label_kind: ClassVar[str] = "class"
        negatives: Negatives = "auto"  # softmax over all ids, over this many sampled ones, or by vocabulary size
        head_precision: Literal["fp32", "bf16"] = "fp32"

    def __init__(self, config: Any, *, name: str, label: LabelSchema, schema: Schema):
        super().__init__(config, name=name, label=label, schema=schema)
        self.softmax = EventSoftmax(schema, self.field, config.negatives, config.head_precision)

    def head_spec(self) -> HeadSpec:
        return HeadSpec(kind="field", field=self.field, reads="both")

    def fit_prior(self, labels: Labels, counts_V: Tensor | None = None) -> None:
        self.start_C = self.softmax.prior(counts_V)  # of events, from which most is learnt
        self.prior_loss = max(entropy(self.start_C), MIN_PRIOR_LOSS)
        ids = relevant_ids(labels)[1]
        size = self.schema.fields[self.field].size
        self.prior_C = self.softmax.prior(torch.bincount(ids, minlength=size)) if len(ids) else self.start_C

    def count(self, batch: Batch) -> int:
        return int((next_ids(batch, self.field) >= FIRST_ID).sum()) + len(relevant_ids(batch.labels[self.name])[0])

    def loss(self, head: Any, output: Any, batch: Batch) -> tuple[Tensor, int]:
        next_N = next_ids(batch, self.field)
        position = torch.nonzero(next_N >= FIRST_ID)[:, 0]
        at_events = self.softmax.losses(head, output.event_ND.index_select(0, position), next_N[position])
        row, ids = relevant_ids(batch.labels[self.name])
        if len(row):
            at_cuts = -self.log_probability(head, output, batch, row, ids).sum()
        else:  # under leave-one-out always: nothing is scored, but every rank has every gradient
            at_cuts = 0.0 * sum(x.sum() for x in (output.task_BX[self.name], *head.asked_at_cuts()))
        return at_events.float().sum() + at_cuts, len(position) + len(row)

    def logits(self, head: Any, output: Any, batch: Batch) -> Tensor:
        with torch.no_grad():  # learnt from all events, which are many more than labels
            event_BV = self._event_logits(head, output, batch)
        return head.logits_at_cut(event_BV, output.task_BX[self.name], batch).float()

    def _event_logits(self, head: Any, output: Any, batch: Batch) -> Tensor:
        """What the last visible event says comes next -> logits_BV."""
        weight_VD, bias_V = head.table()
        last_B = batch.offsets_S[batch.read_B] + batch.visible_B - 1
        has_events_B = batch.visible_B > 0
        x_BD = output.event_ND.new_zeros(batch.num_examples, output.event_ND.shape[1])
        x_BD[has_events_B] = output.event_ND[last_B[has_events_B]]
        # Where nothing was seen the bias ranks alone, which starts as popularity.
        query_BD = torch.where(has_events_B[:, None], head.query(x_BD), 0.0)
        return query_BD @ weight_VD.t() + bias_V


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


def seen_ids(batch: Batch, field: str, schema: Schema) -> tuple[Tensor, Tensor]:
    """(example, id) of a field in the examples' visible histories, bags included."""
    row, event = visible_events(batch)
    rows, ids = [row], [batch.fields[field][event]]
    for name, bag in schema.bags.items():  # a bag over all time knows what lies before the events that were read
        if bag.field == field and bag.window == ALL_TIME:
            rows.append(read_of_events(batch.bags[name].offsets, len(batch.bags[name].ids)))
            ids.append(batch.bags[name].ids)
    return torch.cat(rows), torch.cat(ids)
