from __future__ import annotations

import json
from pathlib import Path

import torch

from supermoe import __version__
from supermoe.training import environment


def test_versions_and_hardware_are_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    environment.write_environment(tmp_path)
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["supermoe"] == __version__
    assert found["packages"] == {"torch": torch.__version__, "no-such-package": None}
    assert found["threads"] == torch.get_num_threads()
