"""Rows of a parameter on one of several ranks. Their states as DTensors are tested on processes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from supermoe.distributed.row_shard import RowShard, shard_parameter, sharded_parameters


def make_shard(rank: int, ranks: int = 3, num_rows: int = 7) -> RowShard:
    return RowShard(SimpleNamespace(size=lambda: ranks, get_local_rank=lambda: rank), num_rows)


def test_blocks_are_those_of_torch_chunk() -> None:
    for num_rows in (1, 6, 7, 8):
        shards = [make_shard(rank, 3, num_rows) for rank in range(3)]
        found = [torch.arange(num_rows)[shard.first : shard.last].tolist() for shard in shards]
        chunks = [chunk.tolist() for chunk in torch.arange(num_rows).chunk(3)]
        assert found == chunks + [[]] * (3 - len(chunks))


@pytest.mark.parametrize("rank", range(3))
def test_a_sharded_parameter_is_this_ranks_rows_and_takes_whole_weights(rank: int) -> None:
    layer = torch.nn.Linear(2, 7)
    whole = copy.deepcopy(layer.state_dict())
    shard_parameter(layer, "weight", make_shard(rank))
    mine = slice(*((0, 3), (3, 6), (6, 7))[rank])
    assert torch.equal(layer.weight, whole["weight"][mine])
    assert sharded_parameters(layer).keys() == {"weight"}
    layer.load_state_dict({"weight": whole["weight"] + 1, "bias": whole["bias"]})
    assert torch.equal(layer.weight, whole["weight"][mine] + 1)
