"""Vocabularies and knots: what is fitted, on which rows, and what encoding does with the rest."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from supermoe.config import FieldConfig
from supermoe.data import vocab
from supermoe.data.vocab import Vocabulary, normalise, quantile_knots
from supermoe.typed_yaml import UserError


def log(**columns):
    con = duckdb.connect()
    size = len(next(iter(columns.values())))
    con.register("frame", pa.table({"n": list(range(size)), **columns}))
    con.execute("CREATE TABLE log AS SELECT * FROM frame")
    con.execute("CREATE VIEW log_sample AS FROM log")
    return con


def chunked(values):
    return pa.chunked_array([pa.array(values)])


def fit(con, name, training="true", **config):
    field = {name: FieldConfig(**config)}
    return vocab.fit(con, field, training)


def test_values_by_falling_count_ties_by_value_rare_and_surplus_ones_unknown():
    con = log(x=["b", "a", "c", "b", None, "d", "d", "a", "e"])
    found = fit(con, "x", kind="category").categories["x"]
    assert found.values.to_pylist() == ["a", "b", "d", "c", "e"]
    assert found.counts.tolist() == [2, 2, 2, 1, 1]
    assert found.size == 7
    assert fit(con, "x", kind="category", min_count=2).categories["x"].values.to_pylist() == ["a", "b", "d"]
    assert fit(con, "x", kind="category", max_size=1).categories["x"].values.to_pylist() == ["a"]


def test_only_training_rows_are_seen():
    con = log(x=["a", "b", "b"], y=[1.0, 2.0, 100.0])
    assert fit(con, "x", "n < 1", kind="category").categories["x"].values.to_pylist() == ["a"]
    assert fit(con, "y", "n < 2", kind="number").knots["y"].max() == 2.0


def test_ids_null_is_0_and_what_was_not_seen_is_1():
    vocabulary = Vocabulary("x", pa.array(["a", "b"]), np.array([2, 1]))
    assert vocabulary.encode(chunked(["b", None, "z", "a"])).tolist() == [3, 0, 1, 2]
    assert vocabulary.encode(chunked([None, None])).tolist() == [0, 0]


@pytest.mark.parametrize("known", [[7, 5, -3], [2**40, 5, -3], [2**63 - 1, 2**63 - 2], [-(2**63), 5], []])
def test_whole_numbers_near_and_far_get_the_same_ids(known):
    vocabulary = Vocabulary("x", pa.array(known, pa.int64()), np.ones(len(known)))
    asked = [5, None, -3, 7, 6, -4, 0, 2**40, 2**63 - 1, 2**63 - 2, -(2**63)]
    ids = {value: 2 + row for row, value in enumerate(known)} | {None: 0}
    assert vocabulary.encode(chunked(asked)).tolist() == [ids.get(value, 1) for value in asked]


def amounts(values, counts, name="x"):
    return Vocabulary(name, pa.array(values), np.array(counts)).holds_amounts


def test_whole_numbers_hold_amounts_where_neighbours_are_alike():
    rng = np.random.default_rng(0)
    pieces = np.arange(1, 61)
    falling = np.round(5000 * np.exp(-pieces / 9)) + 1
    order = rng.permutation(60)
    assert amounts(pieces[order], falling[order])  # a vocabulary comes by frequency, not by value
    assert not amounts(pieces, rng.permutation(falling))  # ids: 17 says nothing about 18
    assert not amounts(pieces * 100, falling)  # neighbours are not to be had
    assert amounts(pieces * 100, falling, "price_cents")  # unless the name says so
    assert not amounts(pieces, falling, "shop_id")
    assert not amounts(pieces, np.ones(60))
    assert amounts([5, 4, 3, 2, 1], [9, 7, 9, 1, 2])  # stars: so few that counting them does no harm
    assert not amounts([1, 2], [5, 5])
    assert not amounts(["1", "2", "3"], [5, 5, 5])
    assert not Vocabulary("x", hash_size=64).holds_amounts


def test_values_of_another_type_are_converted_where_they_can_be():
    numbers = Vocabulary("x", pa.array([10, 20]), np.array([1, 1]))
    assert numbers.encode(chunked(["20", "ten", None, "10"])).tolist() == [3, 1, 0, 2]
    assert numbers.encode(chunked([20.0, 10.5])).tolist() == [3, 1]
    assert Vocabulary("x", pa.array(["10"]), np.array([1])).encode(chunked([10, 11])).tolist() == [2, 1]


def test_sql_lookup_agrees_with_encode():
    con = log(x=["a", "b", "a", None, "z"])
    vocabulary = Vocabulary("x", pa.array(["a", "b"]), np.array([2, 1]))
    vocabulary.register(con)
    join, code = vocabulary.lookup_sql("log.x")
    found = con.execute(f"SELECT {code} FROM log {join} ORDER BY n").fetchall()
    assert [row[0] for row in found] == vocabulary.encode(chunked(["a", "b", "a", None, "z"])).tolist()


def test_hashing_is_pinned_spread_and_the_same_in_sql_and_store():
    con = log(x=["apple", "pear", None, "apple"])
    vocabulary = fit(con, "x", kind="category", hash_size=1000).categories["x"]
    assert vocabulary.size == 1002
    column = con.sql(f"SELECT {vocabulary.encode_sql('x', 'VARCHAR')} AS x FROM log ORDER BY n").to_arrow_table()["x"]
    ids = vocabulary.encode(column).tolist()
    assert ids == [965, 189, 0, 965]  # must never change: models in use depend on it
    join, code = vocabulary.lookup_sql("x")
    assert [row[0] for row in con.execute(f"SELECT {code} FROM log {join} ORDER BY n").fetchall()] == ids
    spread = con.execute(f"SELECT count(DISTINCT {vocabulary.lookup_sql('range')[1]}) FROM range(20000)").fetchall()
    assert spread == [(1000,)]


def test_lists_count_their_items_and_hash_them():
    con = log(x=[["a", "b"], ["a"], [], None])
    found = fit(con, "x", kind="categories").categories["x"]
    assert found.values.to_pylist() == ["a", "b"]
    hashed = fit(con, "x", kind="categories", hash_size=10).categories["x"]
    sql = hashed.encode_sql("x", "VARCHAR[]")
    lists = [row[0] for row in con.execute(f"SELECT {sql} FROM log ORDER BY n").fetchall()]
    assert lists[1][0] == lists[0][0]
    assert all(2 <= item < 12 for item in lists[0])
    assert lists[2:] == [[], None]


def test_knots_ascend_and_map_the_values_evenly():
    values = np.random.default_rng(0).lognormal(size=10_000)
    knots = quantile_knots(values)
    assert len(knots) == 65
    assert (np.diff(knots) > 0).all()
    mapped = normalise(values, knots)
    assert mapped.dtype == np.float32
    assert np.histogram(mapped, 8, (0, 1))[0] == pytest.approx(np.full(8, 1250), abs=30)  # quantiles of a finite sample


def test_knots_of_constant_empty_and_tied_values():
    assert quantile_knots(np.array([3.0, 3.0, np.nan])).tolist() == [3.0]
    assert quantile_knots(np.array([np.nan])).tolist() == []
    assert quantile_knots(np.array([0.0] * 99 + [5.0])).tolist()[0] == 0.0
    assert normalise(np.array([1.0, 3.0, 9.0]), np.array([3.0])).tolist() == [0.0, 0.0, 0.0]
    assert np.isnan(normalise(np.array([1.0, np.nan]), np.zeros(0))).all()


def test_normalise_clips_and_keeps_missing():
    found = normalise(np.array([-5.0, 0.0, 1.0, 2.0, 10.0, np.nan]), np.array([0.0, 1.0, 3.0]))
    assert found[:5].tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]
    assert np.isnan(found[5])


def test_what_is_saved_is_loaded(tmp_path):
    fields = {
        "x": FieldConfig(kind="category"),
        "y": FieldConfig(kind="number"),
        "h": FieldConfig(kind="category", hash_size=7),
    }
    con = log(x=["a", "b"], y=[1.0, 2.0], h=["p", "q"])
    fitted = vocab.fit(con, fields, "true")
    fitted.save(tmp_path)
    loaded = vocab.load(tmp_path, fields)
    assert loaded.categories["x"].values.equals(fitted.categories["x"].values)
    assert loaded.categories["x"].counts.tolist() == [1, 1]
    assert loaded.categories["h"].size == 9
    assert loaded.knots["y"].tolist() == fitted.knots["y"].tolist()
    knots = {"b": np.array([1.0, 2.0]), "a": np.zeros(0)}
    vocab.save_feature_knots(tmp_path, knots)
    again = vocab.load_feature_knots(tmp_path)
    assert {name: values.tolist() for name, values in again.items()} == {"b": [1.0, 2.0], "a": []}
    assert list(again) == ["b", "a"]


def test_a_missing_or_damaged_file_is_named(tmp_path):
    for content in (None, b"rubbish"):
        if content:
            (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*x\.parquet: .*prepare the store again"):
            vocab.load(tmp_path, {"x": FieldConfig(kind="category")})
