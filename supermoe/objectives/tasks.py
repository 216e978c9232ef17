"""The tasks that can be declared in YAML. A task is one class: its config, head, loss, scores and metrics."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from supermoe.data.batch import SetLabels
from supermoe.data.schema import LabelSchema, Schema
from supermoe.model.heads import HeadSpec
from supermoe.objectives import measures
from supermoe.objectives.ranking import NextItem, Retrieval
from supermoe.objectives.task import MIN_PRIOR_LOSS, Labels, Scores, Task, TaskConfig, asked, repeat_row, set_rows
from supermoe.typed_yaml import UserError

MAX_BOOSTED = 32  # classes of which each can have trees of its own
TINY = 1e-6  # probability that is as good as none


class Binary(Task):
    """Yes or no. Scores: the probability of yes [n]."""

    class Config(TaskConfig):
        type: str = "binary"
        label_kind: ClassVar[str] = "number"

    main_metric = "auc"

    def head_spec(self) -> HeadSpec:
        return self.linear_head(1, boosted=True)

    def fit_prior(self, labels: Labels, counts_V: Tensor | None = None) -> None:
        assert isinstance(labels, Tensor)
        target = labels[self._asked_training(labels)]
        wrong = target[(target != 0) & (target != 1)]
        if len(wrong):
            raise UserError(
                f"tasks.{self.name}: a binary label must be 0 or 1 (or false or true), found {wrong[0].item():g}"
            )
        self.prior, self.prior_loss = _bernoulli_prior(target[:, None])

    def init_head(self, head: Any) -> None:
        _set_bias(head, torch.logit(self.prior))

    def losses(self, logits_BC: Tensor, labels: Labels) -> Tensor:
        assert isinstance(labels, Tensor)
        return F.binary_cross_entropy_with_logits(logits_BC[:, 0], labels.nan_to_num(), reduction="none")

    def decode(self, logits_BC: Tensor) -> Tensor:
        return logits_BC[:, 0].sigmoid()

    def encode(self, answer: Tensor) -> Tensor:
        return torch.logit(answer, eps=TINY)[:, None]

    def prior_scores(self, num_examples: int) -> Scores:
        return {"score": repeat_row(self.prior[0], num_examples)}

    def metrics(self, scores: Scores, labels: Labels) -> dict[str, float]:
        mask = asked(labels).numpy()
        target, score = np.asarray(labels)[mask], scores["score"][mask]
        return {
            "auc": measures.auc(target, score),
            "pr_auc": measures.average_precision(target, score),
            "logloss": measures.log_loss(target, score),
            "ece": measures.calibration_error(target, score),
        }

    def undefined(self, labels: Labels) -> str:
        assert isinstance(labels, Tensor)
        return super().undefined(labels) or _one_value(labels[asked(labels)])


class Multiclass(Task):
    """One class of several. Scores: probabilities [n, C] in the order of the label's classes."""

    class Config(TaskConfig):
        type: str = "multiclass"
        label_kind: ClassVar[str] = "class"
        label_smoothing: float = Field(0.0, ge=0, lt=1)

    main_metric = "macro_auc"

    def __init__(self, config: Any, *, name: str, label: LabelSchema, schema: Schema):
        super().__init__(config, name=name, label=label, schema=schema)
        if label.num_classes < 2:
            raise UserError(
                f"tasks.{name}: the training labels hold {label.num_classes} classes; {config.type} needs two or more"
            )

    def head_spec(self) -> HeadSpec:
        return self.linear_head(self.label.num_classes, copies=True, boosted=self.label.num_classes <= MAX_BOOSTED)

    def fit_prior(self, labels: Labels, counts_V: Tensor | None = None) -> None:
        assert isinstance(labels, Tensor)
        counts_C = torch.bincount(labels[self._asked_training(labels)], minlength=self.label.num_classes).float()
        self.prior_C = (counts_C + 0.5) / (counts_C + 0.5).sum()
        self.prior_loss = max(-float((counts_C / counts_C.sum() * self.prior_C.log()).sum()), MIN_PRIOR_LOSS)

    def init_head(self, head: Any) -> None:
        _set_bias(head, self.prior_C.log())

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """The head's outputs -> log p [B, C]."""
        return logits.log_softmax(dim=-1)

    def losses(self, logits_BC: Tensor, labels: Labels) -> Tensor:
        assert isinstance(labels, Tensor)
        smooth, log_p_BC = self.config.label_smoothing, self.log_probabilities(logits_BC)
        hit_B = log_p_BC.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return -(1 - smooth) * hit_B - smooth * log_p_BC.mean(dim=-1)

    def soft_losses(self, logits_BC: Tensor, answer: Tensor) -> Tensor:
        return -(answer * self.log_probabilities(logits_BC)).sum(dim=-1)

    def decode(self, logits_BC: Tensor) -> Tensor:
        return self.log_probabilities(logits_BC).exp()

    def encode(self, answer: Tensor) -> Tensor:
        return answer.clamp(min=TINY).log()

    def prior_scores(self, num_examples: int) -> Scores:
        return {"score": repeat_row(self.prior_C, num_examples)}

    def metrics(self, scores: Scores, labels: Labels) -> dict[str, float]:
        mask = asked(labels).numpy()
        target, score_nC = np.asarray(labels)[mask], scores["score"][mask]
        one_hot_nC = target[:, None] == np.arange(self.label.num_classes)
        hit = score_nC[np.arange(len(target)), target]
        return {
            "macro_auc": measures.macro_auc(one_hot_nC, score_nC),
            "accuracy": float((score_nC.argmax(1) == target).mean()) if len(target) else float("nan"),
            "logloss": measures.log_loss(np.ones(len(target)), hit),
        }

    def undefined(self, labels: Labels) -> str:
        assert isinstance(labels, Tensor)
        return super().undefined(labels) or _one_value(labels[asked(labels)])


class Ordinal(Multiclass):
    """One class of several that have an order. Scores: probabilities [n, C] in the order of the label's classes.

    The head gives C - 1 logits of "higher than class k, given at least class k" (CORN, arXiv 2111.08851), which
    multiply to a proper distribution; the loss is its negative log-likelihood.
    """

    class Config(Multiclass.Config):
        type: str = "ordinal"
        order: list[Any] | None = None  # the classes from lowest to highest; default: sorted

    def __init__(self, config: Any, *, name: str, label: LabelSchema, schema: Schema):
        super().__init__(config, name=name, label=label, schema=schema)
        classes = label.classes or list(range(label.num_classes))
        order = config.order or classes
        missing = [value for value in classes if value not in order]
        if missing:
            raise UserError(
                f"tasks.{name}.order: the class {missing[0]!r} occurs in the labels and has no place in the order"
            )
        present = [value for value in order if value in classes]
        self.level_C = torch.tensor([present.index(value) for value in classes])  # place of each class, lowest first

    def head_spec(self) -> HeadSpec:
        return self.linear_head(self.label.num_classes - 1)

    def fit_prior(self, labels: Labels, counts_V: Tensor | None = None) -> None:
        super().fit_prior(labels, counts_V)
        by_level_C = torch.empty_like(self.prior_C).scatter(0, self.level_C, self.prior_C)
        above_C = by_level_C.flip(0).cumsum(0).flip(0) - by_level_C
        self.prior_logits = (above_C[:-1] / by_level_C[:-1]).log()

    def init_head(self, head: Any) -> None:
        _set_bias(head, self.prior_logits)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        reach = F.pad(F.logsigmoid(logits).cumsum(dim=-1), (1, 0))  # log P(at least level k)
        stay = F.pad(F.logsigmoid(-logits), (0, 1))  # log P(not above level k | at least level k)
        return (reach + stay)[:, self.level_C.to(logits.device)]


class Multilabel(Task):
    """Any number of classes at once, a yes or no each. Scores: one probability per class [n, C]."""

    class Config(TaskConfig):
        type: str = "multilabel"
        label_kind: ClassVar[str] = "set"

    main_metric = "macro_auc"

    def __init__(self, config: Any, *, name: str, label: LabelSchema, schema: Schema):
        super().__init__(config, name=name, label=label, schema=schema)
        if label.num_classes < 1:
            raise UserError(f"tasks.{name}: the training labels hold no class; check `label.sql` and `label.min_share`")

    def head_spec(self) -> HeadSpec:
        return self.linear_head(self.label.num_classes, copies=True)

    def fit_prior(self, labels: Labels, counts_V: Tensor | None = None) -> None:
        assert isinstance(labels, SetLabels)
        num_asked = int(self._asked_training(labels).sum())
        counts_C = torch.bincount(labels.ids[asked(labels)[set_rows(labels)]], minlength=self.label.num_classes)
        self.prior_C, loss = _bernoulli_prior(counts_C[None] / num_asked, num_asked)
        self.prior_loss = loss * self.label.num_classes

    def init_head(self, head: Any) -> None:
        _set_bias(head, torch.logit(self.prior_C))

    def multi_hot(self, labels: SetLabels) -> Tensor:
        """Sets -> float32 0/1 [B, C]."""
        target_BC = torch.zeros(len(labels.asked_B), self.label.num_classes, device=labels.ids.device)
        target_BC[set_rows(labels), labels.ids] = 1.0
        return target_BC

    def losses(self, logits_BC: Tensor, labels: Labels) -> Tensor:
        assert isinstance(labels, SetLabels)
        return self.soft_losses(logits_BC, self.multi_hot(labels))

    def soft_losses(self, logits_BC: Tensor, answer: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits_BC, answer, reduction="none").sum(dim=-1)

    def decode(self, logits_BC: Tensor) -> Tensor:
        return logits_BC.sigmoid()

    def prior_scores(self, num_examples: int) -> Scores:
        return {"score": repeat_row(self.prior_C, num_examples)}

    def metrics(self, scores: Scores, labels: Labels) -> dict[str, float]:
        assert isinstance(labels, SetLabels)
        mask = asked(labels).numpy()
        target_nC, score_nC = self.multi_hot(labels).numpy()[mask], scores["score"][mask]
        return {
            "macro_auc": measures.macro_auc(target_nC, score_nC),
            "logloss": measures.log_loss(target_nC.ravel(), score_nC.ravel()),
        }

    def undefined(self, labels: Labels) -> str:
        assert isinstance(labels, SetLabels)
        sums_C = self.multi_hot(labels)[asked(labels)].sum(0)
        mixed = ((sums_C > 0) & (sums_C < asked(labels).sum())).any()
        return super().undefined(labels) or (
            "" if bool(mixed) else "no class has both labelled and unlabelled examples"
        )


class Regression(Task):
    """A number, learnt standardised by the training mean and deviation. Scores [n] are in the label's units."""

    class Config(TaskConfig):
        type: str = "regression"
        label_kind: ClassVar[str] = "number"
        loss: Literal["mse", "huber"] = "mse"

    main_metric = "r2"
    mean, std = 0.0, 1.0

    def head_spec(self) -> HeadSpec:
        return self.linear_head(1, boosted=True)

    def fit_prior(self, labels: Labels, counts_V: Tensor | None = None) -> None:
        assert isinstance(labels, Tensor)
        target = labels[self._asked_training(labels)].double()
        self.mean, self.std = float(target.mean()), float(target.std(correction=0))
        if self.std == 0:
            raise UserError(
                f"tasks.{self.name}: every training label is {self.mean:g}: nothing to learn; check `label.sql`"
            )
        zeros = torch.zeros(len(target), 1)
        self.prior_loss = max(float(self.losses(zeros, target.float()).mean()), MIN_PRIOR_LOSS)

    def init_head(self, head: Any) -> None:
        _set_bias(head, torch.zeros(1))

    def state(self) -> dict[str, float]:
        return {"mean": self.mean, "std": self.std}

    def load_state(self, state: dict[str, float]) -> None:
        self.mean, self.std = state["mean"], state["std"]

    def losses(self, logits_BC: Tensor, labels: Labels) -> Tensor:
        assert isinstance(labels, Tensor)
        target_B = (labels.nan_to_num() - self.mean) / self.std
        if self.config.loss == "huber":
            return F.huber_loss(logits_BC[:, 0], target_B, reduction="none")
        return 0.5 * F.mse_loss(logits_BC[:, 0], target_B, reduction="none")  # a Gaussian's, in nats

    def decode(self, logits_BC: Tensor) -> Tensor:
        return logits_BC[:, 0] * self.std + self.mean

    def encode(self, answer: Tensor) -> Tensor:
        return ((answer - self.mean) / self.std)[:, None]

    def prior_scores(self, num_examples: int) -> Scores:
        return {"score": repeat_row(self.mean, num_examples)}

    def metrics(self, scores: Scores, labels: Labels) -> dict[str, float]:
        mask = asked(labels).numpy()
        target, value = np.asarray(labels)[mask].astype(np.float64), scores["score"][mask]
        error = np.abs(value - target) if len(target) else np.array([np.nan])
        return {
            "r2": measures.r2(target, value),
            "rmse": float(np.sqrt((error**2).mean())),
            "mae": float(error.mean()),
        }

    def undefined(self, labels: Labels) -> str:
        assert isinstance(labels, Tensor)
        return super().undefined(labels) or _one_value(labels[asked(labels)])


def _bernoulli_prior(target_nC: Tensor, num_rows: int | None = None) -> tuple[Tensor, float]:
    """Smoothed share of ones per column (Krichevsky-Trofimov), and the mean log loss of answering it."""
    n = num_rows or len(target_nC)
    share_C = target_nC.double().mean(0)
    prior_C = (share_C * n + 0.5) / (n + 1)
    loss = -(share_C * prior_C.log() + (1 - share_C) * (1 - prior_C).log()).mean()
    return prior_C.float(), max(float(loss), MIN_PRIOR_LOSS)


def _set_bias(head: Any, bias_C: Tensor) -> None:
    with torch.no_grad():
        head.bias.copy_(bias_C)


def _one_value(values: Tensor) -> str:
    """A reason if all of the labels are equal."""
    return f"all {len(values)} labels are {values[0].item():g}" if len(values.unique()) < 2 else ""


REGISTRY = {
    "binary": Binary,
    "multiclass": Multiclass,
    "ordinal": Ordinal,
    "multilabel": Multilabel,
    "regression": Regression,
    "retrieval": Retrieval,
    "next_item": NextItem,
}
