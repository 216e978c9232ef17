"""The world of one rank, and who is told of what happens to others; meshes are tested in test_parallelize.py."""

from __future__ import annotations

import pytest
import torch

from supermoe.config import DistributedConfig
from supermoe.distributed.mesh import World, launched, start
from supermoe.typed_yaml import UserError


def test_without_torchrun_there_is_one_rank_and_nothing_to_agree_on() -> None:
    with start(DistributedConfig()) as world:
        assert (world.rank, world.size, world.is_first, world.mesh) == (0, 1, True, None)
        assert launched() == (0, 1)
        assert world.first(lambda: 5) == 5
        assert world.gather("x") == ["x"]
        assert world.max(1.5, True) == [1.5, True]
        assert world.sum(torch.tensor([2.0])).tolist() == [2.0]
        with pytest.raises(RuntimeError, match="timed out"), world.watch(lambda: "step 1"):
            raise RuntimeError("timed out")


def test_ranks_must_be_a_multiple_of_those_that_share_experts() -> None:
    with pytest.raises(UserError, match=r"4 ranks share the experts, but there are 1 .* --nproc-per-node 4"):
        start(DistributedConfig(expert=4)).__enter__()


class Store(dict):
    """What ranks tell each other."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.mark.parametrize(("answering", "missing"), [((0, 1, 3), "rank 2 on b did not answer"), (range(4), "answers")])
def test_who_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, answering, missing: str) -> None:
    monkeypatch.setattr("supermoe.distributed.mesh.ROLL_CALL", 0.2)
    store = Store()
    for rank in answering:
        store.set(f"failed/{rank}", "")
    world = World(1, 4, mesh=object(), store=store, hosts=("a", "a", "b", "b"), timeout=60)
    with (
        pytest.raises(UserError, match=rf"step 7: a collective of rank 1 .* 60 s .*{missing}"),
        world.watch(lambda: "step 7"),
    ):
        raise RuntimeError("Timed out waiting 60000ms for recv operation to complete")
    with pytest.raises(RuntimeError, match="something else"), world.watch(lambda: "step 7"):
        raise RuntimeError("something else")
