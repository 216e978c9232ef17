"""Trainings on meshes of two and four processes against the same training in one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import parallel_checks
import pytest
import ranks
import torch
from pydantic import ValidationError

from supermoe.config import DistributedConfig
from supermoe.training.metrics import read_metrics

# Sums over ranks come in another order; in bf16 a token's experts on two ranks are added up after rounding.
TOLERANCE = {"plain": 1e-12, "limited": 1e-12, "crowded": 1e-12, "bf16": 2e-2}
TRAININGS = [
    *(f"data2_{strategy}_plain" for strategy in ("ddp", "fsdp2", "fairscale")),
    *(f"expert2_ddp_{mixture}" for mixture in ("limited", "crowded", "bf16")),
    "expert2_fsdp2_plain",
    "data2expert2_ddp_plain",
    "expert4_ddp_limited",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outcomes of all trainings, by mesh, strategy and mixture."""
    folder = tmp_path_factory.mktemp("trainings")
    for mixture in parallel_checks.MIXTURES:
        trainer = parallel_checks.build(folder / mixture, mixture=mixture)
        parallel_checks.finish(trainer, folder / f"alone_{mixture}")
    for work, size in ((parallel_checks.in_two_ranks, 2), (parallel_checks.in_four_ranks, 4)):
        ranks.launch(size, work, folder)
    return folder


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.timeout(600)  # the fixture starts six processes
@pytest.mark.parametrize("training", TRAININGS)
def test_many_ranks_train_as_one(folder: Path, training: str) -> None:
    """Weights, average, moments of AdamW (so every clipped gradient), losses, norms, metrics, best weights."""
    mixture = training.split("_")[-1]
    alone, found = torch.load(folder / f"alone_{mixture}"), torch.load(folder / training)
    assert_same(found["outcome"], alone["outcome"], TOLERANCE[mixture])
    assert_same(found["best"], alone["best"], TOLERANCE[mixture])
    assert len(alone["rows"]) == parallel_checks.STEPS + 2  # and an evaluation per epoch
    for row, expected in zip(found["rows"], alone["rows"], strict=True):
        assert row["step"] == expected["step"]
        for key in ("loss", "gradient_norm", "weight", "metrics", "selection"):
            if mixture != "bf16" or key in ("loss", "gradient_norm"):
                compare(row.get(key), expected.get(key), TOLERANCE[mixture])


def compare(found: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            compare(found[key], expected[key], tolerance)
    else:
        assert found == (expected if expected is None else pytest.approx(expected, rel=tolerance, abs=tolerance))


def test_a_run_that_moves_from_mesh_to_mesh_ends_where_it_would_have(folder: Path) -> None:
    """Step 1 on (1, 2), step 2 on (2, 2) with FSDP2, step 3 on (1, 4), the rest in one process."""
    trainer = parallel_checks.build(folder / "moved")
    trainer.resume()
    assert trainer.step == 3
    trainer.fit()
    alone = torch.load(folder / "alone_plain")
    assert_same(parallel_checks.outcome(trainer), alone["outcome"], TOLERANCE["plain"])


@pytest.mark.parametrize("strategy", ["fairscale_sdp", "fairscale_fsdp"])
def test_what_trains_wrongly_is_refused_with_the_reason(strategy: str) -> None:
    with pytest.raises(ValidationError, match=r"fairscale 0\.4\.13's .*; use fsdp2"):
        DistributedConfig(strategy=strategy)


@pytest.mark.slow  # three trainings of fifty steps
@pytest.mark.timeout(3600)
def test_losses_agree_over_fifty_steps(tmp_path: Path) -> None:
    """On (1, 2) and (2, 2) as on one device, up to how fast errors of rounding grow."""
    expected = read_metrics(parallel_checks.train_long(tmp_path / "alone").folder)
    assert len(expected) == 50
    for size in (2, 4):
        ranks.launch(size, partial(parallel_checks.many_steps, expert=2), tmp_path)
        found = read_metrics(tmp_path / f"{size}ranks")
        for row, other in zip(found, expected, strict=True):
            compare(row["loss"], other["loss"], 1e-9)
            compare(row["gradient_norm"], other["gradient_norm"], 1e-9)
