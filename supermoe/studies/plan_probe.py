"""Memory of activations, found by running the real model and losses at a small size and scaling what is seen.

One step on a made-up batch is run on the CPU under a mode that follows every storage from its birth to its end. What
lives at the moment each gradient is finished is linear in the batch's tokens, in the widths (dim and hidden sizes,
scaled together) and in the number of experts, so sizes that are too large to run follow from those that are not.
Layers, heads per layer, reads' lengths, tasks and objectives are those of the config.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from supermoe.config import ModelConfig, RunConfig
from supermoe.data.batch import Batch, Jagged, SetLabels
from supermoe.data.schema import FIRST_ID, LabelSchema, Schema
from supermoe.objectives.event_softmax import MAX_FULL_SOFTMAX
from supermoe.objectives.objective import Objective
from supermoe.studies.plan_model import Blueprint, blueprint
from supermoe.typed_yaml import build

MAX_TOKENS, MAX_DIM, MAX_EXPERTS = 512, 64, 8  # what is run as it is; larger sizes are scaled up to
DAY = 86400


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def ignore(self, tensors: Any) -> None:
        """Do not count these: they were there before."""
        self._known |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def _follow(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._known or size == 0:
            return
        self._known.add(place)
        self.now += size
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


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


@dataclass(frozen=True)
class Activations:
    """Most bytes of activations before the first gradient is finished, and between one finished gradient and the next.

    `order` names the parameters in the order in which their gradients are finished.
    """

    bytes_G: np.ndarray  # [1 + len(order)]
    order: list[str]


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
    few_experts = max(MAX_EXPERTS, config.model.moe.top_k)
    axes = [
        _nodes(shape.num_reads, few_reads),
        _nodes(steps, few_steps),
        _nodes(experts, few_experts) if config.model.layers > config.model.dense_layers else [experts],
    ]
    runs = {
        sizes: _run(_smaller(config, *sizes[1:]), schema, Shape(sizes[0], shape.length, shape.examples_per_read))
        for sizes in product(*axes)
    }
    found = {sizes: run.bytes_G for sizes, run in runs.items()}
    bytes_G = _extrapolate(found, axes, (shape.num_reads, steps, experts))
    return Activations(bytes_G, next(iter(runs.values())).order)


def _nodes(size: int, few: int) -> list[int]:
    """One size to run, if it is small, or two that a line can be drawn through."""
    return [size] if size <= max(few, 2) else [max(1, few // 2), max(2, few)]


def _extrapolate(
    found: dict[tuple[int, ...], np.ndarray], axes: list[list[int]], target: tuple[int, ...]
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


def follow(model: nn.Module, step: Callable[[], Tensor]) -> Activations:
    """Run `step` and its backward pass; activations are what lives, less the gradients that are finished."""
    peaks: list[int] = []
    order: list[str] = []
    live, finished = LiveBytes(), 0

    def note(name: str, param: Tensor) -> None:
        nonlocal finished
        peaks.append(live.peak - finished)
        order.append(name)
        grad = param.grad
        assert grad is not None
        finished += grad.nbytes if grad.layout == torch.strided else 0
        live.peak = live.now

    hooks = [
        param.register_post_accumulate_grad_hook(lambda p, name=name: note(name, p))
        for name, param in model.named_parameters()
    ]
    live.ignore([*model.parameters(), *model.buffers()])
    with live:
        step().backward()
    peaks.append(live.peak - finished)
    for hook in hooks:
        hook.remove()
    return Activations(np.array(peaks), order)


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
