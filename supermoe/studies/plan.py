"""What a config would need on so many devices: memory by kind, work and time of a step, and what to change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from supermoe.config import RunConfig
from supermoe.data.schema import Schema
from supermoe.model.heads import FieldHead
from supermoe.studies.plan_cost import (
    FP32,
    Cost,
    Gpu,
    Mesh,
    check_tables,
    cost_of,
    dense_ranks,
    expert_ranks,
    field_is_sharded,
    gpu_of,
    is_sharded,
    is_table,
    mesh_of,
    micro_batches,
    state_numbers,
    table_numbers,
)
from supermoe.studies.plan_live import Activations
from supermoe.studies.plan_model import Blueprint, Counts, blueprint, count, schema_of
from supermoe.studies.plan_probe import Shape, activations, shape_of, small_tables
from supermoe.typed_yaml import UserError, apply_override, validate

RESERVE = 0.06  # of a device's memory: context, libraries, what the allocator cannot use
WORTH = 0.02  # share of the peak that a change must save to be advised
MIN_SHARDED_ROWS = 100_000  # what is advised for distributed.shard_tables


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Gradients appear while activations go, so `peak` is less than their sum."""

    parameters: float
    buffers: float
    optimizer: float
    average: float
    gradients: float
    activations: float  # most at any time
    exchange: float  # rows under way between ranks, gathered weights, buckets of gradients
    peak: float


@dataclass(frozen=True)
class Plan:
    """A config on a mesh of devices."""

    config: RunConfig
    blueprint: Blueprint
    counts: Counts
    mesh: Mesh
    gpu: Gpu
    shape: Shape
    memory: Memory
    cost: Cost

    @property
    def limit(self) -> float:
        """Bytes of a device that training may use."""
        return self.gpu.memory * (1 - RESERVE)

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the limit."""
        return self.memory.peak <= self.limit

    @property
    def mfu(self) -> float:
        """Model FLOPs of a step over what the device could do in its time."""
        return self.cost.flops / (self.cost.step_s * self.gpu.flops[self.config.training.precision])


class Planner:
    """Plans of one schema; activations that were found are kept for the next plan."""

    def __init__(self, schema: Schema, gpu: str):
        self.schema, self.gpu = schema, gpu_of(gpu)
        self._found: dict[str, Activations] = {}

    def plan(self, config: RunConfig, gpus: int) -> Plan:
        """The plan of a config on this many devices; `UserError` where the mesh cannot be."""
        mesh, shape = mesh_of(config, gpus), shape_of(config)
        made = blueprint(config, self.schema)
        check_tables(config, made, mesh)
        counts = count(made.model)
        found = self._activations(config, shape)
        memory = memory_of(config, made, counts, mesh, shape, found)
        cost = cost_of(config, made, counts, mesh, shape, self.gpu, memory.activations)
        return Plan(config, made, counts, mesh, self.gpu, shape, memory, cost)

    def advice(self, plan: Plan) -> list[tuple[str, Plan]]:
        """Changes, each on top of those before, that lead to a plan that fits: (overrides, the plan with them)."""
        steps: list[tuple[str, Plan]] = []
        for change in _changes(plan):
            before = steps[-1][1] if steps else plan
            if before.fits:
                break
            gpus = before.mesh.gpus * 2 if change is _MORE else before.mesh.gpus
            try:
                after = self.plan(_changed(before.config, change), gpus)
            except UserError:
                continue  # this change is not possible here
            if after.memory.peak < before.memory.peak * (1 - WORTH):
                steps.append((f"--gpus {gpus}" if change is _MORE else " ".join(change), after))
        return steps

    def _activations(self, config: RunConfig, shape: Shape) -> Activations:
        key = f"{config.model.model_dump_json()} {config.training.precision} {shape}"
        if key not in self._found:
            self._found[key] = activations(config, self.schema, shape)
        return self._found[key]


def make_plan(config: RunConfig, gpus: int, gpu: str) -> tuple[Plan, list[tuple[str, Plan]]]:
    """The plan of a config, and the changes that make it fit where it does not."""
    mesh_of(config, gpus)  # before the seconds that the rest takes
    planner = Planner(schema_of(config), gpu)
    plan = planner.plan(config, gpus)
    return plan, planner.advice(plan)


def memory_of(
    config: RunConfig, made: Blueprint, counts: Counts, mesh: Mesh, shape: Shape, found: Activations
) -> Memory:
    """Bytes by kind on one rank."""
    numbers, in_tables = state_numbers(made, counts, mesh), table_numbers(made, counts, mesh)
    whole = {name: n for name, n in counts.tables.items() if not is_sharded(name, made, mesh)}
    replicated = counts.dense + sum(whole.values())
    by_row = config.training.table_optimizer == "rowwise_adagrad"
    # OSS shards the state of AdamW, but not of experts
    states = 2 * FP32 * ((numbers - counts.experts / mesh.expert - by_row * in_tables) / _state_ranks(mesh))
    states += 2 * FP32 * counts.experts / mesh.expert
    states += by_row * FP32 * sum(_rows(name, made) / _table_ranks(name, made, mesh) for name in counts.tables)
    average = FP32 * numbers + counts.buffers if config.training.ema else 0.0
    gradients = FP32 * (replicated / dense_ranks(mesh) + counts.experts / mesh.expert)
    live_G, grads_G = _timeline(made, mesh, found)
    if micro_batches(config, mesh) > 1:
        grads_G = np.full_like(grads_G, gradients)
    exchange = _exchange(config, made, mesh, shape, replicated)
    static = FP32 * numbers + counts.buffers + states + average + exchange
    peak = static + max(float((live_G + grads_G).max()), gradients)
    return Memory(
        parameters=FP32 * numbers,
        buffers=counts.buffers,
        optimizer=states,
        average=average,
        gradients=gradients,
        activations=float(live_G.max()),
        exchange=exchange,
        peak=peak,
    )


def _timeline(made: Blueprint, mesh: Mesh, found: Activations) -> tuple[np.ndarray, np.ndarray]:
    """Activations up to each finished gradient, copies of weights among them, and the gradients finished before."""
    size = np.array([FP32 * _gradient(name, made, mesh) for name in found.order])
    table = np.array([is_table(name, made) for name in found.order])
    # A table's gradient counts from its beginning: the run has it among the activations, but of a small table.
    grads_G = np.cumsum([0.0, *size]) + np.append(size * table, 0.0)
    # A whole table that is also a head's waits for its second gradient with the first.
    run = small_tables(made.schema).fields
    missing = sum(
        FP32 * made.model.config.dim * (field.size - run[name].size)
        for name, field in made.schema.fields.items()
        if name in _tied_fields(made) and not field_is_sharded(field.size, mesh)
    )
    weights_G = sum(per_number_G * _used(name, made, mesh) for name, per_number_G in found.weights.items())
    return found.bytes_G + missing + weights_G, grads_G


_EXPERTS = ".experts."  # in the names of their parameters


def _used(name: str, made: Blueprint, mesh: Mesh) -> float:
    """Numbers of a weight that one rank computes with; FSDP2 gathers those it has spread."""
    size = made.model.get_parameter(name).numel()
    return size / mesh.expert if _EXPERTS in name else size


def _gradient(name: str, made: Blueprint, mesh: Mesh) -> float:
    """Numbers that the dense gradient of a parameter holds on one rank."""
    if is_table(name, made) and is_sharded(name, made, mesh):
        return 0.0  # sparse: among the activations
    return _used(name, made, mesh) / (1 if _EXPERTS in name else dense_ranks(mesh))


def _rows(name: str, made: Blueprint) -> int:
    return made.model.get_parameter(name).shape[0]


def _table_ranks(name: str, made: Blueprint, mesh: Mesh) -> int:
    return mesh.gpus if is_sharded(name, made, mesh) else dense_ranks(mesh)


def _state_ranks(mesh: Mesh) -> int:
    return mesh.gpus if mesh.strategy == "fairscale" else 1


def _tied_fields(made: Blueprint) -> set[str]:
    tied = {id(head.tied) for head in made.model.heads.values() if isinstance(head, FieldHead)}
    return {name for name, table in made.model.embedding.tables.items() if id(table) in tied}


def _exchange(config: RunConfig, made: Blueprint, mesh: Mesh, shape: Shape, replicated: float) -> float:
    """Bytes that only several ranks need."""
    if mesh.gpus == 1:
        return 0.0
    row = config.model.dim * (2 if config.training.precision == "bf16" else FP32)
    # rows of one layer: sent, arrived, their outputs, and these come back
    total = 4 * shape.tokens * expert_ranks(config, mesh) * row if mesh.expert > 1 else 0.0
    sharded = sum(field_is_sharded(field.size, mesh) for field in made.schema.fields.values())
    total += sharded * 3 * shape.tokens * config.model.dim * FP32  # rows, their gradients, and these at their owners
    # FSDP2 gathers all weights of its one group and reduces their gradients; DDP fills buckets with gradients
    return total + (2 if mesh.strategy == "fsdp2" else 1) * FP32 * replicated


# --- advice -----------------------------------------------------------------------------------------------------------

_MORE = ("more devices",)


def _changes(plan: Plan) -> list[tuple[str, ...]]:
    """What may help, in the order in which it costs."""
    config, mesh = plan.config, plan.mesh
    changes: list[tuple[str, ...]] = []
    if mesh.gpus > 1 and max((f.size for f in plan.blueprint.schema.fields.values()), default=0) >= MIN_SHARDED_ROWS:
        changes.append((f"distributed.shard_tables={MIN_SHARDED_ROWS}", "training.table_optimizer=rowwise_adagrad"))
    changes.append(("training.table_optimizer=rowwise_adagrad",))
    if mesh.gpus > 1:
        changes.append(("distributed.strategy=fsdp2",))
    experts = config.model.moe.experts
    wider = [n for n in range(mesh.expert + 1, mesh.gpus + 1) if mesh.gpus % n == 0 and experts % n == 0]
    changes += [(f"distributed.expert={n}",) for n in wider]
    changes += [("training.precision=bf16",), ("training.ema=null",)]
    tokens, share = config.training.tokens_per_batch, config.training.accumulate or mesh.gpus
    changes += [
        (f"training.tokens_per_batch={tokens // n}", f"training.accumulate={share * n}") for n in (2, 4) if tokens >= n
    ]
    return [*changes, *[_MORE] * 4]


def _changed(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    raw = config.model_dump(mode="json")
    for text in overrides if overrides is not _MORE else ():
        raw = apply_override(raw, text)
    return validate(RunConfig, raw, "plan")
