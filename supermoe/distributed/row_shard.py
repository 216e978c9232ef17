"""Parameters of which every rank holds other rows: how they say so, and how checkpoints see them whole.

Such a parameter is a plain tensor of this rank's rows with the attribute `shard`. `state_dict()` of its module holds a
DTensor over the same memory, so that DCP writes each row once and loads it at any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class RowShard:
    """The rows `first` to `last` of `num_rows` that lie on this rank of a mesh of one dimension."""

    mesh: DeviceMesh
    num_rows: int

    def __deepcopy__(self, memo: Any) -> RowShard:
        return self  # process groups cannot be copied, and need not be: the average of the weights lies as they do

    @property
    def block(self) -> int:
        """Rows of a rank; the last ones may have fewer or none."""
        return -(-self.num_rows // self.mesh.size())

    @property
    def first(self) -> int:
        """The first row here."""
        return min(self.block * self.mesh.get_local_rank(), self.num_rows)

    @property
    def last(self) -> int:
        """One beyond the last row here."""
        return min(self.first + self.block, self.num_rows)

    def as_global(self, local: Tensor) -> DTensor:
        """The same memory as a part of the whole, which checkpoints save and load at any number of ranks."""
        shape = torch.Size([self.num_rows, *local.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def as_local(self, value: Tensor) -> Tensor:
        """This rank's rows of a DTensor that lies as `as_global` has it, or of a whole tensor."""
        return value.to_local() if isinstance(value, DTensor) else value[self.first : self.last]


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of which each rank holds other rows, by name."""
    return {name: p for name, p in model.named_parameters() if hasattr(p, "shard")}


def sharded_parameter(rows: Tensor, shard: RowShard) -> nn.Parameter:
    """A parameter of this rank's rows."""
    parameter = nn.Parameter(rows)
    parameter.shard = shard  # type: ignore[attr-defined]  # told to whoever sees it
    return parameter


def save_whole(module: nn.Module, name: str, shard: RowShard) -> None:
    """Let a module's state hold its sharded parameter as a DTensor, and load DTensors and whole tensors."""

    def after_saving(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        state[prefix + name] = shard.as_global(state[prefix + name])

    def before_loading(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        if prefix + name in state:
            state[prefix + name] = shard.as_local(state[prefix + name])

    module.register_state_dict_post_hook(after_saving)
    module.register_load_state_dict_pre_hook(before_loading)


def shard_parameter(module: nn.Module, name: str, shard: RowShard) -> None:
    """Keep of a module's parameter only this rank's rows."""
    rows = getattr(module, name).detach()[shard.first : shard.last].clone()
    setattr(module, name, sharded_parameter(rows, shard))
    save_whole(module, name, shard)


def save_state_whole(optimizer: torch.optim.Optimizer) -> None:
    """Let `state_dict()` of an optimiser hold states of sharded rows as DTensors, and `load_state_dict` take them."""
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "state": _map_state(o, state, "as_global")})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {**state, "state": _map_state(o, state, "as_local")})


def _map_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], method: str) -> dict[Any, Any]:
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]  # numbers, or names from DCP
    params = dict(zip(keys, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    found = {}
    for key, state in state_dict["state"].items():
        shard = getattr(params[key], "shard", None)
        change = getattr(shard, method) if shard else (lambda value: value)
        found[key] = {name: change(value) if value.ndim else value for name, value in state.items()}
    return found
