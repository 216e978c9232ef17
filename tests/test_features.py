"""Features: declared SQL, derived columns and bags of what lies before the cut; knots from training; serving."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from logs import frame, seconds, staged, store_under_construction, task, time_split, write_store

from supermoe.config import Eligible, FeatureConfig
from supermoe.data import vocab
from supermoe.data.examples import write_examples
from supermoe.data.splits import serving_plan
from supermoe.typed_yaml import UserError

SPLITS = time_split(train=["2024-01-08", "2024-01-12"], valid="2024-01-15", eligible={"sql": "true"})
LABEL = task("number", {"window": "2d", "sql": "count(*)", "empty": 0})


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    rows = [
        ("a", "2024-01-01", "buy", "tea", 1.0, ["x", "y"]),
        ("a", "2024-01-01", "buy", "tea", 2.0, ["x"]),
        ("a", "2024-01-04T12:00", "view", "rum", 4.0, []),
        ("a", "2024-01-08", "buy", "gin", 8.0, ["z"]),  # at the first cut: not visible there
        ("a", "2024-01-14", "buy", "tea", 1024.0, ["x"]),
        ("b", "2024-01-07T23:59:59", "buy", "rum", 16.0, ["y"]),
        ("b", "2024-01-13", "view", "rum", 32.0, ["y"]),
        ("c", "2024-01-10", "view", "tea", 64.0, ["x"]),
        ("d", "2024-01-16", "buy", "ale", 9.0, ["x"]),
    ]
    return staged(tmp_path_factory.mktemp("log"), frame("user time event item amount tags", *rows))


def raw_features(tmp_path, log, monkeypatch, **groups):
    """{column: {(user, date): value}} before normalisation, which is left out."""
    monkeypatch.setattr("supermoe.data.features.normalise", lambda values, knots: values)
    store = write_store(tmp_path / "store", log, SPLITS, groups, asked=LABEL)
    users = store.users["user"].to_pylist()
    keys = [
        (users[u], str(np.datetime64(int(c), "s"))[8:10])
        for u, c in zip(store.examples.user, store.examples.cut, strict=True)
    ]
    return {
        name: dict(zip(keys, store.features[:, n].tolist(), strict=True))
        for n, name in enumerate(store.schema.features)
    }


def test_declared_windows_end_before_the_cut(tmp_path, log, monkeypatch):
    columns = raw_features(
        tmp_path, log, monkeypatch, f={"windows": ["4d", "all"], "sql": {"total": "sum(amount)", "n": "count(*)"}}
    )
    assert list(columns) == ["f_total_4d", "f_n_4d", "f_total_all", "f_n_all"]
    assert columns["f_total_all"]["a", "08"] == 7  # not the 8 of the event at the cut
    assert columns["f_total_all"]["a", "12"] == 15
    assert columns["f_total_4d"]["a", "08"] == 4  # from 2024-01-04 on
    assert columns["f_total_4d"]["a", "12"] == 8  # the event of 2024-01-08 is exactly four days old: inside
    assert columns["f_total_4d"]["a", "15"] == 1024
    assert columns["f_total_4d"]["b", "08"] == 16
    # without rows a count is zero and a sum is missing
    assert columns["f_n_4d"]["c", "08"] == 0
    assert np.isnan(columns["f_total_4d"]["c", "08"])


def test_event_types_gaps_and_ages(tmp_path, log, monkeypatch):
    sql = {"n": "count(*)", "gap": "max(gap_days)", "age": "min(age_days)"}
    columns = raw_features(tmp_path, log, monkeypatch, f={"windows": ["all"], "sql": sql, "events": ["view"]})
    assert columns["f_n_all"]["a", "15"] == 1
    assert columns["f_gap_all"]["a", "15"] == 3.5  # since the user's previous event of any type
    assert columns["f_age_all"]["a", "15"] == 10.5
    assert columns["f_n_all"]["d", "15"] == 0


def test_derived_columns(tmp_path, log, monkeypatch):
    columns = raw_features(tmp_path, log, monkeypatch, auto={"auto": True, "windows": ["4d", "all"]})
    assert columns["auto_events_4d"]["a", "12"] == 1
    assert columns["auto_count_item=tea_all"]["a", "12"] == 2
    assert columns["auto_since_last_view"]["a", "12"] == 7.5
    assert columns["auto_sum_amount_4d"]["c", "12"] == 64
    assert columns["auto_sum_amount_event=buy_all"]["a", "12"] == 11
    assert columns["auto_mean_amount_item=tea"]["a", "12"] == 1.5
    assert "auto_count_item=ale_all" not in columns  # first seen after the last training cut


def test_derived_columns_of_some_event_types(tmp_path, log, monkeypatch):
    columns = raw_features(tmp_path, log, monkeypatch, auto={"auto": True, "windows": ["all"], "events": ["view"]})
    assert columns["auto_events_all"]["a", "12"] == 1
    assert columns["auto_since_last"]["a", "12"] == 7.5
    assert columns["auto_sum_amount_all"]["b", "15"] == 32


def test_columns_without_information_are_left_out(tmp_path, log, monkeypatch):
    sql = {"one": "1", "n": "count(*)", "none": "sum(NULL::DOUBLE)", "some": "CASE WHEN count(*) > 0 THEN 5 END"}
    columns = raw_features(tmp_path, log, monkeypatch, f={"windows": ["all"], "sql": sql | {"again": "count(*)"}})
    assert list(columns) == ["f_n_all", "f_some_all"]  # `some` is 5 or missing


def test_whole_numbers_that_count_are_categories_and_numbers(tmp_path, monkeypatch):
    rows = [("a", "2024-01-01", 1), ("a", "2024-01-02", 3), ("b", "2024-01-08", 2), ("c", "2024-01-17", 2)]
    log = staged(tmp_path, frame("user time pieces", *rows))
    assert log.fields["pieces"].kind == "category"
    columns = raw_features(tmp_path, log, monkeypatch, auto={"auto": True, "windows": ["all"]})
    assert columns["auto_sum_pieces_all"]["a", "12"] == 4


def test_knots_come_from_training_examples(tmp_path, log):
    store = write_store(
        tmp_path / "store", log, SPLITS, {"f": {"windows": ["all"], "sql": {"total": "sum(amount)"}}}, asked=LABEL
    )
    knots = vocab.load_feature_knots(store.vocab)["f_total_all"]
    assert (knots.min(), knots.max()) == (7, 64)
    train = store.features[store.rows_of("train"), 0]
    assert (np.nanmin(train), np.nanmax(train)) == (0, 1)
    users = np.asarray(store.examples.user)[store.rows_of("valid")]
    assert store.features[store.rows_of("valid"), 0][users == 0] == 1  # 1039, beyond all of training: clipped


def bag_of(store, name, user, cut):
    """{value: count} of one example."""
    row = int(
        np.flatnonzero((np.asarray(store.examples.user) == user) & (np.asarray(store.examples.cut) == seconds(cut)))[0]
    )
    bag = store.bags[name]
    part = slice(bag.offsets[row], bag.offsets[row + 1])
    values = pq.read_table(store.vocab / f"{store.schema.bags[name].field}.parquet")["value"].to_pylist()
    return {values[i - 2]: count for i, count in zip(bag.ids[part], bag.counts[part], strict=True)}


def test_bags(tmp_path, log):
    store = write_store(
        tmp_path / "store", log, SPLITS, {"f": {"windows": ["4d", "all"], "bag": ["item", "tags"]}}, asked=LABEL
    )
    assert list(store.schema.bags) == ["f_item_4d", "f_item_all", "f_tags_4d", "f_tags_all"]
    schema = store.schema.bags["f_item_4d"]
    assert (schema.field, schema.window, schema.size) == ("item", 4 * 86400, store.schema.fields["item"].size)
    # two teas at one time are one moment
    assert bag_of(store, "f_item_all", 0, "2024-01-12") == {"tea": 1, "rum": 1, "gin": 1}
    assert bag_of(store, "f_item_4d", 0, "2024-01-12") == {"gin": 1}
    assert bag_of(store, "f_tags_all", 0, "2024-01-15") == {"x": 2, "y": 1, "z": 1}
    assert bag_of(store, "f_tags_all", 3, "2024-01-15") == {}


def test_auto_bags_large_fields_over_the_two_longest_windows(tmp_path, log, monkeypatch):
    monkeypatch.setattr("supermoe.data.features.SMALL_VOCABULARY", 2)
    store = write_store(
        tmp_path / "store", log, SPLITS, {"auto": {"auto": True, "windows": ["1d", "all", "4d"]}}, asked=LABEL
    )
    assert store.schema.bags.keys() == {"auto_item_4d", "auto_item_all", "auto_tags_4d", "auto_tags_all"}
    assert not [name for name in store.schema.features if "count_item" in name]


def test_auto_bags_what_labels_are_about_for_the_heads_to_copy(tmp_path, log):
    about = task("set", {"window": "2d", "sql": "list(item)", "field": "item"})
    groups = {"auto": {"auto": True, "windows": ["4d", "all"]}}
    store = write_store(tmp_path / "store", log, SPLITS, groups, asked=LABEL, about=about)
    assert {name: bag.input for name, bag in store.schema.bags.items()} == {
        "auto_item_4d": False,
        "auto_item_all": False,
    }


def test_serving_computes_the_same_columns(tmp_path, log):
    groups = {
        "auto": {"auto": True, "windows": ["4d", "all"]},
        "f": {"windows": ["3d"], "sql": {"gap": "avg(gap_days)"}, "bag": ["item"]},
    }
    trained = write_store(tmp_path / "store", log, SPLITS, groups, asked=LABEL)
    configs = {name: FeatureConfig(**config) for name, config in groups.items()}
    fitted = vocab.load(trained.vocab, log.fields)
    plan = serving_plan(seconds("2024-01-15"), Eligible(sql="true"))
    with store_under_construction(log, tmp_path / "serving", "true") as (writer, _):
        fitted.register(log.con)
        for name in fitted.categories:  # the events as the model's vocabulary encodes them
            np.save(
                writer.folder / f"events/{name}.npy",
                trained.lists[name].ids if name == "tags" else trained.columns[name],
            )
        knots = vocab.load_feature_knots(trained.vocab)
        examples = write_examples(log, writer, fitted, plan, configs, {}, knots)
        features, split = np.array(writer.read("examples/features")), np.array(writer.read("examples/split"))
        counts = np.array(writer.read("examples/bags/f_item_3d.counts"))
    rows = trained.rows_of("valid")
    np.testing.assert_array_equal(features, trained.features[rows])
    assert (split == 3).all()
    assert list(examples.knots) == trained.schema.features
    assert examples.labels == {}
    offsets = trained.bags["f_item_3d"].offsets
    np.testing.assert_array_equal(
        counts, np.concatenate([trained.bags["f_item_3d"].counts[offsets[r] : offsets[r + 1]] for r in rows])
    )


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"sql": {"x": "sum(amuont)"}}, ["features.f.sql.x", "amuont", "Columns at hand", "age_days", "gap_days"]),
        ({"sql": {"x": "sum(amount"}}, ["features.f.sql.x", "not valid SQL"]),
        ({"sql": {"x": "(SELECT 1)"}}, ["features.f.sql.x", "sub-select"]),
        ({"sql": {"x": "min(item)"}}, ["features.f.sql", "Could not convert"]),
        ({"sql": {"x": "sum(amount) / 0"}}, ["features.f.sql.x", "infinite", "nullif"]),
        ({"bag": ["itme"]}, ["features.f.bag", "did you mean 'item'"]),
        ({"bag": ["amount"]}, ["features.f.bag", "'amount' is not a category field"]),
        ({"sql": {"x": "count(*)"}, "events": ["sell"]}, ["features.f.events", "'sell'"]),
    ],
)
def test_bad_features_are_refused(tmp_path, log, group, words):
    with pytest.raises(UserError) as refused:
        write_store(tmp_path / "store", log, SPLITS, {"f": {"windows": ["all"], **group}}, asked=LABEL)
    for word in words:
        assert word in str(refused.value)


def test_no_features_at_all(tmp_path, log):
    store = write_store(tmp_path / "store", log, SPLITS, asked=LABEL)
    assert store.features.shape == (12, 0)
    assert store.bags == {}
