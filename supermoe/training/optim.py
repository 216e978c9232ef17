"""Optimisers, the learning-rate schedule, gradient clipping and the average of weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from supermoe.config import TrainingConfig
from supermoe.distributed.parallelize import Parallel
from supermoe.distributed.row_shard import save_state_whole
from supermoe.typed_yaml import UserError

Tensors = tuple[Tensor, ...] | list[Tensor]


DECAY_OVER_RUN = 0.4


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator per row of a table, as in FBGEMM; a vector counts as rows of one.

    h_r += mean_d(g_rd^2), w_r -= lr g_r / (sqrt(h_r) + eps). Rows without a gradient are not touched; dense and sparse
    gradients are accepted.
    """

    def __init__(self, params: Any, lr: float, eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "eps": eps})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["sum"] = torch.zeros(len(param), device=param.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no closure to call
        """Update the rows that were seen."""
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group["lr"], group["eps"])

    def _update(self, param: Tensor, lr: float, eps: float) -> None:
        total_R, grad = self.state[param]["sum"], param.grad
        assert grad is not None
        if grad.is_sparse:
            grad = grad.coalesce()
            row, grad_rows = grad.indices()[0], grad.values()
        else:
            row = _as_rows(grad).abs().amax(dim=1).nonzero()[:, 0]
            grad_rows = grad[row]
        grad_rows = _as_rows(grad_rows)
        total_R[row] += grad_rows.float().square().mean(dim=1)
        _as_rows(param)[row] -= lr * grad_rows / (total_R[row].sqrt() + eps)[:, None].to(param.dtype)


def _as_rows(x: Tensor) -> Tensor:
    return x if x.ndim > 1 else x[:, None]


def build_optimizers(
    model: nn.Module, config: TrainingConfig, num_steps: int, parallel: Parallel | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW for the dense weights, and the configured optimiser for the embedding tables (parameters with `is_table`:
    tables, and the biases of heads that score their rows). Tables whose rows are sharded take row-wise Adagrad only.

    Matrices decay, norms and biases do not. Unless it is given, the decay d follows from the length of the run, so that
    d * lr * num_steps = `DECAY_OVER_RUN`: what weights forget over a run is then the same for small and for large logs
    (arXiv 2405.13698, on the timescale of AdamW's average).
    """
    decay = DECAY_OVER_RUN / (config.lr * num_steps) if config.weight_decay is None else config.weight_decay
    params = [p for p in model.parameters() if p.requires_grad]
    by_row = config.table_optimizer == "rowwise_adagrad"
    _check_tables(params, by_row)
    tables = [p for p in params if getattr(p, "is_table", False) and (by_row or p.ndim >= 2)]
    table_ids = {id(p) for p in tables}
    dense = [p for p in params if id(p) not in table_ids and not hasattr(p, "shard")]
    experts = [p for p in params if id(p) not in table_ids and hasattr(p, "shard")]
    groups = _decaying(dense, decay)
    table_lr = config.table_lr or config.lr
    if not by_row:
        groups.append({"params": tables, "weight_decay": decay, "lr": table_lr})
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "fused": True}
    optimizers = [(parallel or Parallel()).optimizer(torch.optim.AdamW)(groups, **options)]
    if experts:  # an optimiser of their own: where dense weights are sharded, the two must not mix
        optimizers.append(torch.optim.AdamW(_decaying(experts, decay), **options))
    if by_row and tables:
        optimizers.append(RowwiseAdagrad(tables, lr=table_lr))
        save_state_whole(optimizers[-1])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def _decaying(params: list[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _check_tables(params: list[nn.Parameter], by_row: bool) -> None:
    for param in params:
        if getattr(param, "is_table", False) and hasattr(param, "shard") and not by_row:
            raise UserError(
                "training.table_optimizer: sharded tables have sparse gradients, which adamw does not take: set it to "
                "rowwise_adagrad"
            )
        if getattr(param, "is_table", False) and isinstance(param, DTensor) and by_row:
            raise UserError(
                "training.table_optimizer: rowwise_adagrad works on whole tables, or on tables sharded by rows; with "
                "distributed.strategy=fsdp2 use adamw, or choose the strategy ddp"
            )


def start_optimizers(optimizers: list[torch.optim.Optimizer]) -> None:
    """Give every weight its optimiser state, so that there is something to load into; no weight changes."""
    for optimizer in optimizers:
        set_lr([optimizer], 0.0)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, dict[str, Tensor]]:
    """The state of every weight by its name, to be saved, or filled in place: rates and decay follow from the config.

    Sharded rows appear as DTensors, and a rank knows only the weights whose state it keeps, so that any division of the
    weights over ranks saves and loads the same whole.
    """
    names: dict[Any, str] = {param: name for name, param in model.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {}
    for optimizer in optimizers:
        # fairscale's OSS keeps this rank's part in an optimiser of its own
        for param, state in getattr(optimizer, "optim", optimizer).state.items():
            shard = getattr(param, "shard", None)
            found[names[param]] = {
                key: shard.as_global(value) if shard is not None and value.ndim else value
                for key, value in state.items()
            }
    return found


def lr_factor(progress: float, config: TrainingConfig) -> float:
    """Share of the full learning rate at `progress` in [0, 1] of the run.

    Linear warm-up, then a cosine to 0, or a constant and a linear decay to 0 over the last `decay_share`.
    """
    if progress < config.warmup_share:
        return progress / config.warmup_share
    if config.schedule == "cosine":
        after = (progress - config.warmup_share) / max(1 - config.warmup_share, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min(after, 1.0)))
    return min(1.0, max(0.0, 1 - progress) / max(config.decay_share, 1e-9))


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's full learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients, sparse ones too, so that their global norm is at most `max_norm` -> the norm before.

    Of weights that are spread over ranks every rank adds its part.
    """
    parts: dict[DeviceMesh | None, list[Tensor]] = {}
    for p in model.parameters():
        if p.grad is not None:
            if p.grad.is_sparse:
                p.grad = p.grad.coalesce()
            shard = getattr(p, "shard", None)
            mesh = p.grad.device_mesh if isinstance(p.grad, DTensor) else shard.mesh if shard else None
            parts.setdefault(mesh, []).append(p.grad.values() if p.grad.is_sparse else local(p.grad))
    norms = [_norm(values, mesh) for mesh, values in parts.items()]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for values in parts.values():
        torch._foreach_mul_(values, scale)
    return float(norm)


def _norm(values: list[Tensor], mesh: DeviceMesh | None) -> Tensor:
    """Norm of tensors of which every rank of the mesh, if there is one, has a part."""
    norm = torch.nn.utils.get_total_norm(values)
    if mesh is None:
        return norm
    squared = norm.square()
    dist.all_reduce(squared, group=mesh.get_group())
    return squared.sqrt()


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor, over the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights, buffers copied; the first steps average over a shorter past."""

    def update(average: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        n = float(num_averaged)
        ours, theirs = [local(p) for p in average], [local(p) for p in current]
        torch._foreach_lerp_(ours, theirs, 1 - min(decay, (1 + n) / (10 + n)))

    average = AveragedModel(model, multi_avg_fn=update)
    for ours, theirs in zip(average.module.parameters(), model.parameters(), strict=True):
        ours.__dict__.update(theirs.__dict__)  # a copied parameter forgets that it is a table, or a part of one
    return average
