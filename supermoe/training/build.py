"""From a config and its store to everything a run consists of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from supermoe import ops
from supermoe.config import RunConfig, TrainingConfig
from supermoe.data.batches import Batches, label_rows
from supermoe.data.disk import read_table
from supermoe.data.schema import FIRST_ID, Schema
from supermoe.data.store import REMEDY, Store
from supermoe.distributed.mesh import World
from supermoe.distributed.parallelize import Parallel
from supermoe.model.heads import HeadSpec
from supermoe.model.second_opinion import SecondOpinion
from supermoe.model.supermoe import SuperMoE
from supermoe.objectives.objective import Objective
from supermoe.objectives.pretraining import NextEvent
from supermoe.objectives.task import Task, asked
from supermoe.training.evaluation import Evaluation, evaluate
from supermoe.training.linear_start import fit_direct
from supermoe.training.relevance import weigh_inputs
from supermoe.training.router_health import EVENT
from supermoe.training.seeding import seed_everything
from supermoe.training.sharded_weights import load_weights
from supermoe.training.teachers import teach
from supermoe.training.trainer import RETRAIN, Trainer
from supermoe.training.warm_start import direct_inputs, warm_start
from supermoe.typed_yaml import UserError, build

EPOCHS_OF_EXAMPLES = 6  # features start where hand-made ones are: later epochs learn examples by heart
EPOCHS_OF_EVENTS = 30  # the values of fields are learnt along with what follows what
MOST_EPOCHS = 100  # of small logs, such as a thousand users' movies
FEW_EXAMPLES = 100_000  # to see, some 200 steps: small logs need more epochs, up to those of events
FEW_EVENTS = 15_000_000  # likewise, where tasks learn from events
ENOUGH_EXAMPLES = 1_000_000  # likewise: large logs need fewer
ENOUGH_EVENTS = 50_000_000
PATIENCE = 5  # epochs without improvement that end a training whose length is open, or a sixth of all


@dataclass(frozen=True)
class Run:
    """A run's parts, put together; nothing has been trained."""

    config: RunConfig
    store: Store
    tasks: dict[str, Task]
    heads: dict[str, HeadSpec]
    model: SuperMoE
    trainer: Trainer
    sizes: tuple[int, int]  # weights in all, and those that a token passes

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
            "parameters": self.sizes[0],
            "active_parameters": self.sizes[1],
            "steps": self.trainer.step,
            "best_step": progress["best_step"],
            "training_minutes": round(progress["minutes"], 2),
            "seed": self.config.seed,
        }

    def evaluate(self, split: str) -> Evaluation:
        """Load the best weights and measure them on a split."""
        self.trainer.load_best()
        return self.measure(split, metrics_only=False)

    def measure(self, split: str, names: Sequence[str] | None = None, metrics_only: bool = True) -> Evaluation:
        """Measure the weights that count as they are, all tasks or those named; `metrics_only`: see `evaluate`."""
        model, world = self.trainer.evaluated_model(), self.trainer.world
        tasks = {name: self.tasks[name] for name in names or self.tasks}
        bf16 = self.config.training.precision == "bf16"
        dealt = batches(self.config, self.store, split, world)
        with self.trainer.parallel.whole():
            return evaluate(model, tasks, dealt, split, event_names(self.store), bf16, world, metrics_only)

    def second_opinions(self) -> dict[str, SecondOpinion]:
        """What may answer beside the tasks' networks, of the weights that count."""
        heads = {name: self.trainer.evaluated_model().heads[name] for name in self.tasks}
        return {name: head.second for name, head in heads.items() if head.second is not None}

    def opinion_shares(self) -> dict[str, float]:
        """How much of each task's answers is that of a second opinion, where there can be one."""
        return {name: round(float(opinion.share), 2) for name, opinion in self.second_opinions().items()}

    def best_model(self) -> SuperMoE:
        """The best weights in a model of its own on the CPU, which no rank shares."""
        model = SuperMoE(self.store.schema, self.config.model, self.heads)
        load_weights(model, self.trainer.best, RETRAIN.format(self.trainer.best.parent))
        return model.eval()


def build_run(
    config: RunConfig,
    store: Store,
    folder: Path | None = None,
    until: float = 1.0,
    replay: list[Any] | None = None,
    world: World | None = None,
) -> Run:
    """Seed all generators and build tasks, model, objective and trainer, the heads at their priors.

    The trainer works in `folder`, that of the run by default, `until` a share of its schedule is done, and may `replay`
    another's evaluations; the ranks of a `world` build the same, and the trainer spreads it over them.
    """
    seed_everything(config.seed)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    choose_backend(config.training.backend)
    tasks = build_tasks(config, store)
    if config.loss.teachers is not None:
        untaught = teach(tasks, store, config.loss.teachers, config.seed, config.loss.teaching)
        if untaught:
            warnings.warn(
                f"loss.teachers: {', '.join(untaught)}: learnt from labels alone, as rankings and static attributes "
                "have no teacher",
                stacklevel=2,
            )
    heads = {name: task.head_spec() for name, task in tasks.items()}
    pretraining = {
        name: build("supermoe.objectives.pretraining", item, name=name, schema=store.schema)
        for name, item in pretraining_configs(config, store.schema, heads).items()
    }
    for objective in pretraining.values():
        heads |= objective.head_specs()
        objective.fit_prior(field_counts(store))
    world = world or World()
    parallel = Parallel(world, config.distributed)
    model = SuperMoE(store.schema, config.model, heads, parallel.deferred_rows)
    sizes = model.num_parameters(), model.num_parameters(active=True)
    parallel.shard_tables(model)
    warm_start(model, store, config.seed)
    weigh_inputs(model, tasks, store, config.seed)
    for name, task in tasks.items():
        task.init_head(model.heads[name])
        if heads[name].direct:
            fit_direct(model.heads[name], task, store, lambda rows: direct_inputs(model, store, rows), config.seed)
    for objective in pretraining.values():
        objective.init_heads(model.heads)
    model = model.to(world.device)
    balancer = build("supermoe.objectives.balancers", config.loss.balancer, names=list(tasks))
    trainer = Trainer(
        model,
        Objective(tasks, pretraining, balancer, units=config.loss.units, few_users=config.loss.few_users),
        batches(config, store, "train", world),
        batches(config, store, "valid", world),
        _training(config, store, heads),
        folder=folder or config.run,
        until=until,
        replay=replay,
        identity={**config.model_dump(mode="json"), "store": store.fingerprint},
        seed=config.seed,
        event_names=event_names(store),
        parallel=parallel,
    )
    return Run(config, store, tasks, heads, model, trainer, sizes)


def wants_refit(config: RunConfig, store: Store) -> bool:
    """Does the config ask for it, and is validation a cut in time (not each user's last event but one)?"""
    return config.training.refit and bool(store.summary["cuts"].get("valid"))


def _training(config: RunConfig, store: Store, heads: dict[str, HeadSpec]) -> TrainingConfig:
    """What one training is told, its length decided: a refit gets half of the minutes."""
    told = config.training
    minutes = told.max_minutes / 2 if told.max_minutes and wants_refit(config, store) else told.max_minutes
    is_open = told.epochs is None and told.evaluate_every is None  # and evaluations are epochs
    epochs = num_epochs(config, heads, store)
    patience = told.patience or (max(PATIENCE, epochs // 6) if is_open else None)
    return told.model_copy(update={"max_minutes": minutes, "epochs": epochs, "patience": patience})


def num_epochs(config: RunConfig, heads: dict[str, HeadSpec], store: Store) -> int:
    """Epochs of one training; where the config leaves it open, by what its tasks learn from and how much that is."""
    if config.training.epochs:
        return config.training.epochs
    reads_events = [heads[name].reads_events for name in config.tasks]
    examples, events = len(store.prepared.rows_of("train")), store.summary["events"]  # a refit has more, and is as long
    if any(reads_events):
        few = min(MOST_EPOCHS, FEW_EVENTS // events)
        epochs = min(max(EPOCHS_OF_EVENTS, few), 1 + ENOUGH_EVENTS // events)
    else:
        epochs = max(EPOCHS_OF_EXAMPLES, min(EPOCHS_OF_EVENTS, FEW_EXAMPLES // examples))
    return epochs if all(reads_events) else min(epochs, 1 + ENOUGH_EXAMPLES // examples)


def choose_backend(name: str | None) -> None:
    """Have every op of this process run on the back end that the config names; None: each call picks."""
    try:
        ops.use(name)
    except ValueError as error:
        raise UserError(f"training.backend: {error}") from error


def pretraining_configs(config: RunConfig, schema: Schema, heads: dict[str, HeadSpec]) -> dict[str, Any]:
    """What the config asks for; by default `next_event`, unless a task learns from events or no field is a category."""
    if config.loss.pretraining is not None:
        return {name: item for name, item in config.loss.pretraining.items() if item is not None}
    reads_events = any(spec.reads_events for spec in heads.values())
    has_category = any(field.kind == "category" for field in schema.fields.values())
    return {} if reads_events or not has_category else {"next_event": NextEvent.Config()}


def build_tasks(config: RunConfig, store: Store) -> dict[str, Task]:
    """The tasks of a config, their priors fitted on the training examples."""
    tasks, train, counts = {}, store.rows_of("train"), field_counts(store)
    for name, item in config.tasks.items():
        label = store.schema.labels[name]
        task = build("supermoe.objectives.tasks", item, name=name, label=label, schema=store.schema)
        labels = label_rows(store.labels[name], train)
        task.fit_prior(labels, counts.get(label.field or ""))
        if task.head_spec().reads == "example" and (reason := task.undefined(labels)):
            warnings.warn(
                f"tasks.{name}: in training {reason}, so there is nothing to learn: it is kept, and will answer its "
                f"prior. Check its `label`, or leave it out with tasks.{name}=null",
                stacklevel=2,
            )
        learns_from = train if task.head_spec().reads_events else train[asked(labels).numpy()]
        task.num_users = len(np.unique(store.examples.user[learns_from]))
        tasks[name] = task
    return tasks


def batches(config: RunConfig, store: Store, split: str, world: World | None = None) -> Batches:
    """The batches of a split, dealt out to the ranks of a world; those for training in random order."""
    world = world or World()
    return Batches(
        store,
        split,
        max_events=config.model.max_events,
        tokens_per_batch=config.training.tokens_per_batch,
        examples_per_batch=config.training.examples_per_batch,
        seed=config.seed,
        shuffle=split == "train",
        rank=world.rank,
        world_size=world.size,
    )


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
