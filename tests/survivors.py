"""A training that ranks are killed in."""

from __future__ import annotations

from pathlib import Path

import parallel_checks
import torch

from supermoe.config import DistributedConfig
from supermoe.distributed.mesh import start

EPOCHS = 4


def train(folder: Path) -> None:
    """From the last checkpoint to the end, saving after every step; the outcome is a file."""
    parallel_checks._prepare()
    with start(DistributedConfig(expert=2)) as world:
        trainer = parallel_checks.build(folder / "run", world, epochs=EPOCHS, every=1, expert=2)
        trainer.resume()
        trainer.fit()
        found = parallel_checks.outcome(trainer)
        if world.is_first:
            torch.save(found, folder / "outcome")
