"""The audit: silent on a sound store, and every kind of leak that is planted is named."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs import frame, seconds, staged, task, time_split, write_store

from supermoe.config import FeatureConfig
from supermoe.data import audit as audit_module
from supermoe.data.audit import CHECKS, audit
from supermoe.data.splits import LeaveOneOut, UserFolds
from supermoe.typed_yaml import UserError

SPLITS = time_split(train=["2024-01-08", "2024-01-15"], valid="2024-01-22", users=UserFolds(folds=3))
GROUPS = {
    "f": {"windows": ["7d"], "sql": {"n": "count(*)"}, "bag": ["item"]},
    "auto": {"auto": True, "windows": ["all"]},
}
TASKS = {
    "spend": task("number", {"window": "7d", "sql": "sum(amount)", "empty": 0}),
    "city": task("class", {"attribute": "city"}),
    "items": task("set", {"window": "7d", "sql": "list(item)", "empty": []}),
}
USERS = 24


def make_log(path, **columns):
    """Some events per user and day, of which user 0 has one exactly at a cut; `columns` add (time -> value) ones."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        for day in sorted(rng.integers(1, 30, 12)):
            rows.append(
                (
                    user,
                    f"2024-01-{day:02d}T{rng.integers(24):02d}:00",
                    "v",
                    f"i{rng.integers(9)}",
                    float(rng.integers(99)),
                    ["x", "y"][: user % 3],
                )
            )
    rows.append((0, "2024-01-15", "v", "i1", 5.0, []))
    events = frame("user time event item amount tags", *rows)
    for name, value in columns.items():
        events[name] = events["time"].map(value)
    return staged(path, events, frame("user city", *[(u, "xy"[u % 2]) for u in range(USERS)]))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(log, store) without a leak."""
    path = tmp_path_factory.mktemp("sound")
    log = make_log(path / "log")
    return log, write_store(path / "store", log, SPLITS, GROUPS, **TASKS)


@pytest.fixture
def planted(sound, tmp_path):
    """(log, store folder to spoil, function that audits it)."""
    log, store = sound
    shutil.copytree(store.path, tmp_path / "store")

    def run(plan_changes=None, **changes):
        plan = dataclasses.replace(SPLITS.plan(log.con, {n: t.label for n, t in TASKS.items()}), **(plan_changes or {}))
        groups = {name: FeatureConfig(**group) for name, group in GROUPS.items()}
        return audit(
            changes.get("log", log), tmp_path / "store", plan, store.schema, groups, changes.get("tasks", TASKS)
        )

    return log, tmp_path / "store", run


def spoil(folder, name, change):
    """Rewrite one column."""
    column = np.load(folder / f"{name}.npy")
    np.save(folder / f"{name}.npy", change(column))


def caught(run, *words, **changes):
    with pytest.raises(UserError, match="leak audit") as refused:
        run(**changes)
    for word in words:
        assert word in str(refused.value)
    return str(refused.value)


def test_a_sound_store_passes_every_check(planted):
    _, _, run = planted
    assert run() == list(CHECKS)


def test_an_event_at_the_cut_is_caught(planted):
    _, folder, run = planted
    at_cut = seconds("2024-01-15")
    row = np.flatnonzero(
        (np.load(folder / "examples/user.npy") == 0) & (np.load(folder / "examples/cut.npy") == at_cut)
    )
    spoil(folder, "examples/visible", lambda visible: visible + np.isin(np.arange(len(visible)), row))
    assert "order: 1 examples see an event at or after their cut" in caught(run)


def test_an_event_that_is_kept_back_is_caught(planted):
    _, folder, run = planted
    spoil(folder, "examples/visible", lambda visible: visible - (np.arange(len(visible)) == 3))
    caught(run, "order: 1 examples do not see every event before their cut")


def test_a_history_out_of_order_is_caught(planted):
    _, folder, run = planted
    spoil(folder, "events/time", lambda time: np.concatenate([time[1:2], time[:1], time[2:]]))
    caught(run, "order: event row 1 lies before the one that it follows")


def test_visible_beyond_the_history_is_caught(planted):
    _, folder, run = planted
    spoil(folder, "examples/visible", lambda visible: np.append(visible[:-1], 1000))
    caught(run, "order: 1 examples see an event at or after their cut")


@pytest.mark.parametrize(("block", "span"), [(3, 4), (1, 1), (5, 1000)])
def test_wherever_blocks_end_order_is_kept_and_checked(planted, monkeypatch, block, span):
    _, folder, run = planted
    monkeypatch.setattr(audit_module, "BLOCK", block)
    monkeypatch.setattr(audit_module, "SPAN", span)
    assert run() == list(CHECKS)
    spoil(folder, "examples/visible", lambda visible: np.append(visible[:-2], [1000, visible[-1] - 1]))
    message = caught(run, "order: 1 examples see an event at or after their cut")
    assert "order: 1 examples do not see every event before their cut" in message


def test_a_window_past_the_data_is_caught(planted):
    _, _, run = planted
    late = TASKS | {"late": task("number", {"window": "10d", "sql": "count(*)", "empty": 0})}
    message = caught(run, tasks=late)
    assert "windows: the label window of 10d after the valid cut 2024-01-22 ends after the data" in message
    assert "windows: the label window of the train cut 2024-01-15 ends after the valid cut 2024-01-22" in message


def test_a_training_window_that_reaches_validation_is_caught(planted):
    _, folder, run = planted
    spoil(folder, "examples/cut", lambda cut: np.where(cut == seconds("2024-01-22"), seconds("2024-01-21"), cut))
    caught(run, "windows: the label window of the train cut 2024-01-15 ends after the valid cut 2024-01-21")


def test_a_vocabulary_fitted_on_the_future_is_caught(planted):
    log, folder, run = planted
    counts = log.con.sql(
        "SELECT item AS value, count(*) AS count FROM log GROUP BY item ORDER BY count DESC, value"
    ).to_arrow_table()
    pq.write_table(counts, folder / "vocab/item.parquet")
    caught(run, "fitting: the vocabulary of 'item' counts")


def test_a_vocabulary_of_lists_fitted_on_the_future_is_caught(planted):
    _, folder, run = planted
    table = pq.read_table(folder / "vocab/tags.parquet")
    pq.write_table(
        table.set_column(1, "count", pa.array([c + 1 for c in table["count"].to_pylist()])),
        folder / "vocab/tags.parquet",
    )
    caught(run, "fitting: the vocabulary of 'tags' counts 2 values, such as 'x'")


def test_number_knots_fitted_on_the_future_are_caught(planted):
    log, folder, run = planted
    log_values = log.con.execute("SELECT amount FROM log").fetchnumpy()["amount"]
    pq.write_table(
        pa.table({"knot": np.unique(np.quantile(log_values, np.linspace(0, 1, 65)))}), folder / "vocab/amount.parquet"
    )
    caught(run, "fitting: the knots of the number field 'amount'")


def test_feature_knots_fitted_on_all_examples_are_caught(planted):
    _, folder, run = planted
    train = np.load(folder / "examples/split.npy") == 0
    spoil(
        folder,
        "examples/features",
        lambda features: np.where(train[:, None], features * 0.9, features).astype(np.float32),
    )
    caught(run, "fitting: the knots of the feature 'f_n_7d' reach beyond the values of the training examples")


def test_a_bag_that_counts_the_future_is_caught(planted):
    _, folder, run = planted
    spoil(folder, "examples/bags/f_item_7d.counts", lambda counts: counts + 100)
    caught(run, "bags: the bag 'f_item_7d' counts more events than")


def test_the_attribute_of_a_held_out_user_is_caught(planted):
    _, folder, run = planted
    user, split = np.load(folder / "examples/user.npy"), np.load(folder / "examples/split.npy")
    held_out = next(u for u in range(USERS) if UserFolds(folds=3).bucket(u) == 0)  # the bucket of the test split
    spoil(
        folder,
        "examples/labels/city",
        lambda label: np.where((user == held_out) & (split == 0), 0, label).astype(np.int32),
    )
    caught(
        run, f"users: tasks.city: the attribute of 1 users, such as {held_out}, is asked in a split that is not theirs"
    )


@pytest.mark.parametrize("kind", ["timestamp", "date", "text"])
@pytest.mark.parametrize("reader", ["field", "feature"])
def test_a_post_dated_field_is_caught(tmp_path, kind, reader):
    changes = {
        "timestamp": lambda time: time + np.timedelta64(1, "h"),
        "date": lambda time: (time + np.timedelta64(30, "h")).date(),
        "text": lambda time: str((time + np.timedelta64(30, "h")).date()),
    }
    log = make_log(tmp_path / "log", refunded=changes[kind])
    if reader == "field":
        log = dataclasses.replace(log, fields=log.fields | {"refunded": log.fields["item"]})
        groups = {}
    else:
        log = dataclasses.replace(log, fields={name: field for name, field in log.fields.items() if name != "refunded"})
        groups = {"f": {"windows": ["all"], "sql": {"n": "count(DISTINCT refunded)"}}}
    tasks = {"spend": TASKS["spend"]}
    store = write_store(tmp_path / "store", log, SPLITS, groups, **tasks)
    plan = SPLITS.plan(log.con, {"spend": tasks["spend"].label})
    with pytest.raises(UserError) as refused:
        audit(
            log, store.path, plan, store.schema, {name: FeatureConfig(**group) for name, group in groups.items()}, tasks
        )
    key = "data.fields.refunded" if reader == "field" else "features.f.sql.n"
    assert (
        f"dates: 'refunded' (read by {key}) lies after its own event in {log.num_events} of {log.num_events} rows"
        in str(refused.value)
    )


def test_a_date_that_is_known_at_the_event_is_no_leak(tmp_path):
    log = make_log(tmp_path / "log", born=lambda time: time.normalize(), day=lambda time: time.date())
    groups = {"f": {"windows": ["all"], "sql": {"n": "count(DISTINCT born)", "m": "count(DISTINCT day)"}}}
    tasks = {"spend": TASKS["spend"]}
    store = write_store(tmp_path / "store", log, SPLITS, groups, **tasks)
    plan = SPLITS.plan(log.con, {"spend": tasks["spend"].label})
    assert audit(log, store.path, plan, store.schema, {"f": FeatureConfig(**groups["f"])}, tasks) == list(CHECKS)


def test_all_leaks_are_listed_at_once(planted):
    _, folder, run = planted
    spoil(folder, "examples/visible", lambda visible: visible + 1)
    spoil(folder, "examples/bags/f_item_7d.counts", lambda counts: counts + 100)
    caught(run, "(1) order:", "(2) bags:")


def test_leave_one_out(tmp_path):
    log = make_log(tmp_path / "log")
    tasks = {"item": task("class", {"next": "item"})}
    splits = LeaveOneOut(LeaveOneOut.Config())
    store = write_store(tmp_path / "store", log, splits, **tasks)
    plan = splits.plan(log.con, {"item": tasks["item"].label})
    assert audit(log, store.path, plan, store.schema, {}, tasks) == list(CHECKS)
    spoil(store.path, "examples/visible", lambda visible: visible + (np.arange(len(visible)) == 5))
    with pytest.raises(UserError, match="order: 1 examples see an event at or after their cut"):
        audit(log, store.path, plan, store.schema, {}, tasks)
    vocabulary = pq.read_table(store.vocab / "item.parquet")
    everything = log.con.sql("SELECT item AS value, count(*) AS count FROM log GROUP BY item").to_arrow_table()
    assert sum(vocabulary["count"].to_pylist()) == sum(everything["count"].to_pylist()) - 2 * USERS
