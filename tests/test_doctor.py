from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_artifact import make_config, make_model, save

from supermoe import doctor
from supermoe.typed_yaml import UserError


def test_it_says_what_is_there_and_what_is_missing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor.version
    monkeypatch.setattr(doctor, "version", lambda package: None if package == "matplotlib" else found(package))
    doctor.main([])
    printed = capsys.readouterr().out
    assert f"torch {found('torch')}" in printed
    assert "reference" in printed
    assert "matplotlib: not installed (pip install 'supermoe[report]'), would enable plots" in printed
    assert f"fairscale: {found('fairscale')}, enables a second layer of experts" in printed


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "MALLOC_MMAP_MAX_=0"),
        ({"MALLOC_MMAP_MAX_": "0"}, "are reused"),
        ({"LD_PRELOAD": "libjemalloc.so.2"}, "libjemalloc"),
    ],
)
def test_the_allocator_hint(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "MALLOC_MMAP_MAX_"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert said in doctor.allocator()


def test_a_model_that_computes_the_same_and_one_that_does_not(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = make_config()
    identity = save(tmp_path / "model", make_model(config), config)
    doctor.main([str(tmp_path / "model")])
    assert f"model {identity}: loads; probe embeddings differ from those saved by 0.0e+00" in capsys.readouterr().out
    path = tmp_path / "model" / "parity.json"
    parity = json.loads(path.read_text())
    parity["embeddings"][0][0] += 1.0
    path.write_text(json.dumps(parity))
    with pytest.raises(UserError, match="probe embeddings differ"):
        doctor.main([str(tmp_path / "model")])
