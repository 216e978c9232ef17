"""The key-value store through which ranks find each other, as no earlier start of theirs has written to it.

torchrun starts all ranks anew when one dies, and hands them the store of before: addresses that nobody listens at any
more, and messages of the dead.
"""

from __future__ import annotations

import time
import uuid

import torch.distributed as dist

from supermoe.typed_yaml import UserError


def fresh(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """The part of a store that belongs to this start: the first rank draws its name and tells all others.

    Each of them asks with a name of its own, which an earlier start cannot have answered; torchrun's count of restarts
    would not do, as it differs between machines.

    Raises:
        UserError: naming the ranks that have not come within `timeout` seconds.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        _tell(store, name, set(range(1, size)), timeout)
    else:
        name = _ask(store, name, rank, timeout)
    return dist.PrefixStore(name, store)


def _ask(store: dist.Store, question: str, rank: int, timeout: float) -> str:
    store.set(f"asking/{rank}", question)
    until = time.monotonic() + timeout
    while not store.check([f"told/{question}"]):
        _wait(until, "0", timeout)
    name = store.get(f"told/{question}").decode()
    store.set(f"{name}/heard/{rank}", "")
    return name


def _tell(store: dist.Store, name: str, waiting: set[int], timeout: float) -> None:
    until = time.monotonic() + timeout
    while waiting := {rank for rank in waiting if not store.check([f"{name}/heard/{rank}"])}:
        for rank in waiting:
            if store.check([f"asking/{rank}"]):
                store.set(f"told/{store.get(f'asking/{rank}').decode()}", name)
        _wait(until, ", ".join(map(str, sorted(waiting))), timeout)


def _wait(until: float, missing: str, timeout: float) -> None:
    if time.monotonic() > until:
        raise UserError(
            f"rank {missing} did not start within {timeout:.0f} s (distributed.timeout) of this one: look at its log, "
            f"or raise the timeout"
        )
    time.sleep(0.01)
