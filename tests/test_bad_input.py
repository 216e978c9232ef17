"""What a user can get wrong: each ends in one paragraph that names the place and the remedy, exit code 2, nothing changed."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml

from supermoe import cli

PREPARE, TRAIN, EVALUATE = "prepare --config config.yaml run=fresh", "train --config config.yaml", "evaluate run"
PREDICT, EXPORT = (f"{command} run/model --as-of 2020-12-01 --out out" for command in ("predict", "export"))
CSV = f"{PREPARE} data.source.events=log.csv data.source.users=null"


# --- the world that commands run in, and what can be done to it -------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a log, a config and a finished run, all named by relative paths."""
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        tiny.make_log().to_parquet("events.parquet")
        tiny.make_users().to_parquet("users.parquet")
        config = tiny.make_config(Path()).model_dump(mode="json")
        config["training"] |= {"max_steps": 1, "keep_checkpoints": 1, "threads": 1}
        config["report"] |= {"plots": False}
        Path("config.yaml").write_text(yaml.safe_dump(config))
        run(TRAIN)
    return folder


@pytest.fixture
def world(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished` that is the current folder."""
    folder = Path(shutil.copytree(finished, tmp_path / "world"))
    monkeypatch.chdir(folder)
    return folder


def run(command: str) -> None:
    """What `python -m supermoe.<command>` does."""
    name, *args = shlex.split(command)
    cli.run(lambda: importlib.import_module(f"supermoe.{name}").main(args))


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def write(path: str, content: str | bytes) -> Callable[[], object]:
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(path: str) -> Callable[[], object]:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def truncate(pattern: str) -> Callable[[], object]:
    """The first half is left of the only file that matches."""

    def harm() -> None:
        (path,) = Path().glob(pattern)
        os.truncate(path, path.stat().st_size // 2)

    return harm


def blank(path: str) -> Callable[[], object]:
    """Zeros of the same length."""
    return lambda: Path(path).write_bytes(bytes(Path(path).stat().st_size))


def mark(path: str, **values: object) -> Callable[[], object]:
    """Other values in a JSON file."""
    return lambda: Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | values))


def replace(path: str, old: str, new: str) -> Callable[[], object]:
    return lambda: Path(path).write_text(Path(path).read_text().replace(old, new))


def table(path: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[], object]:
    """A Parquet file as a frame, changed."""
    return lambda: change(pd.read_parquet(path)).to_parquet(path)


def events(**columns: Callable[[pd.DataFrame], object]) -> Callable[[], object]:
    """Other columns in the events."""
    return table("events.parquet", lambda frame: frame.assign(**columns))


def row_8(column: str, value: object) -> Callable[[], object]:
    """One wrong value among the events."""
    return events(**{column: lambda frame: frame[column].where(frame.index != 7, value)})


def items(*types: object) -> Callable[[], object]:
    return lambda: pd.DataFrame({"type": types, "price": 1.5}).to_parquet("items.parquet")


def twice_the_same_column() -> None:
    log = pq.read_table("events.parquet")
    pq.write_table(log.append_column("shop", log["shop"]), "events.parquet")


def log_csv(*rows: str) -> Callable[[], object]:
    return write("log.csv", "user,time,value\n" + "\n".join(rows) + "\n")


DAYS = [f"u{day % 9},2020-01-{day:02d},1.5" for day in range(1, 31)]
ITEMS = f"{PREPARE} data.source.items='{{path: items.parquet, key: type}}'"
EVENTS = f"{PREPARE} data.source.events="


def cuts(train: str, valid: str = "null") -> str:
    return f"{PREPARE} data.splits.train={train} data.splits.valid={valid}"


# --- the table: what is wrong, the command, pieces of what is said, what happened to the files ------------------------

Case = tuple[str, str, str] | tuple[str, str, str, Callable[[], object]]

CONFIG: list[Case] = [
    ("no config file", "train --config gone.yaml", "config file gone.yaml: No such file"),
    ("broken YAML", PREPARE, "config.yaml, line 1, column 9: not valid YAML", write("config.yaml", "run: [a, }")),
    ("key given twice", PREPARE, "config.yaml, line 2, column 1: ... key 'run' given twice", write("config.yaml", "run: a\nrun: b")),
    ("unknown section", f"{PREPARE} trainig.lr=1", "config.yaml: trainig: unknown key, did you mean 'training'?"),
    ("unknown key", f"{PREPARE} training.epocs=3", "training.epocs: unknown key, did you mean 'epochs'?"),
    ("unknown key of a task", f"{PREPARE} tasks.churn.label.windw=3d", "tasks.churn.label.windw: ... did you mean 'window'"),
    ("unknown key of a series", cuts("'{frist: 2020-05-01, last: 2020-06-01}'"), "data.splits.train.frist: ... did you mean 'first'"),
    ("wrong type", f"{PREPARE} model.dim=wide", "model.dim: ... valid integer ... (got 'wide')"),
    ("out of range", f"{PREPARE} model.dropout=1.5", "model.dropout: ... less than 1 (got 1.5)"),
    ("NaN in the config", f"{PREPARE} training.lr=.nan", "training.lr: ... finite number (got nan)"),
    ("keys that do not fit together", f"{PREPARE} model.moe.top_k=9", "model.moe: top_k (9) cannot exceed experts (4)"),
    ("no override", f"{PREPARE} training.lr", "override 'training.lr' is not of the form key.subkey=value"),
    ("unknown component", f"{PREPARE} model.moe.router=sofmax", "model.moe.router: unknown type 'sofmax', did you mean 'softmax'?"),
    ("unknown type of task", f"{PREPARE} tasks.churn.type=binry", "tasks.churn: unknown type 'binry', did you mean 'binary'?"),
    ("component that cannot be imported", f"{PREPARE} loss.balancer=my.own:One", "loss.balancer: cannot import 'my.own:One'"),
    ("no such date", f"{PREPARE} data.splits.valid=2020-13-01", "data.splits.valid: expected a date ... got '2020-13-01'"),
    ("no duration", f"{PREPARE} tasks.churn.label.window=soon", "tasks.churn.label.window: expected a duration such as 28d"),
    ("endless label", f"{PREPARE} tasks.churn.label.window=all", "tasks.churn.label: a label window must end"),
    ("no task left", f"{PREPARE} " + " ".join(f"tasks.{name}=null" for name in tiny.make_config(Path()).tasks), "at least one task"),
    ("weights of an unknown task", f"{TRAIN} loss.balancer='{{type: fixed, weights: {{chrun: 2}}}}'",
     "loss.balancer.weights.chrun: there is no such task, did you mean 'churn'?"),
]  # fmt: skip
