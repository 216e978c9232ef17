"""What happens to ranks, and that the run then goes on from its last checkpoint to where it would have ended."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import parallel_checks
import pytest
import ranks
import survivors
import torch


def happen(harm: str, folder: Path) -> tuple[str, int]:
    """Continue the run until that happens -> what its other rank says at the end, and the last checkpoint's step."""
    processes = ranks.spawn(2, partial(survivors.train, harm=getattr(survivors, harm)), folder)
    processes[0].join(ranks.TIMEOUT)
    processes[1].kill()  # who hangs does not end by itself
    ranks.finish(processes, folder)
    saved = max(path.name for path in (folder / "run" / "checkpoints").glob("step_*"))
    return (folder / "failed_0").read_text(), int(saved.removeprefix("step_"))


@pytest.mark.slow
@pytest.mark.timeout(900)  # five starts of two processes, and what waits for the dead
def test_a_run_survives_what_happens_to_a_rank(tmp_path: Path) -> None:
    """A rank is killed, hangs, has a full disk, each in the middle of a save, and is told to end."""
    told, saved = happen("kill", tmp_path)
    assert "rank 1 on " in told
    assert "did not answer" in told
    assert saved == 1
    told, saved = happen("hang", tmp_path)
    assert "rank 1 on " in told
    assert "did not answer" in told
    assert saved == 2
    told, saved = happen("full_disk", tmp_path)
    assert "step_00000004: File too large (rank 1); free space" in told
    assert "earlier checkpoints are untouched" in told
    assert saved == 3
    told, saved = happen("terminate", tmp_path)
    assert f"terminated after step {saved}, which is saved" in told
    assert saved >= 5
    for path in tmp_path.glob("failed_*"):
        path.unlink()
    ranks.launch(2, survivors.train, tmp_path)
    trainer = parallel_checks.build(tmp_path / "alone", epochs=survivors.EPOCHS)
    trainer.fit()
    found, expected = torch.load(tmp_path / "outcome"), parallel_checks.outcome(trainer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # sums over ranks come in another order
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9)
