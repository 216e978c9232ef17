"""Labels: the window is all that the SQL sees, classes come from training, attributes from the user's own split."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from logs import frame, seconds, staged, task, time_split, write_store

from supermoe.data.splits import SPLITS, LeaveOneOut, UserFolds
from supermoe.typed_yaml import UserError

TRAIN, VALID = seconds("2024-01-08"), seconds("2024-01-15")
EVENTS = frame(
    "user time event item amount",
    ("a", "2024-01-01", "buy", "tea", 1.0),
    ("a", "2024-01-08", "buy", "tea", 2.0),  # at the training cut: the first row of its window
    ("a", "2024-01-08", "view", "rum", 4.0),
    ("a", "2024-01-14T23:59:59", "buy", "gin", 8.0),  # the last second of the window
    ("a", "2024-01-15", "buy", "ale", 16.0),  # at the end of the window: not in it
    ("a", "2024-01-21", "buy", "tea", 32.0),
    ("b", "2024-01-02", "buy", "rum", 1.0),
    ("b", "2024-01-17", "view", "tea", 64.0),
    ("c", "2024-01-03", "view", "ale", 1.0),
    ("c", "2024-01-09", "buy", "ale", 128.0),
    ("d", "2024-01-10", "buy", "gin", 1.0),
)
SPLITS_OF = {"train": ["2024-01-08"], "valid": "2024-01-15"}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    users = frame("user city", ("a", "x"), ("b", "y"), ("c", None))
    returns = frame(
        "user time reason", ("a", "2024-01-09", "broken"), ("a", "2024-01-16", "late"), ("c", "2024-01-07", "lost")
    )
    return staged(tmp_path_factory.mktemp("log"), EVENTS, users, returns=returns)


def answers(store, name="asked"):
    """{(user, cut): label} of the examples that are asked."""
    users = store.users["user"].to_pylist()
    keys = [(users[u], c) for u, c in zip(store.examples.user, store.examples.cut, strict=True)]
    label, schema = store.labels[name], store.schema.labels[name]
    if schema.kind == "set":
        sets = [set(label.ids[a:b].tolist()) for a, b in zip(label.offsets[:-1], label.offsets[1:], strict=True)]
        names = schema.classes
        return {
            key: {names[i] for i in ids} if names else ids
            for key, ids, asked in zip(keys, sets, label.asked, strict=True)
            if asked
        }
    asked = ~np.isnan(label) if schema.kind == "number" else label >= 0
    values = [schema.classes[i] for i in np.maximum(label, 0)] if schema.classes else label.tolist()
    return {key: value for key, value, is_asked in zip(keys, values, asked, strict=True) if is_asked}


def ask(tmp_path, log, kind, label, eligible=None, splits=SPLITS_OF):
    return write_store(tmp_path / "store", log, time_split(**splits), asked=task(kind, label, eligible))


def test_the_window_holds_its_first_second_and_not_its_end(tmp_path, log):
    store = ask(tmp_path, log, "number", {"window": "7d", "sql": "sum(amount)", "empty": 0})
    spent = {("a", TRAIN): 14, ("a", VALID): 48, ("b", TRAIN): 0, ("b", VALID): 64, ("c", TRAIN): 128}
    assert answers(store) == spent | {("c", VALID): 0, ("d", VALID): 0}


def test_event_types_and_empty(tmp_path, log):
    store = ask(tmp_path, log, "number", {"window": "7d", "sql": "false", "empty": True, "events": ["buy"]})
    expected = {
        ("a", TRAIN): 0,
        ("a", VALID): 0,
        ("b", TRAIN): 1,
        ("b", VALID): 1,
        ("c", TRAIN): 0,
        ("c", VALID): 1,
        ("d", VALID): 1,
    }
    assert answers(store) == expected


def test_without_empty_users_without_rows_are_not_asked(tmp_path, log):
    store = ask(tmp_path, log, "number", {"window": "7d", "sql": "sum(amount)"})
    assert answers(store) == {("a", TRAIN): 14, ("a", VALID): 48, ("b", VALID): 64, ("c", TRAIN): 128}
    assert store.summary["labels"]["asked"]["train"]["asked"] == 2


def test_eligibility_looks_back(tmp_path, log):
    label = {"window": "7d", "sql": "sum(amount)", "empty": 0}
    store = ask(tmp_path, log, "number", label, {"window": "7d", "events": ["buy"]})
    # a purchase within seven days before the cut, from 2024-01-01 and 2024-01-08 on
    assert set(answers(store)) == {("a", TRAIN), ("b", TRAIN), ("a", VALID), ("c", VALID), ("d", VALID)}


def test_eligibility_may_ask_for_users_without_rows(tmp_path, log):
    label = {"window": "7d", "sql": "sum(amount)", "empty": 0}
    store = ask(tmp_path, log, "number", label, {"window": "6d", "sql": "count(*) FILTER (WHERE event = 'buy') = 0"})
    # a has no row at all in the six days before the training cut, c only a view; b none before the validation cut
    assert set(answers(store)) == {("a", TRAIN), ("c", TRAIN), ("b", VALID)}


def test_first_keeps_the_rows_of_the_earliest_time(tmp_path, log):
    store = ask(tmp_path, log, "set", {"window": "7d", "sql": "list(distinct item)", "first": True, "field": "item"})
    items = read_vocabulary(store, "item")
    assert {key: {items[i] for i in ids} for key, ids in answers(store).items()} == {
        ("a", TRAIN): {"tea", "rum"}, ("a", VALID): {"ale"}, ("b", VALID): {"tea"}, ("c", TRAIN): {"ale"}
    }  # fmt: skip
    assert (
        store.schema.labels["asked"].num_classes == store.schema.fields["item"].size == 5
    )  # gin is not in training time


def test_values_outside_the_vocabulary_are_left_out_of_sets(tmp_path, log):
    store = ask(tmp_path, log, "set", {"window": "7d", "sql": "list(item)", "field": "item"})
    items = read_vocabulary(store, "item")
    assert {items[i] for i in answers(store)["a", TRAIN]} == {"tea", "rum"}
    assert store.summary["labels"]["asked"]["train"]["unseen"] == 1  # gin


def read_vocabulary(store, field):
    """{id: value} of a field."""
    values = pq.read_table(store.vocab / f"{field}.parquet")["value"].to_pylist()
    return dict(enumerate(values, start=2))


def test_next_event_in_the_window(tmp_path, log):
    store = ask(tmp_path, log, "class", {"window": "7d", "next": "item", "events": ["buy"]})
    items = read_vocabulary(store, "item")
    assert {key: items[i] for key, i in answers(store).items()} == {
        ("a", TRAIN): "tea",
        ("a", VALID): "ale",
        ("c", TRAIN): "ale",
    }


def test_other_tables(tmp_path, log):
    store = ask(tmp_path, log, "number", {"window": "7d", "table": "returns", "sql": "count(*)", "empty": 0})
    assert {key: value for key, value in answers(store).items() if value} == {("a", TRAIN): 1, ("a", VALID): 1}


def test_classes_come_from_training(tmp_path, log):
    store = ask(tmp_path, log, "set", {"window": "7d", "sql": "list(item)", "empty": []})
    assert store.schema.labels["asked"].classes == ["ale", "gin", "rum", "tea"]
    assert answers(store)["a", TRAIN] == {"gin", "rum", "tea"}  # a set, though tea stands once and the list may repeat
    assert answers(store)["d", VALID] == set()


def test_rare_classes_are_dropped(tmp_path, log):
    store = ask(tmp_path, log, "set", {"window": "7d", "sql": "list(event)", "empty": [], "min_share": 0.5})
    assert store.schema.labels["asked"].classes == ["buy"]  # of three training examples two hold buy and one view
    assert answers(store)["a", TRAIN] == {"buy"}


def test_unseen_classes_are_not_asked_but_counted(tmp_path, log):
    label = {"window": "7d", "sql": "min(item)", "events": ["view", "buy"]}
    store = ask(tmp_path, log, "class", label)
    assert store.schema.labels["asked"].classes == ["ale", "gin"]
    assert answers(store) == {("a", TRAIN): "gin", ("a", VALID): "ale", ("c", TRAIN): "ale"}  # b's tea is new
    assert store.summary["labels"]["asked"]["valid"] == {"asked": 1, "unseen": 1}


def test_attributes_are_asked_in_the_split_of_the_user(tmp_path):
    users = [f"u{n}" for n in range(60)]
    events = frame("user time event item", *[(u, f"2024-01-0{d}", "v", "x") for u in users for d in (1, 9)])
    log = staged(tmp_path / "scratch", events, pd.DataFrame({"user": users, "city": ["x", "y"] * 30}))
    folds = UserFolds(folds=3, fold=2)
    store = ask(
        tmp_path,
        log,
        "class",
        {"attribute": "city"},
        splits={"train": ["2024-01-08"], "valid": "2024-01-09", "users": folds},
    )
    names = {0: SPLITS["valid"], 1: SPLITS["train"], 2: SPLITS["test"]}
    asked = {(u, c) for u, c in answers(store)}
    cut = {SPLITS["train"]: TRAIN, SPLITS["valid"]: seconds("2024-01-09")}
    expected = {(u, cut[names[folds.bucket(u)]]) for u in users if names[folds.bucket(u)] in cut}
    assert asked == expected
    assert 0 < len(expected) < 60  # users of the test bucket are asked nowhere: there is no test cut


def test_leave_one_out_asks_for_the_held_out_events(tmp_path):
    events = frame("user time event item", *[(u, f"2024-01-0{d}", "v", f"i{d}") for u in "ab" for d in range(1, 6)])
    log = staged(tmp_path / "scratch", events)
    splits = LeaveOneOut(LeaveOneOut.Config())
    # the vocabulary ends before the targets; all but the first items are unknown
    store = write_store(tmp_path / "store", log, splits, asked=task("class", {"next": "item"}))
    assert store.schema.labels["asked"].num_classes == 2 + 3
    assert answers(store) == {}
    assert store.summary["labels"]["asked"] == {
        "train": {"asked": 0, "unseen": 0}, "valid": {"asked": 0, "unseen": 2}, "test": {"asked": 0, "unseen": 2}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "label", "words"),
    [
        (
            "number",
            {"sql": "sum(amont)"},
            ["tasks.asked.label.sql", "amont", "Columns at hand:", "amount", "ahead_days"],
        ),
        ("number", {"sql": "sum(amount"}, ["tasks.asked.label.sql", "not valid SQL"]),
        ("number", {"sql": "(SELECT max(amount) FROM log)"}, ["tasks.asked.label.sql", "sub-select", "one aggregate"]),
        ("number", {"sql": "sum(amount) OVER ()"}, ["tasks.asked.label.sql", "window function"]),
        ("number", {"sql": "1, 2"}, ["tasks.asked.label.sql", "one SQL expression"]),
        ("number", {"sql": "1) FROM log --"}, ["tasks.asked.label.sql", "not valid SQL"]),
        ("number", {"sql": "amount"}, ["tasks.asked.label.sql", "GROUP BY"]),
        ("number", {"sql": "min(item)"}, ["tasks.asked.label", "needs a number", "string"]),
        ("number", {"sql": "sum(amount) / 0"}, ["tasks.asked.label", "infinite", "nullif"]),
        ("number", {"sql": "ln(sum(amount) - 14)"}, ["tasks.asked.label", "logarithm"]),
        ("class", {"sql": "list(item)"}, ["tasks.asked.label", "one value"]),
        ("set", {"sql": "min(item)"}, ["tasks.asked.label", "a list"]),
        ("number", {"sql": "1", "empty": 1}, ["tasks.asked", "all 3 labels", "tasks.asked=null"]),
        ("number", {"sql": "sum(amount)", "empty": True}, ["tasks.asked.label.empty", "True does not fit", "double"]),
        ("number", {"sql": "count(*) > 3", "empty": "maybe"}, ["tasks.asked.label.empty", "'maybe' does not", "bool"]),
        ("class", {"sql": "'one'"}, ["tasks.asked", "are the same"]),
        ("number", {"sql": "sum(amount)", "events": ["sell"]}, ["tasks.asked.label.events", "'sell'", "buy"]),
        ("number", {"sql": "count(*)", "table": "return"}, ["tasks.asked.label.table", "did you mean 'returns'"]),
        ("number", {"sql": "sum(NULL::DOUBLE)"}, ["tasks.asked", "no training example has a label"]),
        ("set", {"sql": "list(item)", "field": "itme"}, ["tasks.asked.label", "did you mean 'item'"]),
    ],
)
def test_bad_labels_are_refused(tmp_path, log, kind, label, words):
    with pytest.raises(UserError) as refused:
        ask(tmp_path, log, kind, {"window": "7d", **label})
    for word in words:
        assert word in str(refused.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ({"attribute": "town"}, ["tasks.asked.label.attribute", "'town'", "city"]),
        ({"attribute": "city", "empty": "x"}, ["tasks.asked.label.empty", "attribute"]),
        ({"next": "item"}, ["tasks.asked.label.window", "window: 28d"]),
        ({"next": "amount", "window": "7d"}, ["tasks.asked.label", "'amount' is not a category field"]),
    ],
)
def test_bad_attributes_and_next_labels_are_refused(tmp_path, log, label, words):
    with pytest.raises(UserError) as refused:
        ask(tmp_path, log, "class", label)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(("eligible", "word"), [({"sql": "cnt(*)"}, "cnt"), ({"events": ["sell"]}, "sell")])
def test_bad_eligibility_is_refused(tmp_path, log, eligible, word):
    with pytest.raises(UserError, match=r"tasks\.asked\.eligible") as refused:
        ask(tmp_path, log, "number", {"window": "7d", "sql": "count(*)"}, eligible)
    assert word in str(refused.value)
