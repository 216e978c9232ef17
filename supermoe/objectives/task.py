"""What every task can do: size its head, know its prior, and turn outputs into losses, scores and metrics.

Labels come in one form everywhere, that of `Batch.labels`: float32 [B] (NaN: not asked), int64 [B] (-1: not asked) or
`SetLabels`. Scores are a dict of arrays with one row per example; what it holds is said by each task.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from supermoe.config import Eligible, WindowLabel
from supermoe.data.batch import Batch, Labels, SetLabels
from supermoe.data.schema import LabelSchema, Schema
from supermoe.model.heads import HeadSpec
from supermoe.typed_yaml import Config, UserError

Scores = dict[str, NDArray]

MIN_PRIOR_LOSS = 1e-3  # a task whose prior is nearly perfect must not get a boundless scale


class TaskConfig(Config):
    """What all tasks are told."""

    type: str
    label: WindowLabel
    eligible: Eligible | None = None  # who is asked, among the examples; default: everyone
    weight: float = Field(1.0, gt=0)  # in the sum of losses

    label_kind: ClassVar[str]  # number, class or set: what the label column holds


class Task:
    """One question asked of users. Subclasses own `Config`, `main_metric` and the methods that raise here."""

    Config: type[TaskConfig]
    main_metric: ClassVar[str]  # higher is better, 1 is perfect

    def __init__(self, config: Any, *, name: str, label: LabelSchema, schema: Schema):
        self.config, self.name, self.label, self.schema = config, name, label, schema
        self.prior_loss = 1.0
        self.num_users = 1  # that have a label in training
        self.teacher: Tensor | None = None  # see `teach`
        self.teaching = 0.0

    # --- set-up ---

    @property
    def is_static(self) -> bool:
        """Whether the label is an attribute of the user, the same at every cut."""
        return self.config.label.attribute is not None

    def head_spec(self) -> HeadSpec:
        """What the model must answer with."""
        raise NotImplementedError

    def linear_head(self, size: int, copies: bool = False, boosted: bool = False) -> HeadSpec:
        """A linear head: with direct inputs for a static attribute, with copied counts for a field's values.

        `boosted`: trees may answer beside it, for labels that are one number or class; needs `encode`.
        """
        field = (self.label.field or self.label.source) if copies else None
        ids = self.label.ids if field else ()
        return HeadSpec(kind="linear", size=size, field=field, ids=ids, direct=self.is_static, boosted=boosted)

    def fit_prior(self, labels: Labels, counts_V: Tensor | None = None) -> None:
        """Learn the best constant answer from the training labels.

        `counts_V`: how often each id of the label's field occurs in training time, where the classes are a field's ids.
        """
        raise NotImplementedError

    def init_head(self, head: Any) -> None:
        """Start the head at the prior."""
        raise NotImplementedError

    def state(self) -> dict[str, float]:
        """What decoding a score needs beside the weights; numbers that JSON can hold."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""

    # --- training ---

    def count(self, batch: Batch) -> int:
        """Terms of the loss in this batch; 0 where nothing is asked."""
        return int(asked(batch.labels[self.name]).sum())

    def loss(self, head: Any, output: Any, batch: Batch) -> tuple[Tensor, int]:
        """Sum of the losses of the examples that are asked (fp32 scalar with a gradient), and their number."""
        labels = batch.labels[self.name]
        asked_B, logits_BC = asked(labels), self.logits(head, output, batch)
        loss_B = self.losses(logits_BC, labels)
        if self.teacher is not None:
            loss_B = self._taught(loss_B, logits_BC, batch.example_B)
        return torch.where(asked_B, loss_B, 0.0).sum(), int(asked_B.sum())

    def losses(self, logits_BC: Tensor, labels: Labels) -> Tensor:
        """Loss of every example -> fp32 [B]; finite where not asked."""
        raise NotImplementedError

    @property
    def can_be_taught(self) -> bool:
        """Whether another model's answers to training examples say more than their labels.

        Not those to a static attribute: the other model has seen the same user's label at other cuts.
        """
        return not self.is_static

    def teach(self, answers: Tensor, share: float) -> None:
        """Learn also from another model's answers: with `share` in place of the labels' losses.

        Answers are what `decode` gives, one row per example of the store; NaN where there is none, and the label counts
        alone. As losses are linear in a distribution, and squares are up to a constant, this is a label that is mixed.
        """
        self.teacher, self.teaching = answers, share

    def _taught(self, loss_B: Tensor, logits_BC: Tensor, example_B: Tensor) -> Tensor:
        assert self.teacher is not None
        answer = self.teacher[example_B.to(self.teacher.device)].to(logits_BC.device)
        known_B = ~answer.isnan() if answer.ndim == 1 else ~answer[:, 0].isnan()
        soft_B = self.soft_losses(logits_BC, answer.nan_to_num())
        return torch.where(known_B, torch.lerp(loss_B, soft_B, self.teaching), loss_B)

    def soft_losses(self, logits_BC: Tensor, answer: Tensor) -> Tensor:
        """Loss of every example against what `decode` may give, in place of a label -> fp32 [B]."""
        return self.losses(logits_BC, answer)

    def logits(self, head: Any, output: Any, batch: Batch) -> Tensor:
        """The head's answers to all examples, in fp32."""
        return head.logits(output.task_BX[self.name], batch).float()

    # --- evaluation ---

    def scores(self, head: Any, output: Any, batch: Batch) -> dict[str, Tensor]:
        """What predictions hold, one row per example of the batch, in the label's own units."""
        return {"score": self.decode(self.logits(head, output, batch))}

    def scores_for_metrics(self, head: Any, output: Any, batch: Batch) -> dict[str, Tensor]:
        """The same where only `metrics` are wanted: examples that are not asked may have any answer."""
        return self.scores(head, output, batch)

    def decode(self, logits_BC: Tensor) -> Tensor:
        """Logits -> [B] or [B, C] predictions."""
        raise NotImplementedError

    def encode(self, answer: Tensor) -> Tensor:
        """Logits [B, C] that `decode` to this answer."""
        raise NotImplementedError

    def prior_scores(self, num_examples: int) -> Scores:
        """The constant answer, repeated."""
        raise NotImplementedError

    def metrics(self, scores: Scores, labels: Labels) -> dict[str, float]:
        """Every metric over the examples that are asked; NaN where it is not defined (`undefined` says why)."""
        raise NotImplementedError

    def undefined(self, labels: Labels) -> str:
        """Why the main metric has no value on these labels; empty where it has one."""
        return "" if bool(asked(labels).any()) else "no example is labelled"

    def _asked_training(self, labels: Labels) -> Tensor:
        """Mask of the labelled training examples, or an error if there is none."""
        mask = asked(labels)
        if not bool(mask.any()):
            raise UserError(
                f"tasks.{self.name}: no training example has a label; check its `label` and `eligible`, or remove the "
                f"task with tasks.{self.name}=null"
            )
        return mask


def gain(metric: float, prior: float) -> float:
    """Relative gain over the prior: the share of the way from the prior's metric to a perfect 1 that was covered.

    All main metrics grow towards 1, so that gains of different tasks compare and average. NaN where either metric is.
    """
    return (metric - prior) / (1 - prior) if prior < 1 else float("nan")


# --- labels -----------------------------------------------------------------------------------------------------------


def asked(labels: Labels) -> Tensor:
    """Which examples have a label -> bool [B]."""
    if isinstance(labels, SetLabels):
        return labels.asked_B
    return ~labels.isnan() if labels.is_floating_point() else labels >= 0


def set_rows(labels: SetLabels) -> Tensor:
    """The example of every id of the sets -> int64 [len(ids)]."""
    sizes = labels.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)


def concat_labels(parts: list[Labels]) -> Labels:
    """Labels of several batches, one after the other."""
    first = parts[0]
    if not isinstance(first, SetLabels):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    sets = [part for part in parts if isinstance(part, SetLabels)]
    sizes = torch.cat([part.offsets.diff() for part in sets])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return SetLabels(torch.cat([part.asked_B for part in sets]), offsets, torch.cat([part.ids for part in sets]))


def repeat_row(row: Tensor | NDArray | float, num_examples: int) -> NDArray:
    """One answer for every example -> [n, ...]; a view, nothing is copied."""
    array = np.asarray(row, dtype=np.float32) if isinstance(row, float) else np.asarray(row)
    return np.broadcast_to(array, (num_examples, *array.shape))
