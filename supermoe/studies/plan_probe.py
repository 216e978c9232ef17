"""Memory of activations, found by running the real model and losses at a small size and scaling what is seen.

One step on a made-up batch is run on the CPU under a mode that follows every storage from its birth to its end. What
lives between finished gradients, copies of weights and their gradients left out, is linear in the batch's tokens, in
the widths (dim and hidden sizes, scaled together) and, in routers, in the number of experts, so sizes that are too
large to run follow from those that are not. Layers, heads per layer, reads' lengths, tasks and objectives are those of
the config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from supermoe.config import ModelConfig, RunConfig
from supermoe.data.batch import Batch, Jagged, SetLabels
from supermoe.data.schema import FIRST_ID, LabelSchema, Schema
from supermoe.objectives.event_softmax import MAX_FULL_SOFTMAX
from supermoe.objectives.objective import Objective
from supermoe.studies.plan_live import Activations, follow
from supermoe.studies.plan_model import Blueprint, blueprint
from supermoe.typed_yaml import build

MAX_TOKENS, MAX_DIM, MAX_EXPERTS = 512, 64, 8  # what is run as it is; larger sizes are scaled up to
DAY = 86400


@dataclass(frozen=True)
class Shape:
    """The sizes that a batch is made up from; all reads are alike."""

    num_reads: int
    length: int  # events of a read
    examples_per_read: int

    @property
    def tokens(self) -> int:
        """Events of the batch."""
        return self.num_reads * self.length

    @property
    def examples(self) -> int:
        """Examples of the batch."""
        return self.num_reads * self.examples_per_read


def shape_of(config: RunConfig) -> Shape:
    """Reads as long as the model takes them, as many as the token budget holds, within the examples' budget."""
    length = min(config.model.max_events, config.training.tokens_per_batch)
    num_reads = max(1, config.training.tokens_per_batch // length)
    return Shape(min(num_reads, config.training.examples_per_batch or num_reads), length, 1)


def activations(config: RunConfig, schema: Schema, shape: Shape) -> Activations:
    """The activations of one micro-batch of this shape, run as it is or scaled up from smaller runs."""
    steps = config.model.dim // (4 * config.model.heads)  # dim is this many times its smallest value
    few_steps = max(1, MAX_DIM // (4 * config.model.heads))
    few_reads = max(1, MAX_TOKENS // shape.length)
    experts = config.model.moe.experts
    few_experts = min(experts, max(MAX_EXPERTS, config.model.moe.top_k))
    axes = [_nodes(shape.num_reads, few_reads), _nodes(steps, few_steps)]

    def run(num_reads: int, steps: int, experts: int, of: RunConfig = config) -> Activations:
        return _run(_smaller(of, steps, experts), schema, replace(shape, num_reads=num_reads))

    runs = {(reads, width): run(reads, width, few_experts) for reads, width in product(*axes)}
    found = {sizes: run.bytes_G for sizes, run in runs.items()}
    bytes_G = _extrapolate(found, axes, (shape.num_reads, steps))
    if experts > few_experts and config.model.layers > config.model.dense_layers:
        # Routers work in fp32, also under autocast; in 16 bits the CPU pads rows by experts, which would hide theirs.
        fp32 = config.model_copy(update={"training": config.training.model_copy(update={"precision": "fp32"})})
        num_reads, smallest = axes[0][0], axes[1][0]
        less, more = (run(num_reads, smallest, n, fp32).bytes_G for n in (few_experts, 2 * few_experts))
        bytes_G += (experts - few_experts) * (more - less) / few_experts * shape.num_reads / num_reads
    first = next(iter(runs.values()))
    return Activations(bytes_G, first.order, first.weights)


def _nodes(size: int, few: int) -> list[int]:
    """One size to run, if it is small, or two that a line can be drawn through."""
    return [size] if size <= max(few, 2) else [max(1, few // 2), max(2, few)]


def _extrapolate(
    found: dict[tuple[int, int], np.ndarray], axes: list[list[int]], target: tuple[int, int]
) -> np.ndarray:
    """The product of lines through the runs' values, at the target."""
    total = np.zeros_like(next(iter(found.values())), dtype=float)
    for sizes, value in found.items():
        weight = 1.0
        for size, nodes, goal in zip(sizes, axes, target, strict=True):
            other = next((node for node in nodes if node != size), None)
            weight *= 1.0 if other is None else (goal - other) / (size - other)
        total += weight * value
    return total


def _smaller(config: RunConfig, steps: int, experts: int) -> RunConfig:
    """The config with widths and experts changed; hidden sizes keep their proportion to dim."""
    model = config.model
    dim = 4 * model.heads * steps

    def scaled(hidden: int) -> int:
        return max(8, round(hidden * dim / model.dim / 8) * 8)

    moe = model.moe.model_copy(
        update={
            "experts": experts,
            "hidden": scaled(model.moe.hidden or 4 * model.dim // model.moe.top_k),
            "shared_hidden": scaled(model.moe.shared_hidden) if model.moe.shared_hidden else 0,
        }
    )
    if dim == model.dim:
        moe = model.moe.model_copy(update={"experts": experts})
    update = {"dim": dim, "hidden": scaled(model.hidden) if model.hidden else None, "moe": moe}
    smaller: ModelConfig = model.model_copy(update=update if dim != model.dim else {"moe": moe})
    return config.model_copy(update={"model": smaller})


def _run(config: RunConfig, schema: Schema, shape: Shape) -> Activations:
    """One step of the real model and losses on a made-up batch, followed storage by storage."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plan = blueprint(config, small_tables(schema), "cpu")
        batch = made_up_batch(plan.schema, shape)
        objective = objective_of(config, plan)
        return follow(plan.model, lambda: micro_batch(config, plan.model, objective, batch))


def micro_batch(config: RunConfig, model: Any, objective: Objective, batch: Batch) -> Tensor:
    """The loss of one micro-batch as the trainer takes it."""
    with torch.autocast(batch.time_N.device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
        output = model(batch)
        return objective.loss(model.heads, output, batch, objective.counts([batch]))[0]


def small_tables(schema: Schema) -> Schema:
    """The schema with vocabularies as large as it takes to be treated alike, for activations do not depend on them."""
    most = MAX_FULL_SOFTMAX + FIRST_ID + 1
    fields = {name: f.model_copy(update={"size": min(f.size, most)}) for name, f in schema.fields.items()}
    bags = {name: bag.model_copy(update={"size": min(bag.size, most)}) for name, bag in schema.bags.items()}
    labels = {
        name: label.model_copy(update={"num_classes": fields[label.field].size}) if label.field in fields else label
        for name, label in schema.labels.items()
    }
    return schema.model_copy(update={"fields": fields, "bags": bags, "labels": labels})


# --- what is made up --------------------------------------------------------------------------------------------------


def made_up_batch(schema: Schema, shape: Shape) -> Batch:
    """Random ids, numbers and labels; every example sees its whole read."""
    num_events, num_examples = shape.tokens, shape.examples
    fields, lists = {}, {}
    for name, field in schema.fields.items():
        if field.kind == "category":
            fields[name] = torch.randint(FIRST_ID, field.size, (num_events,))
        elif field.kind == "number":
            fields[name] = torch.rand(num_events)
        else:
            lists[name] = _lists(num_events, 2, field.size)
    time_N = torch.arange(num_events) % shape.length * DAY
    return Batch(
        offsets_S=torch.arange(shape.num_reads + 1) * shape.length,
        previous_S=torch.zeros(shape.num_reads, dtype=torch.int64),
        time_N=time_N,
        fields=fields,
        lists=lists,
        read_B=torch.arange(shape.num_reads).repeat_interleave(shape.examples_per_read),
        visible_B=torch.full((num_examples,), shape.length),
        cut_B=torch.full((num_examples,), shape.length * DAY),
        example_B=torch.arange(num_examples),
        features_BP=torch.rand(num_examples, len(schema.features)),
        bags={name: _lists(num_examples, min(bag.max_ids, 32), bag.size, True) for name, bag in schema.bags.items()},
        labels={name: _labels(label, num_examples) for name, label in schema.labels.items()},
    )


def objective_of(config: RunConfig, plan: Blueprint) -> Objective:
    """The run's objective with priors of made-up labels."""
    counts = {name: torch.ones(field.size) for name, field in plan.schema.fields.items() if field.kind != "number"}
    for name, task in plan.tasks.items():
        label = plan.schema.labels[name]
        task.fit_prior(_labels(label, 64), counts.get(label.field or ""))
    for item in plan.pretraining.values():
        item.fit_prior(counts)
    balancer = build("supermoe.objectives.balancers", config.loss.balancer, names=list(plan.tasks))
    return Objective(plan.tasks, plan.pretraining, balancer)


def _labels(label: LabelSchema, num_examples: int) -> Any:
    if label.kind == "number":
        return (torch.arange(num_examples) % 2).float()
    first = FIRST_ID if label.field else 0
    if label.kind == "class":
        return first + torch.arange(num_examples) % (label.num_classes - first)
    lists = _lists(num_examples, 2, label.num_classes, first=first)
    return SetLabels(torch.ones(num_examples, dtype=torch.bool), lists.offsets, lists.ids)


def _lists(number: int, length: int, size: int, counted: bool = False, first: int = FIRST_ID) -> Jagged:
    """Lists of distinct ids, as far as there are as many."""
    length = min(length, size - first)
    start = torch.randint(0, size - first, (number, 1))
    ids = first + (start + torch.arange(length)) % (size - first)
    return Jagged(torch.arange(number + 1) * length, ids.flatten(), torch.ones(ids.numel()) if counted else None)
