"""The numbers that prepare prints, counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from supermoe.data import summary
from supermoe.data.schema import FieldSchema, Schema
from supermoe.data.store import StoreWriter

SCHEMA = Schema(
    fields={
        "item": FieldSchema(kind="category", size=9),
        "price": FieldSchema(kind="number"),
        "tags": FieldSchema(kind="categories", size=5),
    }
)
STAGED = SimpleNamespace(
    num_users=2, num_events=4, first_time=0, last_time=86400, event_types={"buy": 3, "see": 1}, notes=("a note",)
)
EXAMPLES = {
    "cuts": {"train": ["1970-01-02"]},
    "examples": {"train": 5},
    "labels": {"churn": {"train": {"asked": 5, "mean": 0.25}}},
}


@pytest.fixture
def writer(tmp_path):
    with StoreWriter(tmp_path / "store") as writer:
        writer.write("events/time", np.array([1, 2, 30, 40]))
        writer.write("events/item", np.array([2, 0, 1, 3], np.int32))
        writer.write("events/price", np.array([0.5, np.nan, 0.5, np.nan], np.float32))
        writer.write("events/tags", np.array([1, 2, 3, 4], np.int32))
        yield writer


@pytest.mark.parametrize("block_rows", [3, 100])
def test_shares_before_and_after_the_last_training_cut(writer, monkeypatch, block_rows):
    monkeypatch.setattr(summary, "BLOCK_ROWS", block_rows)
    plan = SimpleNamespace(cuts={"train": [10, 30], "valid": [50]})
    found = summary.summarise(STAGED, writer, SCHEMA, plan, 7, EXAMPLES, ["order"])
    assert found["fields"] == {
        "item": {
            "kind": "category",
            "size": 9,
            "missing": {"train": 0.5, "later": 0.0},
            "unknown": {"train": 0.0, "later": 0.5},
        },
        "price": {"kind": "number", "missing": {"train": 0.5, "later": 0.5}},
        "tags": {"kind": "categories", "size": 5, "unknown": 0.25},
    }
    assert found["duplicates"] == 7


def test_without_cuts_there_is_one_period(writer):
    found = summary.summarise(STAGED, writer, SCHEMA, SimpleNamespace(cuts={}), 0, EXAMPLES, [])
    assert found["fields"]["item"]["missing"] == {"all": 0.25}


def test_text_for_people(writer):
    plan = SimpleNamespace(cuts={"train": [30]})
    lines = summary.render(
        summary.summarise(STAGED, writer, SCHEMA, plan, 7, EXAMPLES, ["order", "users"])
    ).splitlines()
    assert lines[1] == "events    4 from 1970-01-01 to 1970-01-02 (buy 3, see 1)"
    assert "note      a note" in lines
    assert "field     tags: kind categories, size 5, unknown 0.25" in lines
    assert "label     churn: train (asked 5, mean 0.25)" in lines
    assert lines[-1] == "audit     no leak found: order, users"


def test_a_category_that_never_recurs_is_spoken_of(writer):
    plan = SimpleNamespace(cuts={"train": [20]})
    writer.write("events/item", np.array([2, 0, 1, 1], np.int32))
    found = summary.summarise(STAGED, writer, SCHEMA, plan, 1, EXAMPLES, ["order"])
    assert found["notes"][0] == "a note"
    assert "'item' is a category, but 100% of its values after" in found["notes"][1]
