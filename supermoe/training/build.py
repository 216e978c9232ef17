"""From a config and its store to everything a run consists of."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from supermoe import ops
from supermoe.config import RunConfig
from supermoe.data.batches import Batches, label_rows
from supermoe.data.disk import read_table
from supermoe.data.schema import FIRST_ID
from supermoe.data.store import REMEDY, Store
from supermoe.model.heads import HeadSpec
from supermoe.model.supermoe import SuperMoE
from supermoe.objectives.objective import Objective
from supermoe.objectives.pretraining import NextEvent
from supermoe.objectives.task import Task, asked
from supermoe.training.evaluation import Evaluation, evaluate
from supermoe.training.router_health import EVENT
from supermoe.training.trainer import Trainer
from supermoe.training.warm_start import warm_start
from supermoe.typed_yaml import UserError, build


@dataclass(frozen=True)
class Run:
    """A run's parts, put together; nothing has been trained."""

    config: RunConfig
    store: Store
    tasks: dict[str, Task]
    heads: dict[str, HeadSpec]
    model: SuperMoE
    trainer: Trainer

    @property
    def measured_split(self) -> str:
        """The split that the report is about: test, or validation where there is no test cut."""
        return "test" if len(self.store.rows_of("test")) else "valid"

    def facts(self) -> dict[str, Any]:
        """What the report tells beside the metrics."""
        progress, summary = self.trainer.progress, self.store.summary
        return {
            "users": summary["users"],
            "events": summary["events"],
            "parameters": self.model.num_parameters(),
            "active_parameters": self.model.num_parameters(active=True),
            "steps": self.trainer.step,
            "best_step": progress["best_step"],
            "training_minutes": round(progress["minutes"], 2),
            "seed": self.config.seed,
        }

    def evaluate(self, split: str) -> Evaluation:
        """Load the best weights and measure them on a split."""
        model = self.trainer.load_best()
        bf16 = self.config.training.precision == "bf16"
        return evaluate(
            model, self.tasks, batches(self.config, self.store, split), split, event_names(self.store), bf16
        )


def build_run(config: RunConfig, store: Store) -> Run:
    """Seed all generators and build tasks, model, objective and trainer, the heads at their priors."""
    seed_everything(config.seed)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    choose_backend(config.training.backend)
    tasks = build_tasks(config, store)
    heads = {name: task.head_spec() for name, task in tasks.items()}
    pretraining = {
        name: build("supermoe.objectives.pretraining", item, name=name, schema=store.schema)
        for name, item in pretraining_configs(config, store, heads).items()
    }
    for objective in pretraining.values():
        heads |= objective.head_specs()
        objective.fit_prior(field_counts(store))
    model = SuperMoE(store.schema, config.model, heads)
    warm_start(model, store, config.seed)
    for name, task in tasks.items():
        task.init_head(model.heads[name])
    for objective in pretraining.values():
        objective.init_heads(model.heads)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    balancer = build("supermoe.objectives.balancers", config.loss.balancer, names=[*tasks, *pretraining])
    trainer = Trainer(
        model,
        Objective(tasks, pretraining, balancer),
        batches(config, store, "train"),
        batches(config, store, "valid"),
        config.training,
        folder=config.run,
        identity={**config.model_dump(mode="json"), "store": store.fingerprint},
        event_names=event_names(store),
    )
    return Run(config, store, tasks, heads, model, trainer)


def choose_backend(name: str | None) -> None:
    """Have every op of this process run on the back end that the config names; None: each call picks."""
    try:
        ops.use(name)
    except ValueError as error:
        raise UserError(f"training.backend: {error}") from error


def pretraining_configs(config: RunConfig, store: Store, heads: dict[str, HeadSpec]) -> dict[str, Any]:
    """What the config asks for; by default `next_event`, unless a task learns from events or no field is a category."""
    if config.loss.pretraining is not None:
        return {name: item for name, item in config.loss.pretraining.items() if item is not None}
    reads_events = any(spec.reads == "event" for spec in heads.values())
    has_category = any(field.kind == "category" for field in store.schema.fields.values())
    return {} if reads_events or not has_category else {"next_event": NextEvent.Config()}


def build_tasks(config: RunConfig, store: Store) -> dict[str, Task]:
    """The tasks of a config, their priors fitted on the training examples."""
    tasks, train, counts = {}, store.rows_of("train"), field_counts(store)
    for name, item in config.tasks.items():
        label = store.schema.labels[name]
        task = build("supermoe.objectives.tasks", item, name=name, label=label, schema=store.schema)
        labels = label_rows(store.labels[name], train)
        task.fit_prior(labels, counts.get(label.field or ""))
        learns_from = train if task.head_spec().reads == "event" else train[asked(labels).numpy()]
        task.num_users = len(np.unique(store.examples.user[learns_from]))
        tasks[name] = task
    return tasks


def batches(config: RunConfig, store: Store, split: str) -> Batches:
    """The batches of a split; those for training in random order."""
    return Batches(
        store,
        split,
        max_events=config.model.max_events,
        tokens_per_batch=config.training.tokens_per_batch,
        examples_per_batch=config.training.examples_per_batch,
        seed=config.seed,
        shuffle=split == "train",
    )


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def field_counts(store: Store) -> dict[str, Tensor]:
    """How often each id of the fitted category fields occurs in training time -> float64 [V] by field."""
    counts = {}
    for name, field in store.schema.fields.items():
        if field.kind != "number" and field.hash_size is None:
            table = read_table(store.vocab / f"{name}.parquet", REMEDY, ["count"])
            counts[name] = torch.tensor([0] * FIRST_ID + table["count"].to_pylist(), dtype=torch.float64)
    return counts


def id_values(store: Store, field: str) -> pa.Array:
    """Value of each id of a category field, in its own type; null for padding and unknown. Hashed: the ids."""
    schema = store.schema.fields[field]
    if schema.hash_size is not None:
        return pa.array(range(schema.size))
    values = read_table(store.vocab / f"{field}.parquet", REMEDY, ["value"])["value"].combine_chunks()
    return pa.concat_arrays([pa.nulls(FIRST_ID, values.type), values])


def event_names(store: Store) -> list[str]:
    """Names of the ids of the field `event`; empty where all events are of one type."""
    return [str(value) for value in id_values(store, EVENT).to_pylist()] if EVENT in store.schema.fields else []
