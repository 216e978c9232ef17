"""What one optimiser step costs a rank: floating-point operations, bytes over links, and the time both should take."""

from __future__ import annotations

from dataclasses import dataclass

from supermoe.config import RunConfig
from supermoe.model.heads import FieldHead, NextFieldHead
from supermoe.model.moe import Experts, MoE
from supermoe.objectives.event_softmax import EventSoftmax
from supermoe.studies.plan_model import Blueprint, Counts, linear_weights
from supermoe.studies.plan_probe import Shape
from supermoe.typed_yaml import UserError, nearest

FP32 = 4  # bytes
OVERLAP = 0.5  # share of the compute time behind which reductions of gradients and gathering of weights can hide


@dataclass(frozen=True)
class Gpu:
    """A device as its data sheet has it, and the shares of that which training is assumed to reach."""

    memory: float  # bytes that a process can allocate
    flops: dict[str, float]  # per second, dense, by `training.precision`
    bandwidth: float  # bytes per second of memory
    node_link: float  # bytes per second and direction to the other devices of a node
    far_link: float  # bytes per second and direction to other nodes, per device
    per_node: int = 8
    compute_share: float = 0.4
    bandwidth_share: float = 0.8
    link_share: float = 0.7


GPUS = {
    "h200": Gpu(139 * 2**30, {"bf16": 989e12, "fp32": 67e12}, 4.8e12, 450e9, 50e9),
    "h100": Gpu(79 * 2**30, {"bf16": 989e12, "fp32": 67e12}, 3.35e12, 450e9, 50e9),
    "a100": Gpu(79 * 2**30, {"bf16": 312e12, "fp32": 19.5e12}, 2.0e12, 300e9, 25e9),
    "l4": Gpu(22 * 2**30, {"bf16": 121e12, "fp32": 30e12}, 0.3e12, 32e9, 12e9),
}


@dataclass(frozen=True)
class Mesh:
    """Ranks and how they share the work, as `distributed` in the config says."""

    gpus: int
    expert: int
    strategy: str
    shard_tables: int | None

    @property
    def data(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // self.expert


@dataclass(frozen=True)
class Cost:
    """Of one optimiser step on one rank."""

    flops: float
    expert_exchange: float  # bytes of all-to-all between experts, sent
    table_exchange: float  # bytes of all-to-all for rows of sharded tables, sent at most
    reduction: float  # bytes of gradients reduced and weights gathered, sent
    compute_s: float
    memory_s: float  # optimiser, average of weights and elementwise passes
    link_s: float  # not hidden behind compute

    @property
    def step_s(self) -> float:
        """Expected time."""
        return self.compute_s + self.memory_s + self.link_s


def mesh_of(config: RunConfig, gpus: int) -> Mesh:
    """The mesh of a config on this many devices; `UserError` where it cannot be."""
    setting, experts = config.distributed, config.model.moe.experts
    if gpus < 1:
        raise UserError(f"--gpus must be 1 or more, got {gpus}")
    if gpus % setting.expert:
        raise UserError(
            f"distributed.expert: {gpus} GPUs cannot be laid out as (data, expert) with expert="
            f"{setting.expert}; choose a divisor of {gpus}: {_divisors(gpus)}"
        )
    if experts % setting.expert:
        raise UserError(
            f"distributed.expert: model.moe.experts={experts} cannot be shared evenly by expert="
            f"{setting.expert} ranks; choose a divisor of {experts}: {_divisors(experts)}"
        )
    if setting.shard_tables is not None and config.training.table_optimizer == "adamw":
        raise UserError(
            "training.table_optimizer: sharded tables (distributed.shard_tables) have sparse gradients, which adamw "
            "does not take: set it to rowwise_adagrad"
        )
    if setting.expert > 1 and config.model.dense_layers >= config.model.layers:
        raise UserError("distributed.expert: the model has no experts, for model.dense_layers covers all model.layers")
    return Mesh(gpus, setting.expert, setting.strategy, setting.shard_tables)


def check_tables(config: RunConfig, made: Blueprint, mesh: Mesh) -> None:
    """Refuse what training refuses of sharded tables."""
    for name, head in made.model.heads.items():
        if isinstance(head, FieldHead) and field_is_sharded(head.tied.num_embeddings, mesh):
            softmax = _softmax_of(name, made)
            if name in made.tasks or softmax is None or softmax.num_negatives is None:
                raise UserError(
                    f"distributed.shard_tables: '{name}' scores all {head.tied.num_embeddings:,} ids of its field, "
                    f"which a table sharded by rows cannot: raise the limit above that, or learn from sampled softmax"
                )
    whole = [name for name, p in made.model.named_parameters() if is_table(name, made) and len(p) < _limit(mesh)]
    if mesh.strategy == "fsdp2" and config.training.table_optimizer == "rowwise_adagrad" and whole:
        raise UserError(
            "training.table_optimizer: with distributed.strategy=fsdp2, rowwise_adagrad updates sharded tables only, "
            f"and {whole[0]} stays whole: lower distributed.shard_tables, or use adamw or the strategy ddp"
        )


def _limit(mesh: Mesh) -> float:
    return float("inf") if mesh.shard_tables is None else mesh.shard_tables


def gpu_of(name: str) -> Gpu:
    """The device of this name."""
    if name not in GPUS:
        raise UserError(f"--gpu: unknown device '{name}', {nearest(name, GPUS)}")
    return GPUS[name]


def cost_of(
    config: RunConfig, made: Blueprint, counts: Counts, mesh: Mesh, shape: Shape, gpu: Gpu, activation_bytes: float
) -> Cost:
    """One optimiser step of `accumulate` micro-batches per rank."""
    micro = micro_batches(config, mesh)
    width = 2 if config.training.precision == "bf16" else FP32
    flops = 3 * micro * forward_flops(config, made, shape)  # the backward pass takes twice the forward
    tokens = _tokens(made, shape)
    moe_layers = config.model.layers - config.model.dense_layers
    rows = tokens * expert_ranks(config, mesh) * moe_layers
    # there and back, forward and backward; the share that stays on the rank is not sent
    expert_exchange = 4 * micro * rows * config.model.dim * width * _elsewhere(mesh.expert)
    num_sharded = sum(field_is_sharded(f.size, mesh) for f in made.schema.fields.values())
    ids = micro * num_sharded * shape.tokens * _elsewhere(mesh.gpus)
    table_exchange = ids * (2 * config.model.dim * FP32 + 8)
    whole = counts.dense + sum(n for name, n in counts.tables.items() if not is_sharded(name, made, mesh))
    # gather twice and scatter once; or the scatter and the gather of an all-reduce
    passes = 3 if mesh.strategy == "fsdp2" else 2
    reduction = FP32 * passes * whole * _elsewhere(mesh.gpus)
    reduction += FP32 * 2 * counts.experts / mesh.expert * _elsewhere(mesh.data)

    compute_s = flops / (gpu.flops[config.training.precision] * gpu.compute_share)
    updated = state_numbers(made, counts, mesh)
    memory_s = (updated * FP32 * 9 + micro * 4 * activation_bytes) / (gpu.bandwidth * gpu.bandwidth_share)
    exchange_s = expert_exchange / _link(gpu, mesh.expert) + table_exchange / _link(gpu, mesh.gpus)
    hidden_s = OVERLAP * compute_s
    link_s = exchange_s + max(0.0, reduction / _link(gpu, mesh.gpus) - hidden_s)
    return Cost(flops, expert_exchange, table_exchange, reduction, compute_s, memory_s, link_s)


def expert_ranks(config: RunConfig, mesh: Mesh) -> float:
    """Ranks that a token travels to, once each, where its experts are chosen independently."""
    return mesh.expert * (1 - (1 - 1 / mesh.expert) ** config.model.moe.top_k)


def micro_batches(config: RunConfig, mesh: Mesh) -> int:
    """Micro-batches of one rank in one step."""
    return max(1, -(-(config.training.accumulate or mesh.gpus) // mesh.gpus))


def forward_flops(config: RunConfig, made: Blueprint, shape: Shape) -> float:
    """Of one micro-batch: two per weight and row in every matrix product, causal attention counted by half."""
    model, dim, layers = made.model, config.model.dim, config.model.layers
    questions = _tokens(made, shape) - shape.tokens
    per_token = 0.0
    for block in model.encoder.blocks:
        per_token += 2 * linear_weights(block)
        if isinstance(block.feed_forward, MoE):
            experts: Experts = block.feed_forward.experts
            per_token += (
                2 * sum(p.numel() for p in experts.parameters()) / config.model.moe.experts * config.model.moe.top_k
            )
            per_token += 2 * dim * config.model.moe.experts
    attention = layers * dim * (2 * shape.length * shape.tokens + 4 * shape.length * questions)
    flops = per_token * (shape.tokens + questions) + attention
    flops += (
        2 * linear_weights(model.indicators) * shape.examples
        + 2 * shape.tokens * model.embedding.interpolated.weight.numel()
    )
    return flops + sum(_head_flops(name, head, made, shape) for name, head in model.heads.items())


def _head_flops(name: str, head: object, made: Blueprint, shape: Shape) -> float:
    if not isinstance(head, FieldHead):
        return 2.0 * shape.examples * sum(p.numel() for p in head.parameters() if p.ndim == 2)  # type: ignore[attr-defined]
    softmax = _softmax_of(name, made)
    rows = shape.examples if head.copy is not None else shape.tokens
    scored = head.tied.num_embeddings if softmax is None or softmax.num_negatives is None else softmax.num_negatives
    if isinstance(head, NextFieldHead):  # at cuts it scores all ids twice: as the last event does, and its correction
        at_cuts = linear_weights(head) + 2 * head.tied.num_embeddings * head.tied.embedding_dim
        at_events = linear_weights(head.project) + scored * head.tied.embedding_dim
        return 2.0 * (shape.examples * at_cuts + shape.tokens * at_events)
    return 2.0 * rows * (linear_weights(head) + scored * head.tied.embedding_dim)


def _softmax_of(name: str, made: Blueprint) -> EventSoftmax | None:
    """How the head of this name is learnt; None: over all ids."""
    for objective in made.pretraining.values():
        for field, softmax in getattr(objective, "softmax", {}).items():
            if objective.head_name(field) == name:
                return softmax
    task = made.tasks.get(name)
    return task.softmax if task is not None and task.head_spec().reads_events else None


def state_numbers(made: Blueprint, counts: Counts, mesh: Mesh) -> float:
    """Parameters that one rank keeps and updates."""
    return counts.dense / dense_ranks(mesh) + counts.experts / mesh.expert + table_numbers(made, counts, mesh)


def table_numbers(made: Blueprint, counts: Counts, mesh: Mesh) -> float:
    """Of these, those in tables."""
    return sum(
        n / (mesh.gpus if is_sharded(name, made, mesh) else dense_ranks(mesh)) for name, n in counts.tables.items()
    )


def dense_ranks(mesh: Mesh) -> int:
    """Over how many ranks the dense strategy spreads weights, whole tables among them."""
    return mesh.gpus if mesh.strategy == "fsdp2" else 1


def is_table(name: str, made: Blueprint) -> bool:
    """Whether the parameter of this name is a table's, or a bias of its rows."""
    return getattr(made.model.get_parameter(name), "is_table", False)


def is_sharded(name: str, made: Blueprint, mesh: Mesh) -> bool:
    """Whether the parameter of this name lies by rows on all ranks."""
    return field_is_sharded(made.model.get_parameter(name).shape[0], mesh)


def field_is_sharded(size: int, mesh: Mesh) -> bool:
    """Whether a table of this many rows is sharded."""
    return size >= _limit(mesh)


def _tokens(made: Blueprint, shape: Shape) -> int:
    """Events and indicator tokens of a micro-batch."""
    return shape.tokens + shape.examples * (1 + len(made.model.readout.questions))


def _elsewhere(ranks: int) -> float:
    return 1 - 1 / ranks


def _link(gpu: Gpu, ranks: int) -> float:
    return (gpu.node_link if ranks <= gpu.per_node else gpu.far_link) * gpu.link_share


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
