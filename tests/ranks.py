"""Processes as torchrun starts them, on gloo: what multi-process tests run in. Import nothing heavy here."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

TIMEOUT = 200  # seconds; a busy machine takes minutes to import torch in so many processes


def spawn(size: int, work: Callable[[Path], None], folder: Path) -> list[BaseProcess]:
    """Start `work(folder)` in `size` ranks."""
    context = multiprocessing.get_context("forkserver")  # a clean process that has imported everything is forked
    context.set_forkserver_preload(["parallel_checks", "torch._dynamo", "fairscale.optim.oss"])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # Python 3.11 tells the server of no other
        forkserver.ensure_running()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=_rank, args=(rank, size, port, work, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes  # type: ignore[return-value]


def finish(processes: list[BaseProcess], folder: Path) -> list[str]:
    """Wait for ranks to end -> the tracebacks of those that failed."""
    until = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not stuck, f"ranks {stuck} hang"
    return [path.read_text() for path in sorted(folder.glob("failed_*"))]


def launch(size: int, work: Callable[[Path], None], folder: Path) -> None:
    """Call `work(folder)` in `size` ranks at once; the first failure is raised here with its traceback."""
    failures = finish(spawn(size, work, folder), folder)
    assert not failures, failures[0]


def _rank(rank: int, size: int, port: int, work: Callable[[Path], None], folder: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        work(folder)
    except BaseException:
        (folder / f"failed_{rank}").write_text(traceback.format_exc())
        raise
