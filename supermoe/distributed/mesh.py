"""Who takes part: the ranks that torchrun started, as a mesh of (data, expert), what they agree on, who is missing.

`start` is entered once per command. Without torchrun it gives a world of one rank, in which everything below is
trivial: no code asks whether it is distributed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from supermoe.config import DistributedConfig
from supermoe.distributed.store import fresh
from supermoe.typed_yaml import UserError

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # for what one rank does while the others wait, such as preparing a store
ROLL_CALL = 5.0  # seconds in which ranks that failed must answer; who does not is the one that hangs


@dataclass(frozen=True)
class World:
    """This rank among all of a run."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # of the dimensions `data` and `expert`; None without torchrun
    control: Any = None  # a process group of its own for what takes long
    store: Any = None  # a key-value store that outlives a broken process group
    hosts: tuple[str, ...] = ("localhost",)  # of the ranks
    timeout: float = 0.0  # seconds that a collective may take

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes what there is one of."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def first(self, work: Callable[[], T]) -> T | None:
        """Do something on the first rank while the others wait -> its result, on the others None.

        Where it fails all ranks end: the first with its error, the others with exit code 2 and without a word.
        """
        if self.mesh is None:
            return work()
        failed, result = [True], None
        try:
            if self.is_first:
                result = work()
            failed = [False]
        finally:
            dist.broadcast_object_list(failed, 0, group=self.control)
            if failed[0] and not self.is_first:
                raise SystemExit(2)
        return result

    def new_group(self) -> Any:
        """Another process group of all ranks, between CPUs, with the timeout of collectives; None without torchrun."""
        if self.mesh is None:
            return None
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on all ranks; anything that can be pickled."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def max(self, *values: float) -> list[float]:
        """The largest of each number over the ranks."""
        if self.mesh is None:
            return list(values)
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    @contextmanager
    def watch(self, doing: Callable[[], str]) -> Iterator[None]:
        """Around collectives: where one fails or runs into the timeout, find out and tell which ranks are missing.

        `doing` says at what, such as 'step 12'. A rank that hangs elsewhere never comes here; all others fail, and
        answer.
        """
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            if self.mesh is None or isinstance(error, UserError) or not _is_of_a_collective(error):
                raise
            missing = self._missing()
            who = f"rank {', '.join(missing)} did not answer" if missing else "every rank answers again"
            raise UserError(
                f"{doing()}: a collective of rank {self.rank} failed or took more than {self.timeout:.0f} s "
                f"(distributed.timeout), and {who}. It hangs, was killed, or its machine is gone: look at its log; the "
                f"same command continues from the last checkpoint"
            ) from error

    def _missing(self) -> list[str]:
        """Ranks, with their hosts, that do not report a failure soon after this one did."""
        waiting, until = set(range(self.size)) - {self.rank}, time.monotonic() + ROLL_CALL
        try:
            self.store.set(f"failed/{self.rank}", "")
            while waiting and time.monotonic() < until:
                waiting -= {rank for rank in waiting if self.store.check([f"failed/{rank}"])}
                time.sleep(0.1)
        except dist.DistError:  # the store is gone, and with it the process that kept it
            waiting = {0}
        return [f"{rank} on {self.hosts[rank]}" for rank in sorted(waiting)]


def launched() -> tuple[int, int]:
    """Rank and number of ranks as torchrun tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def start(config: DistributedConfig) -> Iterator[World]:
    """Join the other ranks that torchrun started, as a mesh in which `config.expert` neighbours share the experts.

    Collectives run on gloo between CPUs and on NCCL between GPUs.

    Raises:
        UserError: where the number of ranks is not a multiple of `distributed.expert`, or ranks do not come.
    """
    if "RANK" not in os.environ:
        _check_multiple(1, config.expert)
        yield World()
        return
    _check_multiple(launched()[1], config.expert)
    store, rank, size = next(rendezvous("env://"))
    store.set_timeout(PATIENCE)
    timeout = timedelta(seconds=config.timeout)
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store = fresh(dist.PrefixStore("supermoe", store), rank, size, config.timeout)
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        shape = (size // config.expert, config.expert)
        mesh = init_device_mesh("cuda" if on_gpus else "cpu", shape, mesh_dim_names=("data", "expert"))
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        world = World(rank, size, mesh, control, store, timeout=config.timeout)
        yield replace(world, hosts=tuple(world.gather(socket.gethostname())))
    finally:
        dist.destroy_process_group()


def _check_multiple(size: int, expert: int) -> None:
    if size % expert:
        raise UserError(
            f"distributed.expert: {expert} ranks share the experts, but there are {size} ranks: start a multiple of "
            f"{expert}, torchrun --nproc-per-node {expert} -m supermoe.train ..., or set distributed.expert=1"
        )


def _is_of_a_collective(error: BaseException) -> bool:
    """gloo raises plain RuntimeErrors."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("timed out", "connection", "gloo", "nccl", "peer")
    )
