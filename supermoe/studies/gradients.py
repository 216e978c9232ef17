"""Do tasks pull the user's vector in one direction or apart? Cosines of their gradients there."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from supermoe.training.build import Run, batches

NUM_BATCHES = 8


def gradient_cosines(run: Run) -> dict[str, Any]:
    """Cosines between the tasks' gradients at the user vectors, at the best weights, without dropout.

    A task's gradient is that of its mean loss over a training batch, for all vectors of the batch side by side [B * D];
    the cosines are means over `NUM_BATCHES` batches. Tasks that read events have none there and are left out.

    Returns:
        `tasks`, and `cosine`: a list of rows in their order (None where two tasks never met in a batch).
    """
    names, model = (
        [name for name, task in run.tasks.items() if task.head_spec().reads_examples],
        run.trainer.load_best(),
    )
    device = next(model.parameters()).device
    total_TT, met_TT = torch.zeros(len(names), len(names)), torch.zeros(len(names), len(names))
    for batch in islice(batches(run.config, run.store, "train").epoch(0), NUM_BATCHES):
        batch = batch.to(device)
        output = model(batch)
        grads = [_gradient(run.tasks[name], model.heads[name], output, batch) for name in names]
        unit_TX = torch.stack([grad / grad.norm().clamp(min=1e-30) for grad in grads]).cpu()
        present_T = unit_TX.any(dim=1).float()
        total_TT += unit_TX @ unit_TX.t()
        met_TT += present_T[:, None] * present_T
    cosine_TT = (total_TT / met_TT.clamp(min=1)).tolist()
    rows = [
        [value if met else None for value, met in zip(*pair, strict=True)]
        for pair in zip(cosine_TT, met_TT, strict=True)
    ]
    return {"tasks": names, "cosine": rows}


def _gradient(task: Any, head: Any, output: Any, batch: Any) -> Tensor:
    """d loss / d user_BD, flat; zeros where the task asks nothing in the batch or does not read the vector."""
    loss, _ = task.loss(head, output, batch)
    if not loss.requires_grad:
        return torch.zeros_like(output.user_BD).flatten()
    (grad,) = torch.autograd.grad(loss, output.user_BD, retain_graph=True, allow_unused=True)
    return torch.zeros_like(output.user_BD).flatten() if grad is None else grad.flatten()
