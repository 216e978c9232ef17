"""A model's weights to and from one file while they are spread over ranks: never whole on any of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supermoe.data.disk import publishing
from supermoe.distributed.mesh import World
from supermoe.model.weights import opened_weights, write_weights, writing_order
from supermoe.typed_yaml import UserError


def save_weights(model: nn.Module, path: Path, world: World) -> None:
    """Publish all weights as one file: the first rank writes, the others send it their rows in turn.

    It holds the rows of one rank of one parameter at a time, besides its own. When it returns every rank can read them.
    """
    state = model.state_dict()
    if world.is_first:
        with publishing(path) as beside:
            write_weights(beside, state, _rows)
    else:
        for name in writing_order(state):
            for _ in _rows(state[name]):
                pass
    world.first(lambda: None)  # the others wait until the first has published


def load_weights(model: nn.Module, path: Path, remedy: str) -> None:
    """Fill a model's weights in place; every rank reads its own rows only. `UserError` where the file is damaged."""
    state = model.state_dict()
    with opened_weights(path, remedy) as file, torch.no_grad():
        if set(file.keys()) != set(state):
            raise UserError(f"{path} does not hold the weights of this model; {remedy}")
        for name, tensor in state.items():
            if isinstance(tensor, DTensor):
                first, last = _block(tensor, tensor.device_mesh.get_local_rank())
                tensor.to_local().copy_(file.get_slice(name)[first:last])
            else:
                tensor.copy_(file.get_tensor(name))


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    """On the first rank all rows of a tensor, rank by rank; on the others nothing, but they must ask too."""
    if not isinstance(tensor, DTensor):
        yield tensor
        return
    owners = tensor.device_mesh.mesh.flatten().tolist()
    if 0 not in owners:  # a replica of what others send
        return
    local, rank = tensor.to_local(), dist.get_rank()
    for place, owner in enumerate(owners):
        first, last = _block(tensor, place)
        if first == last:
            continue
        if rank == owner == 0:
            yield local
        elif rank == 0:
            rows = local.new_empty(last - first, *tensor.shape[1:])
            dist.recv(rows, owner)
            yield rows
        elif rank == owner:
            dist.send(local.contiguous(), 0)


def _block(tensor: DTensor, place: int) -> tuple[int, int]:
    """Rows of the rank at a place of a mesh of one dimension, as `Shard(0)` deals them out."""
    num_rows, block = tensor.shape[0], -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(block * place, num_rows), min(block * (place + 1), num_rows)
