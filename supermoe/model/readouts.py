"""Read-outs: from the answers to the questions to what each task's head reads.

Add one by a class with its own `Config`, `__init__(config, dim, tasks)`, `questions`, `width` and
`forward(user_BD, own_BD) -> task_BX`; name it in `REGISTRY`, or in the config by its import path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from supermoe import typed_yaml
from supermoe.model.named import ByName


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


class MMoEReadout(nn.Module):
    """No task asks; each mixes E shared experts of the user's answer by a gate of its own (MMoE, KDD 2018, eqs. 5-6).

    f^k(x) = sum_i softmax(W_k x)_i f_i(x), f_i(x) = relu(V_i x + b_i): task_BX = f^k(user_BD), X = `hidden`.
    """

    class Config(typed_yaml.Config):
        """`{type: mmoe, experts: 8}`."""

        type: str = "mmoe"
        experts: int = Field(8, ge=1)
        hidden: int | None = Field(None, ge=1)  # width of an expert's answer; default: model.dim

    def __init__(self, config: Config, dim: int, tasks: list[str]):
        super().__init__()
        self.questions: list[str] = []
        self.width = config.hidden or dim
        self.experts = ExpertBank(dim, self.width, config.experts)
        self.gates = ByName({task: nn.Linear(dim, config.experts, bias=False) for task in tasks})

    def forward(self, user_BD: Tensor, own_BD: dict[str, Tensor]) -> dict[str, Tensor]:
        """The answer to `user` -> the mixture of every task."""
        expert_BEX = self.experts(user_BD)
        return {task: mix(gate(user_BD), expert_BEX) for task, gate in self.gates.items()}


class PLEReadout(nn.Module):
    """No task asks; `levels` of shared experts and of each task's own, by gates over both (PLE, RecSys 2020, eqs. 1-7).

    Level j: task k mixes its own and the shared experts by softmax(W_kj g^k_j-1); below the last level the shared
    answer mixes the experts of all by softmax(W_sj g^s_j-1). g_0 is the user's answer; task_BX = g^k of the last level.
    """

    class Config(typed_yaml.Config):
        """`{type: ple, levels: 2}`; one level is CGC."""

        type: str = "ple"
        levels: int = Field(2, ge=1)
        shared_experts: int = Field(2, ge=1)
        task_experts: int = Field(2, ge=1)  # of each task
        hidden: int | None = Field(None, ge=1)  # width of an expert's answer; default: model.dim

    def __init__(self, config: Config, dim: int, tasks: list[str]):
        super().__init__()
        self.questions: list[str] = []
        self.width = config.hidden or dim
        self.levels = nn.ModuleList(
            _Level(dim if level == 0 else self.width, self.width, tasks, config, last=level == config.levels - 1)
            for level in range(config.levels)
        )
        self.tasks = tasks

    def forward(self, user_BD: Tensor, own_BD: dict[str, Tensor]) -> dict[str, Tensor]:
        """The answer to `user` -> the last level's answer of every task."""
        shared_BX, task_BX = user_BD, dict.fromkeys(self.tasks, user_BD)
        for level in self.levels:
            shared_BX, task_BX = level(shared_BX, task_BX)
        return task_BX


class _Level(nn.Module):
    """One level of PLE: from the shared answer and the tasks' to the next; the last level needs no shared one."""

    def __init__(self, dim: int, width: int, tasks: list[str], config: PLEReadout.Config, last: bool):
        super().__init__()
        num_shared, num_own = config.shared_experts, config.task_experts
        self.shared = ExpertBank(dim, width, num_shared)
        self.own = ByName({task: ExpertBank(dim, width, num_own) for task in tasks})
        self.gates = ByName({task: nn.Linear(dim, num_own + num_shared, bias=False) for task in tasks})
        num_all = num_shared + num_own * len(tasks)
        self.shared_gate = None if last else nn.Linear(dim, num_all, bias=False)

    def forward(self, shared_BD: Tensor, task_BD: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        shared_BEX = self.shared(shared_BD)
        own_BEX = {task: self.own[task](x_BD) for task, x_BD in task_BD.items()}
        task_BX = {
            task: mix(self.gates[task](task_BD[task]), torch.cat([x_BEX, shared_BEX], dim=1))
            for task, x_BEX in own_BEX.items()
        }
        if self.shared_gate is None:
            return shared_BD, task_BX
        return mix(self.shared_gate(shared_BD), torch.cat([*own_BEX.values(), shared_BEX], dim=1)), task_BX


class ExpertBank(nn.Module):
    """E small networks of one layer, all read: expert_BEX = relu(V_e x + b_e)."""

    def __init__(self, dim: int, width: int, experts: int):
        super().__init__()
        self.shape = (experts, width)
        self.linear = nn.Linear(dim, experts * width)

    def forward(self, x_BD: Tensor) -> Tensor:
        """x_BD -> expert_BEX."""
        return F.relu(self.linear(x_BD)).unflatten(1, self.shape)


def mix(gate_BE: Tensor, expert_BEX: Tensor) -> Tensor:
    """sum_e softmax(gate)_e expert_e -> [B, X]."""
    return (gate_BE.softmax(dim=1)[:, :, None] * expert_BEX).sum(dim=1)


REGISTRY = {
    "indicator": IndicatorReadout,
    "shared_bottom": SharedBottomReadout,
    "mmoe": MMoEReadout,
    "ple": PLEReadout,
}
