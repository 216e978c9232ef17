"""Read-outs: from the answers to the questions to what each task's head reads.

Add one by a class with its own `Config`, `__init__(config, dim, tasks)`, `questions`, `width` and
`forward(user_BD, own_BD) -> task_BX`; name it in `REGISTRY`, or in the config by its import path.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from supermoe import typed_yaml


class IndicatorReadout(nn.Module):
    """Every task asks a question of its own and reads both answers: task_BX = [user_BD, own_BD], X = 2D."""

    class Config(typed_yaml.Config):
        """`{type: indicator}`."""

        type: str = "indicator"

    def __init__(self, config: Config, dim: int, tasks: list[str]):
        super().__init__()
        self.questions, self.width = tasks, 2 * dim

    def forward(self, user_BD: Tensor, own_BD: dict[str, Tensor]) -> dict[str, Tensor]:
        """Answers to `user` and to the tasks' own questions -> task_BX by task."""
        return {task: torch.cat([user_BD, answer_BD], dim=1) for task, answer_BD in own_BD.items()}


class SharedBottomReadout(nn.Module):
    """No task asks; all read the user's answer: task_BX = user_BD, X = D. The comparison without indicators."""

    class Config(typed_yaml.Config):
        """`{type: shared_bottom}`."""

        type: str = "shared_bottom"

    def __init__(self, config: Config, dim: int, tasks: list[str]):
        super().__init__()
        self.tasks, self.width = tasks, dim
        self.questions: list[str] = []

    def forward(self, user_BD: Tensor, own_BD: dict[str, Tensor]) -> dict[str, Tensor]:
        """The answer to `user`, for every task."""
        return dict.fromkeys(self.tasks, user_BD)


REGISTRY = {"indicator": IndicatorReadout, "shared_bottom": SharedBottomReadout}
