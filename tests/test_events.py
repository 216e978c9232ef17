"""The encoded events of a store, row by row what the log says, whatever the size of a batch."""

from __future__ import annotations

import datetime as dt
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from supermoe.config import DataConfig, FieldConfig
from supermoe.data import events, vocab
from supermoe.data.sources import Frames
from supermoe.data.staging import connect, stage
from supermoe.data.store import StoreWriter

DAY = dt.datetime(2020, 1, 1)


@contextmanager
def written(tmp_path, frame, users=None, fields=None):
    """(number of repeated rows, writer) of a store with the frame's events."""
    with StoreWriter(tmp_path / "store") as writer:
        con = connect("200MB", 1, writer.scratch)
        source = Frames(frame, users=users)
        log = stage(con, source.attach(con), DataConfig.model_construct(fields=fields or {}), writer.scratch)
        fitted = vocab.fit(con, log.fields, "true")
        count = events.write_events(log, fitted, writer)
        events.write_users(log, writer)
        yield count, writer


def test_columns_follow_the_sorted_log(tmp_path):
    frame = pd.DataFrame(
        {
            "user": [2, 1, 2],
            "time": [DAY + dt.timedelta(seconds=n, milliseconds=900) for n in (5, 3, 1)],
            "item": ["a", None, "b"],
            "price": [10.0, float("nan"), 20.0],
            "tags": [["x", "y"], None, []],
        }
    )
    with written(tmp_path, frame) as (_, writer):
        start = 1577836800
        assert writer.read("events/time").tolist() == [start + 3, start + 1, start + 5]  # whole seconds, rounded down
        assert writer.read("events/item").tolist() == [0, 3, 2]
        price = writer.read("events/price")
        assert np.isnan(price[0])
        assert price[1:].tolist() == [1.0, 0.0]
        assert writer.read("events/tags.offsets").tolist() == [0, 0, 0, 2]
        assert writer.read("events/tags").tolist() == [2, 3]


def test_users_table_has_offsets_and_attributes(tmp_path):
    frame = pd.DataFrame({"user": ["b", "b", "c"], "time": [DAY] * 3, "x": [1, 2, 3]})
    with written(tmp_path, frame, users=pd.DataFrame({"user": ["a", "b"], "age": [7, 8]})) as (_, writer):
        table = pd.read_parquet(writer.folder / "users.parquet")
        assert table["user"].tolist() == ["a", "b", "c"]
        assert table["offset"].tolist() == [0, 0, 2]
        assert table["length"].tolist() == [0, 2, 1]
        assert table["age"].tolist()[:2] == [7, 8]


def random_frame(seed, size=400):
    """Many ties and repeats over few values."""
    rng = np.random.default_rng(seed)
    times = [DAY + dt.timedelta(seconds=int(n)) for n in rng.integers(0, 3, size)]
    return pd.DataFrame({"user": rng.integers(0, 5, size), "time": times, "x": rng.integers(0, 30, size)})


@pytest.mark.parametrize("batch_rows", [1, 7, 64, 10_000])
def test_repeats_are_counted_over_the_edges_of_batches(tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr(events, "BATCH_ROWS", batch_rows)
    frame = random_frame(seed=batch_rows)
    with written(tmp_path, frame) as (count, _):
        assert count == int(frame.duplicated().sum())
        assert count > 50


def test_hashed_fields_need_no_vocabulary(tmp_path):
    frame = pd.DataFrame({"user": [1, 1, 1], "time": [DAY] * 3, "x": ["a", "b", None], "l": [["a"], ["b", "a"], None]})
    fields = {"x": FieldConfig(kind="category", hash_size=50), "l": FieldConfig(kind="categories", hash_size=50)}
    with written(tmp_path, frame, fields=fields) as (_, writer):
        ids, lists = writer.read("events/x").tolist(), writer.read("events/l").tolist()
        assert lists == [ids[0], ids[1], ids[0]]
        assert ids[2] == 0
        assert 2 <= min(ids[:2]) <= max(ids) < 52
