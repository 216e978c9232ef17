"""What a config's model is made of, without data and without memory: sizes come from a store or the config alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from supermoe.config import RunConfig, WindowLabel
from supermoe.data.schema import FIRST_ID, BagSchema, FieldSchema, LabelSchema, Schema
from supermoe.data.store import Store
from supermoe.model.moe import Experts
from supermoe.model.supermoe import SuperMoE
from supermoe.training.build import pretraining_configs
from supermoe.typed_yaml import UserError, build, format_duration, nearest

ASSUMED_CLASSES = 20  # of a label whose classes are known only once the log is prepared


@dataclass(frozen=True)
class Blueprint:
    """A schema, and the tasks, pre-training objectives and model that a config makes of it."""

    schema: Schema
    tasks: dict[str, Any]
    pretraining: dict[str, Any]
    model: SuperMoE


@dataclass(frozen=True)
class Counts:
    """Parameters by where they live, and the bytes of what is kept but not learnt."""

    dense: int
    experts: int
    tables: dict[str, int]  # rows x width by name, tied biases included
    active: int  # those that one token passes
    buffers: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts + sum(self.tables.values())


def schema_of(config: RunConfig) -> Schema:
    """The prepared store's schema, or the one that the config's own sizes give at most.

    Raises:
        UserError: where there is no store, and the config leaves to the log what a plan needs.
    """
    if (config.store / "schema.json").exists():
        return Store.open(config.store).schema
    remedy = f"or prepare the store {config.store} first: python -m supermoe.prepare"
    fields: dict[str, FieldSchema] = {}
    for name, field in config.data.fields.items():
        if field is not None:
            size = 0 if field.kind == "number" else FIRST_ID + (field.hash_size or field.max_size)
            fields[name] = FieldSchema(kind=field.kind, size=size, hash_size=field.hash_size)
    if not fields:
        raise UserError(f"data.fields: a plan without a prepared store needs every field and its size here, {remedy}")
    features, bags = [], {}
    for group, item in config.features.items():
        if item is None:
            continue
        if item.auto:
            raise UserError(
                f"features.{group}.auto: what it derives is known once the log is read; set "
                f"features.{group}=null, {remedy}"
            )
        windows = [format_duration(window) for window in item.windows]
        features += [f"{group}_{name}_{window}" for name in item.sql for window in windows]
        for name in item.bag:
            if name not in fields:
                raise UserError(f"features.{group}.bag: there is no field '{name}', {nearest(name, fields)}")
            for window, label in zip(item.windows, windows, strict=True):
                size = fields[name].size
                bags[f"{group}_{name}_{label}"] = BagSchema(field=name, window=window, size=size, max_ids=item.max_bag)
    labels = {name: _label(task.label, task.label_kind, fields) for name, task in config.tasks.items() if task}
    return Schema(fields=fields, features=features, bags=bags, labels=labels)


def _label(label: WindowLabel, kind: Any, fields: dict[str, FieldSchema]) -> LabelSchema:
    field = label.field or label.next
    if kind == "number":
        return LabelSchema(kind=kind)
    if field is not None:
        return LabelSchema(kind=kind, field=field, num_classes=fields[field].size if field in fields else 0)
    return LabelSchema(kind=kind, classes=list(range(ASSUMED_CLASSES)), num_classes=ASSUMED_CLASSES)


def blueprint(config: RunConfig, schema: Schema, device: str = "meta") -> Blueprint:
    """Tasks, objectives and model as `training.build` makes them; on the meta device no memory is taken."""
    tasks = {
        name: build("supermoe.objectives.tasks", item, name=name, label=schema.labels[name], schema=schema)
        for name, item in config.tasks.items()
    }
    heads = {name: task.head_spec() for name, task in tasks.items()}
    pretraining = {
        name: build("supermoe.objectives.pretraining", item, name=name, schema=schema)
        for name, item in pretraining_configs(config, schema, heads).items()
    }
    for objective in pretraining.values():
        heads |= objective.head_specs()
    with torch.device(device):
        model = SuperMoE(schema, config.model, heads)
    return Blueprint(schema, tasks, pretraining, model)


def count(model: SuperMoE) -> Counts:
    """Parameters of a model by kind."""
    experts = sum(p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
    tables = {name: p.numel() for name, p in model.named_parameters() if getattr(p, "is_table", False)}
    dense = model.num_parameters() - experts - sum(tables.values())
    buffers = sum(b.nbytes for b in model.buffers())
    return Counts(dense, experts, tables, model.num_parameters(active=True), buffers)


def linear_weights(module: nn.Module) -> int:
    """Numbers in the matrices of a module that every row is multiplied with."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
