"""Self-supervised objectives that are trained beside the tasks and never evaluated."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from supermoe.data.batch import Batch
from supermoe.data.schema import FIRST_ID, Schema
from supermoe.model.heads import HeadSpec
from supermoe.objectives.event_softmax import EventSoftmax, Negatives, check_category, entropy, next_ids, set_field_bias
from supermoe.objectives.task import MIN_PRIOR_LOSS
from supermoe.typed_yaml import Config, UserError


class PretrainingConfig(Config):
    """What all pre-training objectives are told."""

    type: str
    weight: float = Field(1.0, gt=0)  # in the sum of losses


def default_fields(schema: Schema) -> list[str]:
    """The category fields that labels are about, or else the one with the most values; none without any."""
    sizes = {name: field.size for name, field in schema.fields.items() if field.kind == "category"}
    asked = {label.field or label.source for label in schema.labels.values()}
    return [name for name in sizes if name in asked] or sorted(sizes, key=lambda name: -sizes[name])[:1]


class NextEvent:
    """At every event, predict fields of the next event of the same read.

    The loss of an event is the mean over the fields of its cross-entropy divided by that of the field's unigram prior,
    so that fields of 10 and of 10,000 values weigh the same; a field that is empty at the next event adds nothing.
    """

    class Config(PretrainingConfig):
        type: str = "next_event"
        fields: list[str] = Field(default_factory=list)  # category fields; default: those that labels are about
        negatives: Negatives = "auto"  # see the task next_item

    def __init__(self, config: Any, *, name: str, schema: Schema):
        self.config, self.name = config, name
        fields = config.fields or default_fields(schema)
        if not fields:
            raise UserError(f"loss.pretraining.{name}: the events have no category field to predict")
        key = f"loss.pretraining.{name}.fields"
        self.softmax = {f: EventSoftmax(schema, check_category(schema, f, key), config.negatives) for f in fields}
        self.prior_loss = 1.0  # the fields' own priors are divided out already

    def head_name(self, field: str) -> str:
        """Name of a field's head among the model's heads."""
        return f"{self.name}__{field}"

    def head_specs(self) -> dict[str, HeadSpec]:
        """One head per field, each reading the events' outputs."""
        return {self.head_name(field): HeadSpec(kind="field", field=field, reads="event") for field in self.softmax}

    def fit_prior(self, counts: dict[str, Tensor]) -> None:
        """Learn the unigram prior of every field from its counts by id in training time."""
        self.prior_C = {field: softmax.prior(counts.get(field)) for field, softmax in self.softmax.items()}
        self.scale = {field: max(entropy(prior_C), MIN_PRIOR_LOSS) for field, prior_C in self.prior_C.items()}

    def init_heads(self, heads: Any) -> None:
        """Start every head at its prior."""
        for field, prior_C in self.prior_C.items():
            set_field_bias(heads[self.head_name(field)], prior_C)

    def count(self, batch: Batch) -> int:
        """Events that have a next event in their read."""
        return int((batch.offsets_S.diff() - 1).clamp(min=0).sum())

    def loss(self, heads: Any, output: Any, batch: Batch) -> tuple[Tensor, int]:
        """Sum of the events' losses (fp32 scalar with a gradient), and their number."""
        total = output.event_ND.new_zeros((), dtype=torch.float32)
        for field, softmax in self.softmax.items():
            next_N = next_ids(batch, field)
            position = torch.nonzero(next_N >= FIRST_ID)[:, 0]
            x_ND = output.event_ND.index_select(0, position)
            loss = softmax.losses(heads[self.head_name(field)], x_ND, next_N[position])
            total = total + loss.float().sum() / (self.scale[field] * len(self.softmax))
        return total, self.count(batch)


REGISTRY = {"next_event": NextEvent}
