"""The choice of one or two experts by one or two passes for the largest score: a sort finds more than is asked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from supermoe.ops import reference
from supermoe.ops.reference import Routing


def route(logits_NE: Tensor, k: int, score: str = "softmax", bias_E: Tensor | None = None) -> Routing:
    """See `supermoe.ops.route`."""
    passes = logits_NE.device.type == "cpu" and k <= 2 and logits_NE.itemsize >= 4  # numpy has no bfloat16
    return reference.route(logits_NE, k, score, bias_E, _largest if passes else reference.top_k)


def _largest(ranked_NE: Tensor, k: int) -> Tensor:
    """The k <= 2 best of each row, best first; NaN counts as the largest. numpy's argmax is vectorised, torch's not."""
    first_N = ranked_NE.numpy().argmax(axis=1)
    if k == 1:
        return torch.from_numpy(first_N)[:, None]
    others_NE = ranked_NE.numpy().copy()
    others_NE[np.arange(len(first_N)), first_N] = -np.inf
    return torch.from_numpy(np.stack([first_N, others_NE.argmax(axis=1)], axis=1))
