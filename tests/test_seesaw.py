"""The command: what it asks the study for, what it prints, and how it gates."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from supermoe import seesaw
from supermoe.model.readouts import REGISTRY as READOUTS
from supermoe.objectives.balancers import REGISTRY as BALANCERS
from supermoe.studies.seesaw import Request
from supermoe.typed_yaml import UserError


def method(losers: list[str]) -> dict[str, Any]:
    facts = {"losers": losers, "mean_gain": 0.1, "interval": [0.0, 0.2], "mean_rank": 1.0, "seconds_per_step": 0.1}
    return facts


def result(losers: list[str]) -> dict[str, Any]:
    """Of a study in which the config's own method has these losers, and a rival has another."""
    row = {"gain": 0.1, "interval": [0.0, 0.2], "loses": False}
    return {
        "own": "equal",
        "tasks": {"churn": {"methods": {"equal": row, "ple": row}}},
        "methods": {"equal": method(losers), "ple": method(["types"])},
        "differences": {
            name: {name: {"mean": 0.0, "interval": [0.0, 0.0]} for name in ("equal", "ple")}
            for name in ("equal", "ple")
        },
    }


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the study was asked for; it finds that churn has lost."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(tiny.make_config(Path()).model_dump(mode="json")))
    requests: list[Request] = []
    monkeypatch.setattr(seesaw, "study", lambda request: requests.append(request) or result(["churn"]))
    return requests


def test_the_command_line_is_the_request(asked: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--config",
        "config.yaml",
        "--seeds",
        "5",
        "--methods",
        "equal, ple",
        "--jobs",
        "2",
        "--split",
        "valid",
    ]
    seesaw.main([*arguments, "--variant", "slow: training.lr=1e-4 loss.balancer=equal", "seed=7", "run=there"])
    (request,) = asked
    variants = {"slow": ["training.lr=1e-4", "loss.balancer=equal"]}
    expected = Request(Path("config.yaml"), ["seed=7", "run=there"], 5, ["equal", "ple"], variants, 2)
    assert request == Request(**{**vars(expected), "out": Path("there/seesaw"), "split": "valid"})
    printed = capsys.readouterr().out
    assert "there/seesaw/seesaw.md" in printed
    assert "+0.1000 [+0.0000, +0.2000]" in printed


def test_the_gate_names_who_lost_and_the_exit_code_tells(asked: list[Request]) -> None:
    seesaw.main(["--config", "config.yaml"])
    with pytest.raises(
        SystemExit, match=r"gate: under equal, churn is worse than alone, see run/seesaw/seesaw\.md"
    ) as end:
        seesaw.main(["--config", "config.yaml", "--gate"])
    assert isinstance(end.value.code, str)  # which Python prints to stderr before it exits with 1


def test_the_gate_is_about_the_config_and_not_its_rivals(asked: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seesaw, "study", lambda request: result([]))
    seesaw.main(["--config", "config.yaml", "--gate"])


def test_wrong_arguments(asked: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("broken", "a b: training.lr=1", "empty:"):
        with pytest.raises(UserError, match=f"--variant '{text}' is not of the form 'NAME: key.subkey=value ...'"):
            seesaw.main(["--config", "config.yaml", "--variant", text])
    with pytest.raises(SystemExit):
        seesaw.main(["--config", "config.yaml", "--seeds", "0"])
    assert "expected a whole number from 1 on, got '0'" in capsys.readouterr().err
    assert asked == []


def test_the_page_knows_every_method_and_its_commands_parse(asked: list[Request]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "seesaw.md").read_text()
    told = set(re.findall(r"`(\w+)`", page))
    assert {*BALANCERS, *READOUTS} - told == set()
    commands = re.findall(r"^python -m supermoe\.seesaw (.*)$", page, re.MULTILINE)
    assert commands
    for command in commands:
        config = str(Path(__file__).parents[1] / shlex.split(command)[1])
        seesaw.main(["--config", config, *shlex.split(command)[2:]])
    assert len(asked) == len(commands)
