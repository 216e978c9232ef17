"""A plan as a person reads it."""

from __future__ import annotations

from supermoe.studies.plan import RESERVE, Plan
from supermoe.studies.plan_cost import OVERLAP, is_sharded, micro_batches

GIB = 2**30


def text_of(plan: Plan, advice: list[tuple[str, Plan]]) -> str:
    """Parameters, memory by kind, work, time, assumptions, and what to change where it does not fit."""
    parts = [_parameters(plan), _memory(plan), _step(plan), _assumptions(plan)]
    if not plan.fits:
        parts.append(_advice(advice))
    return "\n\n".join(parts)


def _parameters(plan: Plan) -> str:
    counts, mesh = plan.counts, plan.mesh
    tables = sum(counts.tables.values())
    local = sum(n / (mesh.gpus if is_sharded(name, plan.blueprint, mesh) else 1) for name, n in counts.tables.items())
    lines = [
        f"mesh        {mesh.gpus} GPUs as data {mesh.data} x expert {mesh.expert}, dense weights by {mesh.strategy}",
        f"parameters  {_number(counts.total)}: tables {_number(tables)}, experts {_number(counts.experts)}, "
        f"dense {_number(counts.dense)}; a token passes {_number(counts.active)}",
        f"per rank    tables {_number(local)}, experts {_number(counts.experts / mesh.expert)}",
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    memory = plan.memory
    rows = {
        "parameters": memory.parameters,
        "buffers": memory.buffers,
        "optimiser": memory.optimizer,
        "average of weights": memory.average,
        "gradients": memory.gradients,
        "activations": memory.activations,
        "exchange": memory.exchange,
        "peak": memory.peak,
    }
    lines = ["memory of a rank, GiB (gradients appear as activations go, so the peak is less than the sum)"]
    lines += [f"  {name:20}{size / GIB:10.3g}" for name, size in rows.items()]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return "\n".join([*lines, f"  {verdict}: {plan.limit / GIB:.0f} GiB of {plan.gpu.memory / GIB:.0f} may be used"])


def _step(plan: Plan) -> str:
    cost, micro = plan.cost, micro_batches(plan.config, plan.mesh)
    events = micro * plan.shape.tokens * plan.mesh.gpus
    lines = [
        f"step of a rank: {micro} x {plan.shape.tokens:,} events in {plan.shape.num_reads:,} reads",
        f"  FLOPs               {cost.flops:10.3g}",
        f"  experts, all-to-all {cost.expert_exchange / GIB:10.2f} GiB sent",
        f"  tables, all-to-all  {cost.table_exchange / GIB:10.2f} GiB sent at most",
        f"  gradients, weights  {cost.reduction / GIB:10.2f} GiB sent",
        f"  time                {cost.step_s:10.3g} s = compute {cost.compute_s:.3g} + memory {cost.memory_s:.3g} "
        f"+ links {cost.link_s:.3g}",
        f"  MFU                 {plan.mfu:10.1%}, {events / cost.step_s:,.0f} events/s on all ranks",
    ]
    return "\n".join(lines)


def _assumptions(plan: Plan) -> str:
    gpu, tflops = plan.gpu, plan.gpu.flops[plan.config.training.precision] / 1e12
    lines = [
        f"assumed: matrix products at {gpu.compute_share:.0%} of {tflops:.0f} TFLOP/s, memory at "
        f"{gpu.bandwidth_share:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s, links at {gpu.link_share:.0%} of "
        f"{gpu.node_link / 1e9:.0f} GB/s",
        f"inside nodes of {gpu.per_node} and {gpu.far_link / 1e9:.0f} GB/s beyond; reductions hide behind "
        f"{OVERLAP:.0%} of compute, exchanges behind nothing;",
        f"full reads, even load of experts, no id twice in a batch; {RESERVE:.0%} of memory kept for context, "
        "libraries and what",
        "the allocator loses; activations as the CPU's operators keep them",
    ]
    return "\n".join(lines)


def _advice(advice: list[tuple[str, Plan]]) -> str:
    lines = ["to make it fit, in this order:"]
    lines += [f"  {change:70} -> {after.memory.peak / GIB:8.1f} GiB" for change, after in advice]
    if not advice or not advice[-1][1].fits:
        lines.append(
            "  then still too large: a smaller model.dim, model.layers or model.moe, or a larger device (--gpu)"
        )
    return "\n".join(lines)


def _number(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,.0f}"
