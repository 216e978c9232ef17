"""Parallelism applied from outside, in one order: experts, then the dense weights. The model does not know of it.

Sharded rows (experts, tables) are left out of the dense strategy: ranks hold different ones. Gradients come out
averaged over all ranks everywhere, as the objective expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from supermoe.config import DistributedConfig
from supermoe.distributed.expert_parallel import ExpertParallelMoE, shard_experts
from supermoe.distributed.mesh import World
from supermoe.distributed.row_shard import sharded_parameters
from supermoe.distributed.table_parallel import shard_tables
from supermoe.typed_yaml import UserError


class Parallel:
    """How a model and its training step are spread over the ranks of a world; without one, not at all."""

    def __init__(self, world: World | None = None, config: DistributedConfig | None = None):
        self.world, self.config = world or World(), config or DistributedConfig()
        self._sharded: list[FSDPModule] = []  # modules whose dense weights are sharded between steps
        self._step: nn.Module | None = None

    @property
    def deferred_rows(self) -> int | None:
        """Tables of this many rows and more are not made by the model but by `shard_tables`; None: there are none."""
        return None if self.world.mesh is None else self.config.shard_tables

    def shard_tables(self, model: nn.Module) -> None:
        """Draw this rank's rows of the tables that were deferred; call it before anything else sees the model."""
        if self.deferred_rows is not None:
            mesh = DeviceMesh(self.world.device.type, list(range(self.world.size)), mesh_dim_names=("rows",))
            shard_tables(model, mesh, self.deferred_rows)

    def shard(self, model: nn.Module) -> None:
        """Start all ranks at the weights of the first and shard the experts, in place; call it first of all."""
        mesh = self.world.mesh
        if mesh is None:
            return
        for value in model.state_dict().values():
            if not isinstance(value, DTensor):
                dist.broadcast(value, 0)
        if mesh["expert"].size() > 1:
            shard_experts(model, mesh["expert"])

    def wrap(self, step: nn.Module, average: nn.Module | None) -> nn.Module:
        """Put the strategy for dense weights around a training step, from weights to loss -> what to call instead.

        `average`, which may be None, has its weights sharded alike. Build the optimisers after this.
        """
        self._step = step
        if self.world.mesh is None:
            return step
        if self.config.strategy == "fsdp2":
            mesh = DeviceMesh(self.world.device.type, list(range(self.world.size)), mesh_dim_names=("all",))
            for module in (step, average):
                if module is not None:
                    self._fully_shard(module, mesh)
            return step
        # buffers are alike on all ranks already
        ignored = [*sharded_parameters(step), *(name for name, _ in step.named_buffers())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, ignored)
        self._step = DistributedDataParallel(step)
        return self._step

    def _fully_shard(self, module: Any, mesh: DeviceMesh) -> None:
        # One group for all: a block hands its keys and values on in an object, where FSDP2 does not see that gradients
        # come back, and would not gather the block's weights again in time.
        told = {name: dict(param.__dict__) for name, param in module.named_parameters()}
        fully_shard(module, mesh=mesh, ignored_params=set(sharded_parameters(module).values()))
        for name, param in module.named_parameters():
            param.__dict__.update(told[name])  # that it is a table, which its shards would not say
        self._sharded.append(module)

    def optimizer(self, cls: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
        """What to build an optimiser of dense weights with: the class itself, or fairscale's OSS around it."""
        if self.world.mesh is None or self.config.strategy != "fairscale":
            return cls
        try:
            from fairscale.optim.oss import OSS
        except ImportError:
            raise UserError(
                "distributed.strategy: fairscale needs the extra, pip install 'supermoe[fairscale]'; or use ddp, fsdp2"
            ) from None
        return lambda groups, **defaults: OSS(groups, optim=cls, **defaults)

    @contextmanager
    def backward(self, is_last: bool) -> Iterator[None]:
        """Around the passes of one micro-batch: gradients are averaged over the ranks in a step's last one only."""
        if isinstance(self._step, FSDPModule):
            self._step.set_requires_gradient_sync(is_last)
        waits = isinstance(self._step, DistributedDataParallel) and not is_last
        with self._step.no_sync() if waits else nullcontext():  # type: ignore[union-attr,operator]  # it is DDP
            yield

    def reduce_experts(self, model: nn.Module) -> None:
        """Average the gradients of experts: each is the sum over the tokens of its mesh's ranks so far."""
        layers = [module for module in model.modules() if isinstance(module, ExpertParallelMoE)]
        works = []
        for param in [param for layer in layers for param in layer.experts.parameters()]:
            assert param.grad is not None
            assert self.world.mesh is not None
            param.grad /= self.world.size
            works.append(dist.all_reduce(param.grad, group=self.world.mesh["data"].get_group(), async_op=True))
        for work in works:
            work.wait()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, weights that are sharded between steps are whole, so that modules can be called as they are."""
        for module in self._sharded:
            module.unshard()
        try:
            yield
        finally:
            for module in self._sharded:
                module.reshard()
