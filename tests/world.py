"""A small world that commands run in, and what can happen to its files before they do.

A harm is returned, not done: tables of cases are made before there is a world.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import tiny
import yaml

from supermoe import cli

Harm = Callable[[], object]


def make() -> None:
    """A log, a config and a finished run in the current folder, all named by relative paths."""
    tiny.write_tables(Path())
    config = tiny.make_config(Path()).model_dump(mode="json")
    config["training"] |= {"max_steps": 1, "keep_checkpoints": 1, "threads": 1, "refit": False}
    config["report"] |= {"plots": False}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    run("train --config config.yaml")


def run(command: str) -> None:
    """What `python -m supermoe.<command>` does."""
    name, *args = shlex.split(command)
    cli.run(lambda: importlib.import_module(f"supermoe.{name}").main(args))


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def write(path: str, content: str | bytes) -> Harm:
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(path: str) -> Harm:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def truncate(pattern: str) -> Harm:
    """The first half is left of the only file that matches."""

    def harm() -> None:
        (path,) = Path().glob(pattern)
        os.truncate(path, path.stat().st_size // 2)

    return harm


def blank(path: str) -> Harm:
    """Zeros of the same length."""
    return lambda: Path(path).write_bytes(bytes(Path(path).stat().st_size))


def mark(path: str, **values: object) -> Harm:
    """Other values in a JSON file."""
    return lambda: Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | values))


def replace(path: str, old: str, new: str) -> Harm:
    return lambda: Path(path).write_text(Path(path).read_text().replace(old, new))


def table(path: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Harm:
    """A Parquet file as a frame, changed."""
    return lambda: change(pd.read_parquet(path)).to_parquet(path)


def events(**columns: Callable[[pd.DataFrame], object]) -> Harm:
    """Other columns in the events."""
    return table("events.parquet", lambda frame: frame.assign(**columns))


def row_8(column: str, value: object) -> Harm:
    """One wrong value among the events."""
    return events(**{column: lambda frame: frame[column].where(frame.index != 7, value)})


def items(*types: object) -> Harm:
    return lambda: pd.DataFrame({"type": types, "price": 1.5}).to_parquet("items.parquet")


def twice_the_same_column() -> None:
    log = pq.read_table("events.parquet")
    pq.write_table(log.append_column("shop", log["shop"]), "events.parquet")


def log_csv(*rows: str) -> Harm:
    return write("log.csv", "user,time,value\n" + "\n".join(rows) + "\n")
