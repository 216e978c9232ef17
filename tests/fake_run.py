"""A tiny world to train on without a store: batches whose features tell some labels, tasks, model, trainer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import make_batch, make_schema

from supermoe.config import ModelConfig, TrainingConfig
from supermoe.data.batch import Batch, SetLabels
from supermoe.data.schema import LabelSchema, Schema
from supermoe.model.supermoe import SuperMoE
from supermoe.objectives.balancers import REGISTRY as BALANCERS
from supermoe.objectives.objective import Objective
from supermoe.objectives.pretraining import NextEvent
from supermoe.objectives.task import Task
from supermoe.objectives.tasks import REGISTRY as TASKS
from supermoe.training.trainer import Trainer

WINDOW = {"sql": "1", "window": "28d"}


def run_schema() -> Schema:
    """The schema of `make_schema` with one label per kind of task."""
    labels = {
        "churn": LabelSchema(kind="number"),
        "spend": LabelSchema(kind="number"),
        "age": LabelSchema(kind="class", classes=["young", "old", "older"], num_classes=3),
        "income": LabelSchema(kind="class", classes=["high", "low", "middle"], num_classes=3),
        "topics": LabelSchema(kind="set", classes=["a", "b", "c", "d"], num_classes=4),
        "basket": LabelSchema(kind="set", field="type", num_classes=11),
        "item": LabelSchema(kind="class", field="type", num_classes=11),
    }
    return make_schema().model_copy(update={"labels": labels})


def make_task(
    type_name: str, name: str, schema: Schema | None = None, label: LabelSchema | None = None, **options: Any
) -> Task:
    """A task of the registry; `options` are its config."""
    schema = schema or run_schema()
    cls = TASKS[type_name]
    return cls(cls.Config(label=WINDOW, **options), name=name, label=label or schema.labels[name], schema=schema)


def make_tasks() -> dict[str, Task]:
    """One task of every type, with priors from `make_labels`."""
    kinds = {"churn": "binary", "spend": "regression", "age": "multiclass", "income": "ordinal", "topics": "multilabel"}
    kinds |= {"basket": "retrieval", "item": "next_item"}
    options: dict[str, dict] = {"income": {"order": ["low", "middle", "high"]}}
    tasks = {name: make_task(kind, name, **options.get(name, {})) for name, kind in kinds.items()}
    for name, task in tasks.items():
        task.fit_prior(make_labels(200, seed=9)[name], torch.arange(11).flip(0))
        task.num_users = 5_000
    return tasks


def make_sets(num_examples: int, low: int, high: int, generator: torch.Generator) -> SetLabels:
    """Random sets of up to three ids in [low, high); one example in five is not asked."""
    asked_B = torch.rand(num_examples, generator=generator) > 0.2
    sizes = torch.randint(0, 4, (num_examples,), generator=generator) * asked_B
    ids = [low + torch.randperm(high - low, generator=generator)[:n] for n in sizes.tolist()]
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return SetLabels(asked_B, offsets, torch.cat([*ids, torch.zeros(0, dtype=torch.int64)]))


def make_labels(num_examples: int, seed: int = 0) -> dict[str, Any]:
    """Random labels for every task of `make_tasks`, some of them missing."""
    g = torch.Generator().manual_seed(seed)
    spend = torch.randn(num_examples, generator=g) * 3 + 10
    return {
        "churn": torch.randint(0, 2, (num_examples,), generator=g).float(),
        "spend": spend.masked_fill(torch.rand(num_examples, generator=g) < 0.2, torch.nan),
        "age": torch.randint(-1, 3, (num_examples,), generator=g),
        "income": torch.randint(-1, 3, (num_examples,), generator=g),
        "topics": make_sets(num_examples, 0, 4, g),
        "basket": make_sets(num_examples, 2, 11, g),
        "item": torch.randint(-1, 11, (num_examples,), generator=g),
    }


def make_run_batch(seed: int = 0, num_reads: int = 6) -> Batch:
    """A batch with a label for every task; two of the labels follow from the first feature."""
    lengths = sorted(np.random.default_rng(seed).integers(0, 9, num_reads).tolist(), reverse=True)
    batch = make_batch(lengths, [(i, n) for i, n in enumerate(lengths)], run_schema(), seed)
    labels = make_labels(num_reads, seed)
    signal = batch.features_BP[:, 0].nan_to_num(0.5)
    labels |= {"churn": (signal > 0.5).float(), "spend": 10 + 3 * signal}
    return replace(batch, labels=labels, example_B=torch.arange(num_reads) + seed * num_reads)


class FakeBatches:
    """What the trainer asks of `supermoe.data.batches.Batches`, over batches made by seed."""

    def __init__(self, num_batches: int, first_seed: int = 0, fail_at: int | None = None):
        self.batches = [make_run_batch(first_seed + i) for i in range(num_batches)]
        self.fail_at, self.served = fail_at, 0  # raise instead of the batch of this number, as a kill would

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for i in np.random.default_rng([0, epoch]).permutation(len(self))[start:]:
            if self.served == self.fail_at:
                raise KeyboardInterrupt
            self.served += 1
            yield self.batches[i]

    def steps(self, epoch: int, size: int, start: int = 0) -> Iterator[list[Batch]]:
        batches = self.epoch(epoch, start * size)
        while step := list(itertools.islice(batches, size)):
            yield step


def make_model(tasks: dict[str, Task], pretraining: dict[str, NextEvent], seed: int = 0) -> SuperMoE:
    """A small model with dropout, whose heads start at the priors."""
    torch.manual_seed(seed)
    heads = {name: task.head_spec() for name, task in tasks.items()}
    for extra in pretraining.values():
        heads |= extra.head_specs()
    dropout = {"dropout": 0.1, "head_dropout": 0.1, "feature_dropout": 0.1}
    config = ModelConfig(dim=16, layers=2, heads=2, moe={"experts": 4, "top_k": 2, "hidden": 16}, **dropout)
    model = SuperMoE(run_schema(), config, heads)
    for name, task in tasks.items():
        task.init_head(model.heads[name])
    for extra in pretraining.values():
        extra.init_heads(model.heads)
    return model


def make_objective(balancer: str = "equal", **options: Any) -> Objective:
    """All tasks, next-event pre-training, and a balancer."""
    tasks, extra = make_tasks(), NextEvent(NextEvent.Config(fields=["type"]), name="next", schema=run_schema())
    extra.fit_prior({})
    cls = BALANCERS[balancer]
    return Objective(tasks, {"next": extra}, cls(cls.Config(**options), names=list(tasks)))


def seesaw_balancer(folder: Path) -> dict[str, Any]:
    """The balancer `seesaw`, as `make_trainer` wants it, whose twins are ahead in every other task."""
    path = folder / "alone.json"
    path.write_text(json.dumps({name: float(i % 2) for i, name in enumerate(make_tasks())}))
    return {"balancer": "seesaw", "reference": path}


def make_trainer(
    folder: Path,
    train: FakeBatches | None = None,
    seed: int = 0,
    identity: Any = None,
    balancer: dict[str, Any] | None = None,
    replay: list[Any] | None = None,
    **options: Any,
) -> Trainer:
    """A trainer over five training batches and two for validation, or none where it replays evaluations."""
    objective = make_objective(**(balancer or {}))
    model = make_model(objective.tasks, objective.pretraining, seed)
    config = TrainingConfig(**{"epochs": 3, "checkpoint_every": 4, "lr": 3e-3, **options})
    return Trainer(
        model,
        objective,
        train or FakeBatches(5),
        None if replay is not None else FakeBatches(2, first_seed=50),
        config,
        folder=folder,
        replay=replay,
        identity=identity or {"seed": seed},
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the state, to compare bit by bit."""
    return {name: value.clone() for name, value in model.state_dict().items()}
