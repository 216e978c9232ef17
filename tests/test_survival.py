"""Ranks are killed or told to end: the run goes on from its last checkpoint to where it would have ended."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import parallel_checks
import pytest
import ranks
import survivors
import torch


def assert_outcome(folder: Path, epochs: int = survivors.EPOCHS) -> None:
    """The same weights, average and optimiser as one process that nothing disturbed; sums come in another order."""
    trainer = parallel_checks.build(folder / "alone", epochs=epochs)
    trainer.fit()
    found, expected = torch.load(folder / "outcome"), parallel_checks.outcome(trainer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9)


def step(folder: Path) -> int:
    """Steps that metrics.jsonl tells of."""
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def is_saving(folder: Path) -> bool:
    return any((folder / "run" / "checkpoints").glob(".*.writing"))


def wait_for(condition: Callable[[], bool], alive: Callable[[], bool]) -> None:
    while not condition() and alive():
        time.sleep(0.002)


@pytest.mark.slow  # four starts of two processes
@pytest.mark.timeout(600)
def test_a_run_survives_kills_and_sigterm(tmp_path: Path) -> None:
    """Rank 1 is killed after a step, rank 0 during a save; then rank 1 is told to end; then nothing happens."""
    moments = [(1, signal.SIGKILL, lambda: step(tmp_path) >= 2), (0, signal.SIGKILL, lambda: is_saving(tmp_path))]
    moments.append((1, signal.SIGTERM, lambda: step(tmp_path) >= 5))
    for rank, number, moment in moments:
        for left_over in (tmp_path / "run" / "checkpoints").glob(".*.writing"):
            shutil.rmtree(left_over)
        processes = ranks.spawn(2, survivors.train, tmp_path)
        wait_for(moment, processes[rank].is_alive)
        assert processes[rank].is_alive()
        os.kill(processes[rank].pid or 0, number)
        failures = ranks.finish(processes, tmp_path)
        assert processes[rank].exitcode == (-number if number == signal.SIGKILL else 1)
        told = "did not answer" if number == signal.SIGKILL else "which is saved; the same command continues"
        assert any(told in failure for failure in failures)
        for path in tmp_path.glob("failed_*"):
            path.unlink()
    ranks.launch(2, survivors.train, tmp_path)
    assert_outcome(tmp_path)
