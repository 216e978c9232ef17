"""How evenly the MoE layers use their experts, and for what: counted over an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from supermoe.data.batch import Batch

Counts = dict[tuple[int, str], Tensor]  # (layer, question or event type) -> tokens per expert

EVENT = "event"  # the field that holds the type of an event, where there are several


class RouterHealth:
    """Tokens per expert: of each layer, of each question in the indicator pass, of each event type in the history pass.

    `event_names` are the names of the ids of the field `event`; empty where there is no such field.
    """

    def __init__(self, event_names: list[str]):
        self.event_names = event_names
        self.counts: Counts = {}

    def add(self, output: Any, batch: Batch) -> None:
        """Count one batch."""
        for entry in output.routings:
            num_experts = len(entry.routing.counts_E)
            if entry.tokens == "indicator":
                groups = torch.arange(len(output.questions), device=batch.read_B.device).repeat_interleave(
                    batch.num_examples
                )
                names = [f"task {name}" for name in output.questions]
            elif self.event_names:
                groups, names = batch.fields[EVENT], [f"event {name}" for name in self.event_names]
            else:
                groups, names = torch.zeros_like(batch.time_N), ["events"]
            self._count(entry.layer, names, groups, entry.routing.expert_NK, num_experts)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Health by layer.

        `load` (share per expert), `entropy` (1 is even), `max_over_mean`, `dead` (experts without a token), and `by`,
        the load of every question and event type that occurred.
        """
        found: dict[str, dict[str, Any]] = {}
        for layer in sorted({layer for layer, _ in self.counts}):
            groups = {
                name: counts.numpy() for (at, name), counts in self.counts.items() if at == layer and counts.sum() > 0
            }
            if not groups:
                continue
            total_E = np.sum(list(groups.values()), axis=0)
            load_E = total_E / total_E.sum()
            used = load_E[load_E > 0]
            found[f"layer {layer}"] = {
                "load": load_E.tolist(),
                "entropy": float(-(used * np.log(used)).sum() / np.log(len(load_E))) if len(load_E) > 1 else 1.0,
                "max_over_mean": float(load_E.max() * len(load_E)),
                "dead": int((total_E == 0).sum()),
                "by": {name: (counts / counts.sum()).tolist() for name, counts in groups.items()},
            }
        return found

    def _count(self, layer: int, names: list[str], group_N: Tensor, expert_NK: Tensor, num_experts: int) -> None:
        cell_NK = group_N[:, None] * num_experts + expert_NK
        counts = (
            torch.bincount(cell_NK[expert_NK >= 0], minlength=len(names) * num_experts)
            .view(len(names), num_experts)
            .cpu()
        )
        for name, counts_E in zip(names, counts, strict=True):
            key = (layer, name)
            self.counts[key] = self.counts[key] + counts_E if key in self.counts else counts_E
