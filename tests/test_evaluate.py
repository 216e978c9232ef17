from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from supermoe.evaluate import main
from supermoe.typed_yaml import UserError


@pytest.fixture
def copy(trained_run: Path, tmp_path: Path) -> Path:
    """The finished run, moved to another folder."""
    return Path(shutil.copytree(trained_run, tmp_path / "moved"))


def test_a_run_is_measured_again_wherever_it_lies(copy: Path, capsys: pytest.CaptureFixture) -> None:
    report, prediction = copy / "report.json", copy / "predictions" / "test" / "spend.parquet"
    before = json.loads(report.read_text()), prediction.read_bytes()
    report.unlink()
    prediction.unlink()
    main([str(copy)])
    assert (json.loads(report.read_text()), prediction.read_bytes()) == before
    assert "spend" in capsys.readouterr().out


def test_another_split(copy: Path) -> None:
    main([str(copy), "--split", "valid"])
    assert json.loads((copy / "report.json").read_text())["split"] == "valid"
    assert (copy / "predictions" / "valid" / "churn.parquet").exists()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trained weights here; give the `run` folder"):
        main([str(tmp_path)])
