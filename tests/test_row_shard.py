"""Rows dealt out to ranks as DTensor deals them, and what tells an optimiser's state apart."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from supermoe.distributed.row_shard import RowShard, save_state_whole, sharded_parameter, sharded_parameters


def shards(num_rows: int, ranks: int) -> list[RowShard]:
    """The shards of all ranks of a mesh that needs no processes."""
    meshes: list[Any] = [
        SimpleNamespace(size=lambda: ranks, get_local_rank=lambda rank=rank: rank) for rank in range(ranks)
    ]
    return [RowShard(mesh, num_rows) for mesh in meshes]


@pytest.mark.parametrize(("num_rows", "ranks"), [(9, 3), (8, 3), (7, 4), (2, 3), (5, 1)])
def test_blocks_are_those_of_chunk(num_rows: int, ranks: int) -> None:
    rows = torch.arange(num_rows)
    expected = [part.tolist() for part in rows.chunk(ranks)]
    expected += [[]] * (ranks - len(expected))  # ranks beyond the last row have none
    assert [shard.as_local(rows).tolist() for shard in shards(num_rows, ranks)] == expected
    assert [shard.last - shard.first for shard in shards(num_rows, ranks)] == [len(part) for part in expected]


def test_a_copy_lies_where_the_original_does() -> None:
    shard = shards(4, 2)[1]
    assert copy.deepcopy({"shard": shard})["shard"] is shard


class Doubled:
    """Stands for a shard: what is saved is twice what is kept."""

    def as_global(self, value: torch.Tensor) -> torch.Tensor:
        return 2 * value

    def as_local(self, value: torch.Tensor) -> torch.Tensor:
        return value / 2


def test_state_of_sharded_rows_is_saved_whole_under_numbers_and_names() -> None:
    model = nn.Linear(2, 3)
    shard: Any = Doubled()
    model.weight = sharded_parameter(torch.ones(3, 2), shard)
    assert list(sharded_parameters(model)) == ["weight"]
    optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=1.0)
    save_state_whole(optimizer)
    state = optimizer.state_dict()
    assert [state["state"][n]["sum"].unique().tolist() for n in (0, 1)] == [[2.0], [1.0]]
    names = ["weight", "bias"]  # DCP loads by name
    named = {
        "state": dict(zip(names, state["state"].values(), strict=True)),
        "param_groups": [{**state["param_groups"][0], "params": names}],
    }
    for saved in (state, named):
        optimizer.load_state_dict(saved)
        assert optimizer.state[model.weight]["sum"].unique().tolist() == [1.0]
        assert optimizer.state[model.bias]["sum"].unique().tolist() == [1.0]
