"""A small log and a model folder made from it, without training: what the tests of serving start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from supermoe.config import RunConfig
from supermoe.data.prepare import prepare
from supermoe.model.supermoe import SuperMoE
from supermoe.objectives.task import Task
from supermoe.serving import artifact
from supermoe.serving.card import CardFacts
from supermoe.typed_yaml import build, validate

CUT = "2020-12-01"
DIM = 16  # of the model
VECTOR = DIM + 4 + 4  # of a user: with the directions of the numbers and of the bags
SEGMENTS = ["gold", "silver"]


def make_log(num_users: int = 30, seed: int = 0) -> pd.DataFrame:
    """About 40 events per user over 2020, with a type, a shop, a value and tags; users are u00, u01 ..."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 70, num_users)
    user = np.repeat([f"u{n:02d}" for n in range(num_users)], lengths)
    second = rng.integers(0, 366 * 86400, len(user))
    frame = pd.DataFrame(
        {
            "user": user,
            "time": pd.Timestamp("2020-01-01") + pd.to_timedelta(second, unit="s"),
            "type": rng.choice(["milk", "bread", "beer", "nappies"], len(user), p=[0.4, 0.3, 0.2, 0.1]),
            "shop": rng.integers(1, 4, len(user)),
            "value": rng.exponential(10, len(user)).round(2),
            "tags": [list(rng.choice(["new", "sale", "own"], n, replace=False)) for n in rng.integers(0, 3, len(user))],
        }
    )
    return frame.sort_values("time", kind="stable").reset_index(drop=True)


def make_users(num_users: int = 30) -> pd.DataFrame:
    """One attribute per user."""
    return pd.DataFrame(
        {"user": [f"u{n:02d}" for n in range(num_users)], "segment": [SEGMENTS[n % 2] for n in range(num_users)]}
    )


def write_tables(folder: Path) -> None:
    """Write the log and its users to events.parquet and users.parquet, which `make_config` reads."""
    make_log().to_parquet(folder / "events.parquet")
    make_users().to_parquet(folder / "users.parquet")


def make_config(folder: Path) -> RunConfig:
    """A run in `folder` over events.parquet and users.parquet there, with one task of every shape of score."""
    window = {"window": "28d"}
    raw = {
        "run": str(folder / "run"),
        "data": {
            "source": {
                "type": "files",
                "events": str(folder / "events.parquet"),
                "users": str(folder / "users.parquet"),
            },
            "splits": {"type": "time"},
            "threads": 1,
        },
        "features": {
            "counts": {"windows": ["28d", "all"], "sql": {"n": "count(*)", "spend": "sum(value)"}, "bag": ["type"]}
        },
        "tasks": {
            "churn": {
                "type": "binary",
                "label": {**window, "sql": "count(*) < 3", "empty": True},
                "eligible": {"window": "56d", "sql": "count(*) >= 5"},
            },
            "spend": {"type": "regression", "label": {**window, "sql": "sum(value)", "empty": 0}},
            "types": {"type": "multilabel", "label": {**window, "sql": "list(distinct type)", "empty": []}},
            "next_type": {
                "type": "retrieval",
                "label": {**window, "sql": "list(distinct type)", "field": "type", "first": True},
            },
            "segment": {"type": "multiclass", "label": {"attribute": "segment"}},
        },
        "model": {"dim": DIM, "profile_dim": 4, "layers": 2, "max_events": 32, "moe": {"experts": 4}},
        "export": {"rows_per_part": 20},
    }
    return validate(RunConfig, raw, "test")


def make_model_folder(folder: Path, seed: int = 0) -> Path:
    """Write the log's files and a model folder of random weights, and return the latter's path."""
    write_tables(folder)
    config = make_config(folder)
    store = prepare(config)
    tasks: dict[str, Task] = {
        name: build("supermoe.objectives.tasks", task, name=name, label=store.schema.labels[name], schema=store.schema)
        for name, task in config.tasks.items()
    }
    tasks["spend"].load_state({"mean": 100.0, "std": 10.0})
    heads = {name: task.head_spec() for name, task in tasks.items()}
    torch.manual_seed(seed)
    model = SuperMoE(store.schema, config.model, heads)
    for parameter in model.parameters():  # also those that start at zero, so that scores differ
        parameter.data += 0.1 * torch.randn(parameter.shape)
    artifact.save(
        folder / "model",
        model,
        config=config,
        schema=store.schema,
        heads=heads,
        states={name: task.state() for name, task in tasks.items()},
        vocab=store.vocab,
        facts=CardFacts(),
    )
    return folder / "model"
