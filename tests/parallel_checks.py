"""What ranks do in the tests of `supermoe.distributed`: trainings of one tiny model on several meshes and strategies.

Every training leaves its outcome as a file; the tests compare it with the same training in one process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from factories import make_batch
from fake_run import make_labels, make_objective, make_run_batch, run_schema
from torch import Tensor
from torch.distributed.tensor import DTensor

from supermoe import ops
from supermoe.config import DistributedConfig, ModelConfig, MoEConfig, TrainingConfig
from supermoe.data.batch import Batch, Jagged
from supermoe.distributed.expert_parallel import shard_experts
from supermoe.distributed.mesh import World, start
from supermoe.distributed.parallelize import Parallel
from supermoe.model.moe import MoE
from supermoe.model.supermoe import SuperMoE
from supermoe.training.metrics import read_metrics
from supermoe.training.trainer import Trainer
from supermoe.typed_yaml import UserError

STEPS = 4  # two epochs of a full and a short step
# name -> what is special about the mixture of experts
MIXTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "limited": {"capacity_factor": 0.8, "shared_hidden": 8, "router": {"type": "sigmoid", "balance": "aux"}},
    "crowded": {},  # all tokens on the first two experts, so that all are on one rank and others get none
    "bf16": {},
}


class Shares:
    """Five micro-batches an epoch, dealt out to ranks as `Batches` does; with steps of four ranks run out of them."""

    def __init__(self, world: World, dtype: torch.dtype):
        self.world, self.batches = world, [cast(make_run_batch(i), dtype) for i in range(5)]
        nothing = make_batch((), (), run_schema())
        self.nothing = cast(replace(nothing, labels=make_labels(0)), dtype)

    def __len__(self) -> int:
        return len(self.batches)

    def steps(self, epoch: int, size: int, start: int = 0) -> Iterator[list[Batch]]:
        for first in range(start * size, len(self), size):
            step = self.batches[first : first + size]
            step += [self.nothing] * (-len(step) % self.world.size)
            yield step[self.world.rank :: self.world.size]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for step in self.steps(epoch, self.world.size):
            yield from step


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A batch whose inputs are of another precision; labels stay."""
    move = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    bags = {name: Jagged(bag.offsets, bag.ids, move(bag.weights)) for name, bag in value.bags.items()}
    fields = {name: move(x) for name, x in value.fields.items()}
    return replace(value, fields=fields, bags=bags, features_BP=move(value.features_BP))


def build(
    folder: Path,
    world: World | None = None,
    mixture: str = "plain",
    epochs: int = 2,
    every: int = 100,
    **distributed: Any,
) -> Trainer:
    """A trainer whose weights, order and steps do not depend on the world; it saves `every` so many steps."""
    torch.manual_seed(0)
    objective = make_objective()
    heads = {name: task.head_spec() for name, task in objective.tasks.items()}
    heads |= objective.pretraining["next"].head_specs()
    moe = {"experts": 4, "top_k": 2, "hidden": 16, **MIXTURES[mixture]}
    config = ModelConfig(dim=16, layers=2, heads=2, dropout=0, head_dropout=0, feature_dropout=0, moe=moe)
    model = SuperMoE(run_schema(), config, heads)
    dtype = torch.float32 if mixture == "bf16" else torch.float64
    with torch.no_grad():
        for parameter in model.parameters():  # also what starts at zero passes gradients on
            parameter += 0.1 * torch.randn_like(parameter)
        for router in model.routers() if mixture == "crowded" else []:
            router.bias_E += torch.tensor([9.0, 9.0, 0.0, 0.0])
    world = world or World()
    precision = "bf16" if mixture == "bf16" else "fp32"
    options: dict[str, Any] = {"epochs": epochs, "accumulate": 4, "checkpoint_every": every, "precision": precision}
    training = TrainingConfig(lr=1e-3, clip_norm=0.5, ema=0.9, **options)
    shares = Shares(world, dtype)
    parallel = Parallel(world, DistributedConfig(**distributed))
    return Trainer(model.to(dtype), objective, shares, shares, training, folder=folder, identity={}, parallel=parallel)


def outcome(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, average, optimiser and balancer, all whole."""
    whole: dict[str, Tensor] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                collect(item, f"{name}.{key}")
        else:
            whole[name] = value.full_tensor() if isinstance(value, DTensor) else value.clone()

    collect(trainer._tensors(), "")
    # fairscale's OSS leaves each rank the state of its own weights
    shares = trainer.world.gather({name: value for name, value in whole.items() if name.startswith(".optimizer")})
    return whole | {name: value for share in shares for name, value in share.items()}


def finish(trainer: Trainer, path: Path) -> None:
    """Train to the end and write the outcome to a file."""
    trainer.fit()
    found = outcome(trainer)
    state = trainer.load_best().state_dict()
    best = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    if trainer.world.is_first:
        rows = read_metrics(trainer.folder)
        torch.save({"outcome": found, "best": best, "rows": rows}, path)


def many_steps(folder: Path, expert: int) -> None:
    """Fifty steps on a mesh with so many ranks in a row of experts."""
    prepare()
    with start(DistributedConfig(expert=expert)) as world:
        train_long(folder / f"{world.size}ranks", world, expert=expert)


def train_long(folder: Path, world: World | None = None, **distributed: Any) -> Trainer:
    """Fifty steps that nothing is measured after."""
    trainer = build(folder, world, epochs=25, **distributed)
    trainer.valid = None
    trainer.fit()
    return trainer


def stop_after_a_step(trainer: Trainer) -> None:
    """Resume, do one step, save and end, as SIGTERM asks for; only the last rank was told."""
    trainer.resume()
    trainer._terminated = trainer.world.rank == trainer.world.size - 1
    with pytest.raises(SystemExit, match="which is saved"):
        trainer.fit()


def in_two_ranks(folder: Path) -> None:
    """Meshes (2, 1) and (1, 2), every strategy and mixture; at last the first step of a run that will move."""
    prepare()
    with start(DistributedConfig()) as world:
        for strategy in ("ddp", "fsdp2", "fairscale"):
            finish(build(folder / strategy, world, strategy=strategy), folder / f"data2_{strategy}_plain")
    with _next_port(), start(DistributedConfig(expert=2)) as world:
        for mixture in ("limited", "crowded", "bf16"):
            finish(build(folder / mixture, world, mixture, expert=2), folder / f"expert2_ddp_{mixture}")
        finish(build(folder / "f", world, expert=2, strategy="fsdp2"), folder / "expert2_fsdp2_plain")
        check_dispatch(world)
        stop_after_a_step(build(folder / "moved", world, expert=2))


def in_four_ranks(folder: Path) -> None:
    """Meshes (2, 2) and (1, 4); the run that `in_two_ranks` began moves from one to the other."""
    prepare()
    with start(DistributedConfig(expert=2)) as world:
        finish(build(folder / "a", world, expert=2), folder / "data2expert2_ddp_plain")
        stop_after_a_step(build(folder / "moved", world, expert=2, strategy="fsdp2"))
    with _next_port(), start(DistributedConfig(expert=4)) as world:
        finish(build(folder / "b", world, "limited", expert=4), folder / "expert4_ddp_limited")
        stop_after_a_step(build(folder / "moved", world, expert=4))


def check_dispatch(world: World) -> None:
    """One layer: outputs and all gradients; the second rank has no token, one token is dropped, experts 2 has none."""
    torch.manual_seed(0)
    config = MoEConfig(experts=4, top_k=2, hidden=8, shared_hidden=4)
    whole, parts = MoE(config, 8, "swiglu").double(), MoE(config, 8, "swiglu").double()
    parts.load_state_dict(whole.state_dict())
    shard_experts(parts, world.mesh["expert"])
    assert len(parts.experts.w_in_EDF) == 2
    x_ND = torch.randn(5, 8, dtype=torch.float64)[: 5 if world.is_first else 0]
    expert_NK = torch.tensor([[0, 1], [3, 0], [1, 3], [3, -1], [0, 3]])[: len(x_ND)]
    grads, outputs = [], []
    for layer in (whole, parts):
        x = x_ND.clone().requires_grad_()
        weight_NK = layer.router(x).weight_NK  # has a gradient into the router
        routing = ops.Routing(expert_NK, weight_NK, torch.zeros(4), weight_NK)
        y_ND = layer.mix(x, routing)
        (y_ND * torch.arange(8)).sum().backward()
        outputs.append(y_ND)
        grads.append([x.grad, layer.router.weight.grad, layer.shared.w_in.weight.grad])
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)
    expected = world.gather([p.grad for p in whole.experts.parameters()])[0]  # the first rank has all tokens
    for param, grad in zip(parts.experts.parameters(), expected, strict=True):
        shard = param.shard
        torch.testing.assert_close(param.grad, grad[shard.first : shard.last], atol=1e-12, rtol=1e-12)
    with pytest.raises(UserError, match=r"3 experts .* cannot be dealt out evenly to 2 ranks"):
        shard_experts(MoE(MoEConfig(experts=3), 8, "gelu"), world.mesh["expert"])


def prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of fairscale and torch, about each other


def _next_port() -> AbstractContextManager[None]:
    """The world before this one still holds its port."""
    return patch.dict(os.environ, {"MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1)})
