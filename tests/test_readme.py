"""The README runs: its commands and its Python, on a short training of the log it names; its tables are the rows'."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = "runs/quickstart"
SHORT = ["training.max_steps=2", "training.epochs=1", "model.dim=16", "report.boosting=false", "report.plots=false"]
SHORT += ["features.auto.windows=[28d, all]", "data.splits.train=[2017-10-08]"]


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands(module: str) -> list[list[str]]:
    """Arguments of every `python -m supermoe.<module>` in the README's blocks."""
    return [shlex.split(line) for line in re.findall(rf"python -m supermoe\.{module} (.*)", "\n".join(blocks("")))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job, cut short."""
    folder = tmp_path_factory.mktemp("readme") / "run"
    (arguments,) = commands("train")
    monkey = pytest.MonkeyPatch()
    monkey.chdir(ROOT)
    importlib.import_module("supermoe.train").main([*arguments, f"run={folder}", *SHORT])
    monkey.undo()
    return folder


def test_the_main_job_leaves_what_the_readme_says(run: Path) -> None:
    (tree,) = [block for block in blocks("") if block.startswith(f"{RUN}/")]
    names = re.findall(r"\w+(?:\.\w+|/)(?=\s)", tree.partition("\n")[2])
    assert {"report.md", "model/", "manifest.json", "checkpoints/"} <= set(names)
    missing = [name for name in names if name != "plots/" and not list(run.rglob(name.rstrip("/")))]
    assert missing == []
    assert (run / "predictions/test/churn.parquet").exists()


@pytest.mark.parametrize("module", ["predict", "export", "doctor"])
def test_serving_commands_run(run: Path, tmp_path: Path, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    (arguments,) = commands(module)
    places = {f"{RUN}/model": str(run / "model"), "scores": str(tmp_path / "out"), "vectors": str(tmp_path / "out")}
    shard = [] if module == "doctor" else ["--shard", "0/9"]  # a ninth of the households is enough here
    importlib.import_module(f"supermoe.{module}").main([*(places.get(word, word) for word in arguments), *shard])
    assert module == "doctor" or (tmp_path / "out" / "manifest.json").exists()
    assert capsys.readouterr().out


def test_the_python_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code.replace(f"{RUN}/model", str(run / "model")), "README.md", "exec"), {})  # noqa: S102 - our own text
    assert "new" in capsys.readouterr().out


def test_declared_tasks_are_valid() -> None:
    from supermoe.config import load_run

    (text,) = blocks("yaml")
    declared = yaml.safe_load(text)["tasks"]
    overrides = [f"tasks.{name}={yaml.safe_dump(task, default_flow_style=True)}" for name, task in declared.items()]
    assert set(declared) <= set(load_run(ROOT / "configs/quickstart.yaml", overrides).tasks)


def test_install_and_test_commands_are_those_of_ci() -> None:
    lines = re.findall(r"^pip install -e '\.\[(\w+)\]' && (.*)$", TEXT, re.MULTILINE)
    assert [extra for extra, _ in lines] == ["quickstart", "test"]
    assert dict(lines)["test"] == "pytest"


def test_tables_are_made_from_the_committed_rows() -> None:
    check = subprocess.run(
        [sys.executable, "benchmarks/report.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr
