"""The sorted log: order, numbering, users, label tables, and what happens when memory or disk run out."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pandas as pd
import pytest

from supermoe.config import DataConfig, FieldConfig
from supermoe.data.sources import Frames
from supermoe.data.staging import connect, stage, stage_serving
from supermoe.typed_yaml import UserError

DAY = dt.datetime(2020, 1, 1)


def hours(*numbers):
    return [DAY + dt.timedelta(hours=n) for n in numbers]


def staged(tmp_path, source, fields=None, wanted=()):
    con = connect("200MB", 1, tmp_path)
    return stage(con, source.attach(con), DataConfig.model_construct(fields=fields or {}), tmp_path, wanted)


def rows(log, sql):
    return log.con.execute(sql).fetchall()


def test_the_log_is_in_user_time_and_file_order(tmp_path):
    frame = pd.DataFrame({"user": ["b", "a", "b", "a", "b"], "time": hours(5, 9, 1, 9, 5), "n": [0, 1, 2, 3, 4]})
    log = staged(tmp_path, Frames(frame))
    assert rows(log, "SELECT user_row, position, n, row FROM log ORDER BY row") == [
        (0, 0, 1, 0),
        (0, 1, 3, 1),
        (1, 0, 2, 2),
        (1, 1, 0, 3),
        (1, 2, 4, 4),
    ]
    assert rows(log, 'SELECT user_row, "user", first_row, num_events FROM people ORDER BY user_row') == [
        (0, "a", 0, 2),
        (1, "b", 2, 3),
    ]
    assert (log.num_users, log.num_events, log.event_types) == (2, 5, {"event": 5})
    assert log.first_time == 1577836800 + 3600
    assert log.last_time == 1577836800 + 9 * 3600


def test_many_ties_keep_their_order(tmp_path):
    frame = pd.DataFrame({"user": [n % 3 for n in range(3000)], "time": [DAY] * 3000, "n": range(3000)})
    log = staged(tmp_path, Frames(frame))
    assert rows(log, "SELECT count(*) FROM log WHERE n <> 3 * position + user_row") == [(0,)]


def test_users_without_events_are_people_too(tmp_path):
    events = pd.DataFrame({"user": [5, 5, 2], "time": hours(0, 1, 2), "age": [1, 2, 3]})
    users = pd.DataFrame({"user": [9, 5, 3], "age": [90, 50, 30]})
    log = staged(tmp_path, Frames(events, users=users))
    assert log.attributes == ["age"]
    found = rows(log, 'SELECT user_row, "user", first_row, num_events, age FROM people ORDER BY user_row')
    assert found == [(0, 2, 0, 1, None), (1, 3, 1, 0, 30), (2, 5, 1, 2, 50), (3, 9, 3, 0, 90)]
    assert rows(log, "SELECT age FROM log ORDER BY row") == [(3,), (1,), (2,)]


def test_label_tables_are_numbered_like_the_log(tmp_path):
    events = pd.DataFrame({"user": ["b", "a"], "time": hours(0, 1)})
    orders = pd.DataFrame({"user": ["b", "x", "a"], "time": hours(3, 2, 1), "amount": [1.0, 2.0, 3.0]})
    log = staged(tmp_path, Frames(events, tables={"orders": orders}))
    assert rows(log, "SELECT user_row, amount FROM table_orders") == [(0, 3.0), (1, 1.0)]
    assert log.tables == ["orders"]


def test_tables_that_know_no_user_of_the_log_are_refused(tmp_path):
    events = pd.DataFrame({"user": ["17", "18"], "time": hours(0, 1)})
    others = pd.DataFrame({"user": ["0017"], "time": hours(3)})
    with pytest.raises(UserError, match=r"source\.users: none of its users has an event; .* '0017', .* '17'"):
        staged(tmp_path, Frames(events, users=others[["user"]]))
    with pytest.raises(UserError, match=r"source\.tables\.orders: none of its users"):
        staged(tmp_path, Frames(events, tables={"orders": others}))


def test_several_event_types_make_event_a_field(tmp_path):
    one = pd.DataFrame({"user": [1], "time": [DAY], "x": [1.5]})
    log = staged(tmp_path, Frames({"buy": one, "see": one}))
    assert {name: field.kind for name, field in log.fields.items()} == {"event": "category", "x": "number"}
    assert log.event_types == {"buy": 1, "see": 1}
    assert log.column_types == {"event": "VARCHAR", "x": "DOUBLE"}


def test_names_kept_as_floating_point_numbers_are_categories(tmp_path):
    """As pandas makes them of whole numbers some of which are missing."""
    values = {
        "item_id": [7.0, None, 9.0],
        "shop": [1.0, None, 2.0],
        "price": [3.0, None, 4.0],
        "weight_id": [0.5, 1.0, 2.0],
    }
    events = pd.DataFrame({"user": [1, 1, 2], "time": hours(0, 1, 2), **values})
    log = staged(tmp_path, Frames(events), wanted=["shop"])
    kinds = {name: field.kind for name, field in log.fields.items()}
    assert kinds == {"item_id": "category", "shop": "category", "price": "number", "weight_id": "number"}
    assert log.column_types["item_id"] == log.column_types["shop"] == "BIGINT"
    assert rows(log, "SELECT item_id, shop FROM log ORDER BY row") == [(7, 1), (None, None), (9, 2)]
    assert any("the column 'item_id' names things" in note for note in log.notes)
    listed = staged(tmp_path, Frames(events), {"price": FieldConfig(kind="category")})
    assert (list(listed.fields), listed.column_types["price"]) == (["price"], "BIGINT")


def test_columns_that_name_what_belongs_to_one_user_are_no_input_unless_listed(tmp_path):
    number = np.arange(8_000)
    events = pd.DataFrame(
        {
            "user": number % 400,
            "time": [DAY + dt.timedelta(minutes=int(n)) for n in number],
            "order": number // 2_000 * 400 + number % 400,  # four names of every user's own
            "item": [f"i{n % 1999}" for n in number],  # as many, each with four users
        }
    )
    log = staged(tmp_path, Frames(events))
    assert list(log.fields) == ["item"]
    assert any("the column 'order' names what belongs to one user" in note for note in log.notes)
    assert rows(log, 'SELECT count(DISTINCT "order") FROM log') == [(1_600,)]  # labels may still use it
    assert list(staged(tmp_path, Frames(events), wanted=["order"]).fields) == ["order", "item"]
    listed = {name: FieldConfig(kind="category") for name in ("order", "item")}
    assert list(staged(tmp_path, Frames(events), listed).fields) == ["order", "item"]


def test_an_empty_log_is_refused_in_training_and_fine_in_serving(tmp_path):
    nobody = Frames(pd.DataFrame({"user": ["a"], "time": [DAY], "n": [1]}), users=pd.DataFrame({"user": ["a", "b"]}))
    con = connect("200MB", 1, tmp_path)
    log = stage_serving(con, nobody.attach(con), {"n": FieldConfig(kind="category")}, 0, tmp_path)
    assert (log.num_users, log.num_events, log.first_time) == (2, 0, 0)
    with pytest.raises(UserError, match="the events hold no rows"):
        staged(tmp_path, Frames(pd.DataFrame({"user": ["a"], "time": [DAY]})[:0].astype({"user": "str"})))


def test_serving_reads_the_past_only_and_asks_for_the_models_fields(tmp_path):
    source = Frames(pd.DataFrame({"user": [1, 1], "time": hours(0, 1), "n": [1, 2]}))
    con = connect("200MB", 1, tmp_path)
    tables = source.attach(con)
    as_of = 1577836800 + 3600
    log = stage_serving(con, tables, {"n": FieldConfig(kind="category")}, as_of, tmp_path)
    assert rows(log, "SELECT n FROM log") == [(1,)]
    with pytest.raises(UserError, match="no column 'm', which the model reads"):
        stage_serving(con, tables, {"m": FieldConfig(kind="category")}, as_of, tmp_path)


def test_a_csv_that_turns_into_something_else_is_refused(tmp_path):
    from supermoe.data.sources import Files

    (tmp_path / "e.csv").write_text("user,time,x\n" + "1,2020-01-01,5\n" * 30000 + "1,2020-01-01,five\n")
    source = Files(Files.Config.model_validate({"events": str(tmp_path / "e.csv")}))
    with pytest.raises(UserError, match=r"first rows promise: .*Line: 30002"):
        staged(tmp_path, source)


def test_bad_memory_limit_names_its_key(tmp_path):
    with pytest.raises(UserError, match=r"data\.memory_limit: 'lots'"):
        connect("lots", None, tmp_path)


def test_serving_nobody_is_refused(tmp_path):
    source = Frames(pd.DataFrame({"user": [1], "time": [DAY], "n": [1]}))
    con = connect("200MB", 1, tmp_path)
    with pytest.raises(UserError, match="no user to serve: the events hold no rows before 1970-01-01"):
        stage_serving(con, source.attach(con), {"n": FieldConfig(kind="category")}, 0, tmp_path)
