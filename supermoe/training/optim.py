"""Optimisers, the learning-rate schedule, gradient clipping and the average of weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from supermoe.config import TrainingConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


DECAY_OVER_RUN = 0.4


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator per row of a table, as in FBGEMM.

    h_r += mean_d(g_rd^2), w_r -= lr g_r / (sqrt(h_r) + eps). Rows without a gradient are not touched; dense and sparse
    gradients are accepted.
    """

    def __init__(self, params: Any, lr: float, eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no closure to call
        """Update the rows that were seen."""
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group["lr"], group["eps"])

    def _update(self, param: Tensor, lr: float, eps: float) -> None:
        if "sum" not in self.state[param]:
            self.state[param]["sum"] = torch.zeros(len(param), device=param.device)
        total_R, grad = self.state[param]["sum"], param.grad
        assert grad is not None
        if grad.is_sparse:
            grad = grad.coalesce()
            row, grad_rows = grad.indices()[0], grad.values()
        else:
            row = grad.abs().amax(dim=1).nonzero()[:, 0]
            grad_rows = grad[row]
        total_R[row] += grad_rows.float().square().mean(dim=1)
        param[row] -= lr * grad_rows / (total_R[row].sqrt() + eps)[:, None].to(param.dtype)


def build_optimizers(model: nn.Module, config: TrainingConfig, num_steps: int) -> list[torch.optim.Optimizer]:
    """AdamW for the dense weights, and the configured optimiser for the embedding tables (parameters with `is_table`).

    Matrices decay, norms and biases do not. Unless it is given, the decay d follows from the length of the run, so that
    d * lr * num_steps = `DECAY_OVER_RUN`: what weights forget over a run is then the same for small and for large logs
    (arXiv 2405.13698, on the timescale of AdamW's average).
    """
    decay = DECAY_OVER_RUN / (config.lr * num_steps) if config.weight_decay is None else config.weight_decay
    params = [p for p in model.parameters() if p.requires_grad]
    tables = [p for p in params if getattr(p, "is_table", False)]
    dense = [p for p in params if not getattr(p, "is_table", False)]
    groups = [
        {"params": [p for p in dense if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in dense if p.ndim < 2], "weight_decay": 0.0},
    ]
    table_lr = config.table_lr or config.lr
    optimizers: list[torch.optim.Optimizer] = []
    if config.table_optimizer == "rowwise_adagrad":
        if tables:
            optimizers.append(RowwiseAdagrad(tables, lr=table_lr))
    else:
        groups.append({"params": tables, "weight_decay": decay, "lr": table_lr})
    groups = [group for group in groups if group["params"]]
    optimizers.insert(0, torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


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
    """Scale all gradients, sparse ones too, so that their global norm is at most `max_norm` -> the norm before."""
    for p in model.parameters():
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
    values = [p.grad.values() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(values)
    torch._foreach_mul_(values, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights, buffers copied; the first steps average over a shorter past."""

    def update(average: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        n = float(num_averaged)
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update)
