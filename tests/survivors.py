"""A training of two ranks that something happens to."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import parallel_checks
import torch
import torch.distributed as dist

from supermoe.config import DistributedConfig
from supermoe.distributed import mesh
from supermoe.training import checkpoint

EPOCHS = 4  # eight steps


def train(folder: Path, harm: Callable[[], None] | None = None) -> None:
    """From the last checkpoint to the end, saving after every step; the outcome is a file.

    `harm` comes to the second rank in the middle of the second save.
    """
    parallel_checks.prepare()
    options = {"epochs": EPOCHS, "every": 1, "expert": 2}
    with mesh.start(DistributedConfig(expert=2)) as world, during_second_save(harm if world.rank == 1 else impatience):
        with patch.object(mesh, "ROLL_CALL", 1.0):
            trainer = parallel_checks.build(folder / "run", world, **options)
            trainer.resume()
            trainer.fit()
        found = parallel_checks.outcome(trainer)
        if world.is_first:
            torch.save(found, folder / "outcome")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def full_disk() -> None:
    """No file of this process may grow over so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def impatience() -> None:
    """From here on collectives may take three seconds only, so that a test need not wait for long."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), group)


def during_second_save(harm: Callable[[], None] | None) -> contextlib.AbstractContextManager[Any]:
    write, calls = checkpoint.dcp.save, itertools.count(1)

    def save(*args: Any, **options: Any) -> Any:
        if next(calls) == 2 and harm is not None:
            harm()
        return write(*args, **options)

    return patch.object(checkpoint.dcp, "save", save)
