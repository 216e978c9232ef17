"""Sources: files and frames read under our names, in their order; and a table of what is refused, with the remedy."""

from __future__ import annotations

import datetime as dt

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe.data.sources import Files, Frames
from supermoe.typed_yaml import UserError, validate

DAY = dt.datetime(2020, 1, 1)


def attach(source):
    con = duckdb.connect()
    con.execute("SET TimeZone = 'UTC'")
    return con, source.attach(con)


def files(tmp_path, **config):
    return Files(validate(Files.Config, config, "test"))


def rows(source, columns="*", view="events"):
    con, tables = attach(source)
    order = " ORDER BY file_order" if view == "events" else " ORDER BY 1"
    return con.execute(f"SELECT {columns} FROM {getattr(tables, view)}{order}").fetchall()


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_two_sets_of_files_with_other_names_become_one_log(tmp_path):
    pq.write_table(pa.table({"who": ["b", "a"], "ts": [DAY, DAY], "item": [3, None]}), tmp_path / "buy.parquet")
    seen = write(tmp_path / "seen.csv", "user,time,page\na,2020-01-02T10:00:00,home\n")
    source = files(
        tmp_path,
        events=[
            {"path": f"{tmp_path}/*.parquet", "event": "buy", "columns": {"user": "who", "time": "ts"}},
            {"path": seen, "event": "see"},
        ],
    )
    assert rows(source, '"user", time, event, item, page') == [
        ("b", DAY, "buy", 3, None),
        ("a", DAY, "buy", None, None),
        ("a", dt.datetime(2020, 1, 2, 10), "see", None, "home"),
    ]


def test_plain_path_folder_and_event_column(tmp_path):
    write(tmp_path / "2.csv", "user,time,kind\n2,2020-01-01,b\n")
    write(tmp_path / "1.csv", "user,time,kind\n1,2020-01-01,a\n1,2020-01-01,c\n")
    plain = files(tmp_path, events=str(tmp_path))
    assert rows(plain, '"user", event, kind') == [(1, "event", "a"), (1, "event", "c"), (2, "event", "b")]
    typed = files(tmp_path, events={"path": str(tmp_path), "columns": {"event": "kind"}})
    assert rows(typed, '"user", event') == [(1, "a"), (1, "c"), (2, "b")]


def test_ties_keep_the_order_of_files_and_rows_in_parquet(tmp_path):
    for name, first in (("b", 5), ("a", 0)):
        table = pa.table({"user": [1] * 5, "time": [DAY] * 5, "n": list(range(first, first + 5))})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    assert [row[0] for row in rows(files(tmp_path, events=str(tmp_path)), "n")] == list(range(10))


def test_items_users_and_tables(tmp_path):
    events = write(tmp_path / "e.csv", "user,time,item\n1,2020-01-01,7\n1,2020-01-02,8\n1,2020-01-03,\n")
    items = write(tmp_path / "i.csv", "id,color\n7,red\n9,blue\n")
    users = write(tmp_path / "u.csv", "customer,age\n1,30\n2,40\n")
    table = write(tmp_path / "t.csv", "user,day,amount\n1,2020-02-01,5.5\n")
    source = files(
        tmp_path,
        events=events,
        items={"path": items, "key": "item", "columns": {"item": "id"}},
        users={"path": users, "columns": {"user": "customer"}},
        tables={"orders": {"path": table, "columns": {"time": "day"}, "end_of_day": True}},
    )
    assert rows(source, "item, color") == [(7, "red"), (8, None), (None, None)]
    assert rows(source, "*", view="users") == [(1, 30), (2, 40)]
    con, tables = attach(source)
    assert con.execute(f"SELECT * FROM {tables.tables['orders']}").fetchall() == [
        (1, dt.datetime(2020, 2, 1, 23, 59, 59), 5.5)
    ]


def test_where_keeps_rows_by_their_own_names(tmp_path):
    path = write(tmp_path / "e.csv", "u,time,n\n1,2020-01-01,1\n2,nonsense,2\n")
    source = files(tmp_path, events={"path": path, "columns": {"user": "u"}, "where": "n < 2 AND u = 1"})
    assert rows(source, '"user", n') == [(1, 1)]


def test_rows_without_a_user_are_dropped_on_demand_and_counted(tmp_path):
    path = write(tmp_path / "e.csv", "user,time\n1,2020-01-01\n,2020-01-02\n2,2020-01-03\n")
    source = files(tmp_path, events=path, drop_null_users=True)
    assert rows(source, '"user"') == [(1,), (2,)]
    assert attach(source)[1].num_null_users == 1


def test_user_ids_of_two_types_are_read_as_text_and_said_so(tmp_path):
    events = write(tmp_path / "e.csv", "user,time\n1,2020-01-01\n")
    users = write(tmp_path / "u.csv", "user,age\n1,30\nx,40\n")
    source = files(tmp_path, events=events, users=users)
    assert rows(source, '"user"') == [("1",)]
    assert "read as text" in attach(source)[1].notes[0]


def test_nan_is_missing(tmp_path):
    frame = pd.DataFrame({"user": [1, 1], "time": [DAY, DAY], "price": [float("nan"), 2.0]})
    assert rows(Frames(frame), "price") == [(None,), (2.0,)]


def test_fingerprint_follows_the_file(tmp_path):
    path = write(tmp_path / "e.csv", "user,time\n1,2020-01-01\n")
    source = files(tmp_path, events=path)
    before = source.fingerprint()
    assert files(tmp_path, events=path).fingerprint() == before
    write(tmp_path / "e.csv", "user,time\n1,2020-01-01\n2,2020-01-01\n")
    assert source.fingerprint() != before
    assert Frames(pd.DataFrame({"user": [1], "time": [DAY]})).fingerprint() is None


def test_decimal_commas_and_words_for_nothing_are_read_as_told(tmp_path):
    path = write(tmp_path / "e.csv", "user;time;x\n1;2020-01-01;3,50\n1;2020-01-01;NA\n1;2020-01-01;\n")
    source = files(tmp_path, events={"path": path, "decimal": ",", "nulls": ["NA"]})
    assert rows(source, "x") == [(3.5,), (None,), (None,)]
    pq.write_table(pa.table({"user": [1], "time": [DAY]}), tmp_path / "e.parquet")
    with pytest.raises(UserError, match=r"data\.source\.events\[0\]: decimal and nulls are for CSV"):
        attach(files(tmp_path, events={"path": str(tmp_path / "e.parquet"), "nulls": ["NA"]}))


def test_an_empty_csv_column_takes_any_type(tmp_path):
    empty = write(tmp_path / "a.csv", "user,time,x,y\n1,2020-01-01,,\n")
    other = write(tmp_path / "b.csv", "user,time,x\n1,2020-01-02,1.5\n")
    assert rows(files(tmp_path, events=[empty, other]), "x") == [(None,), (1.5,)]
    con, tables = attach(files(tmp_path, events=[empty, other]))
    assert {row[0]: row[1] for row in con.execute(f"DESCRIBE {tables.events}").fetchall()}["y"] == '"NULL"'


def test_a_csv_column_that_begins_empty_has_the_type_of_its_later_values(tmp_path):
    late = "1,2020-01-01,\n" * 21_000 + "1,2020-01-01,2.5\n"
    path = write(tmp_path / "e.csv", f"user,time,x\n{late}")
    assert rows(files(tmp_path, events=path), "x")[-1] == (2.5,)


def test_whole_decimals_are_user_ids(tmp_path):
    kinds = {pa.decimal128(18, 0): 7, pa.decimal128(38, 0): "7"}
    for number, (kind, id_) in enumerate(kinds.items()):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"user": pa.array([7], kind), "time": [DAY]}), path)
        assert rows(files(tmp_path, events=str(path)), '"user"') == [(id_,)]


@pytest.mark.parametrize("kind", ["pandas", "arrow", "relation"])
def test_frames_of_every_kind(kind):
    frame = pd.DataFrame({"customer": ["b", "a"], "time": [DAY, DAY], "n": pd.Categorical(["x", "y"])})
    table = pa.Table.from_pandas(frame)
    given = {"pandas": frame, "arrow": table, "relation": duckdb.connect().from_arrow(table)}[kind]
    source = Frames({"buy": given}, users=pd.DataFrame({"customer": ["c"]}), columns={"user": "customer"})
    assert rows(source, '"user", event, CAST(n AS VARCHAR)') == [("b", "buy", "x"), ("a", "buy", "y")]
    assert rows(source, view="users") == [("c",)]


def test_frame_of_whole_numbers_with_gaps_is_numbers_again():
    frame = pd.DataFrame({"user": [3.0, 1.0], "time": [DAY, DAY]})
    assert rows(Frames(frame), '"user"') == [(3,), (1,)]


# --- what is refused --------------------------------------------------------------------------------------------------

GOOD = "user,time,x\n1,2020-01-01,5\n"
# (files to write, config of the source, words of the message)
REFUSED = {
    "no such file": ({}, {"events": "gone.csv"}, ["data.source.events[0]", "gone.csv does not exist"]),
    "glob without match": ({}, {"events": "*.parquet"}, ["no file matches"]),
    "folder without files": ({"notes.txt": "x"}, {"events": "."}, ["holds no Parquet or CSV file"]),
    "unknown ending": ({"e.txt": GOOD}, {"events": "e.txt"}, ["unknown ending", ".parquet"]),
    "mixed formats": ({"e.csv": GOOD, "e.parquet": "x"}, {"events": "."}, ["mixes Parquet and CSV"]),
    "empty file": ({"e.csv": ""}, {"events": "e.csv"}, ["empty (0 bytes)"]),
    "not parquet": ({"e.parquet": "hello hello hello"}, {"events": "e.parquet"}, ["not a readable Parquet file"]),
    "no user column": ({"e.csv": "id,time\n1,2020-01-01\n"}, {"events": "e.csv"}, ["'user'", "columns.user", "id"]),
    "no time column": ({"e.csv": "user,date\n1,2020-01-01\n"}, {"events": "e.csv"}, ["'time'", "columns.time"]),
    "typo in columns": (
        {"e.csv": "customer,time\n1,2020-01-01\n"},
        {"events": {"path": "e.csv", "columns": {"user": "custmer"}}},
        ["columns.user", "did you mean 'customer'"],
    ),
    "name taken twice": (
        {"e.csv": "user,id,time\n1,1,2020-01-01\n"},
        {"events": {"path": "e.csv", "columns": {"user": "id"}}},
        ["column 'user' too", "user_2"],
    ),
    "duplicate column": ({"e.csv": "user,time,a,A\n1,2020-01-01,1,2\n"}, {"events": "e.csv"}, ["two columns 'A'"]),
    "reserved name": (
        {"e.csv": "user,time,position\n1,2020-01-01,2\n"},
        {"events": "e.csv"},
        ["'position'", "my_position"],
    ),
    "null user": (
        {"e.csv": "user,time\n1,2020-01-01\n,2020-01-01\n"},
        {"events": "e.csv"},
        ["e.csv, row 2, column 'user'", "drop_null_users"],
    ),
    "unparseable time": (
        {"e.csv": "user,time\n1,2020-01-01\n2,yesterday\n3,2020-13-01\n"},
        {"events": "e.csv"},
        ["e.csv, row 2, column 'time'", "'yesterday'", "2 such rows", "ISO"],
    ),
    "missing time": ({"e.csv": "user,time\n1,\n2,2020-01-01\n"}, {"events": "e.csv"}, ["row 1", "None"]),
    "mixed zones": (
        {"e.csv": "user,time\n1,2020-01-01T00:00:00\n2,2020-01-01T00:00:00+02:00\n"},
        {"events": "e.csv"},
        ["row 1", "carries no zone", "row 2", "time_zone"],
    ),
    "numbers without unit": ({"e.csv": "user,time\n1,1577836800\n"}, {"events": "e.csv"}, ["row 1", "time_unit"]),
    "wrong unit": (
        {"e.csv": "user,time\n1,1577836800000\n"},
        {"events": {"path": "e.csv", "time_unit": "s"}},
        ["row 1", "1577836800000 counts ms since 1970 and not s", "time_unit: ms"],
    ),
    "seconds read as milliseconds": (
        {"e.csv": "user,time\n1,1577836800\n1,1577836801.5\n"},
        {"events": {"path": "e.csv", "time_unit": "ms"}},
        ["row 1", "1577836800 counts s since 1970 and not ms", "time_unit: s"],
    ),
    "one number beyond time": (
        {"e.csv": "user,time\n1,1577836800\n2,1577836800000\n"},
        {"events": {"path": "e.csv", "time_unit": "s"}},
        ["row 2", "1700 and 2262", "time_unit"],
    ),
    "German dates without a format": (
        {"e.csv": "user,time\n1,31.12.2019\n"},
        {"events": "e.csv"},
        ["row 1", "'31.12.2019' is no time", "time_format: '%d.%m.%Y'"],
    ),
    "a date that does not fit the format": (
        {"e.csv": "user,time\n1,31.12.2019\n1,12/31/2019\n"},
        {"events": {"path": "e.csv", "time_format": "%d.%m.%Y"}},
        ["row 2", "'12/31/2019'", "time_format: '%d.%m.%Y'"],
    ),
    "a format of unknown letters": (
        {"e.csv": GOOD},
        {"events": {"path": "e.csv", "time_format": "%Q"}},
        ["events[0].time_format: '%Q'", "format specifier"],
    ),
    "unknown zone": (
        {"e.csv": GOOD},
        {"events": {"path": "e.csv", "time_zone": "Europe/Berln"}},
        ["events[0].time_zone", "Europe/Berln"],
    ),
    "where does not fit": ({"e.csv": GOOD}, {"events": {"path": "e.csv", "where": "y > 1"}}, [".where", "y > 1"]),
    "where is no SQL": ({"e.csv": GOOD}, {"events": {"path": "e.csv", "where": "x >"}}, [".where", "x >"]),
    "event twice": (
        {"e.csv": "user,time,event\n1,2020-01-01,a\n"},
        {"events": {"path": "e.csv", "event": "b"}},
        ["events[0].event", "only one"],
    ),
    "text here, number there": (
        {"a.csv": "user,time,x\n1,2020-01-01,5\n", "b.csv": "user,time,x\n1,2020-01-01,five\n"},
        {"events": ["a.csv", "b.csv"]},
        ["'x'", "BIGINT", "VARCHAR", "rename"],
    ),
    "item twice": (
        {"e.csv": GOOD, "i.csv": "x,c\n5,red\n5,blue\n"},
        {"events": "e.csv", "items": {"path": "i.csv", "key": "x"}},
        ["data.source.items", "2 rows for the x 5"],
    ),
    "item key not in events": (
        {"e.csv": GOOD, "i.csv": "id,c\n5,red\n"},
        {"events": "e.csv", "items": {"path": "i.csv", "key": "id"}},
        ["items.key", "no column 'id'"],
    ),
    "item key of another type": (
        {"e.csv": GOOD, "i.csv": "x,c\nfive,red\n"},
        {"events": "e.csv", "items": {"path": "i.csv", "key": "x"}},
        ["items.key", "one type"],
    ),
    "column in items and events": (
        {"e.csv": "user,time,x,c\n1,2020-01-01,5,a\n", "i.csv": "x,c\n5,red\n"},
        {"events": "e.csv", "items": {"path": "i.csv", "key": "x"}},
        ["both have a column 'c'"],
    ),
    "user twice": (
        {"e.csv": GOOD, "u.csv": "user,age\n1,3\n1,4\n"},
        {"events": "e.csv", "users": "u.csv"},
        ["data.source.users", "2 rows for the user 1"],
    ),
    "table name": ({"e.csv": GOOD}, {"events": "e.csv", "tables": {"a-b": "e.csv"}}, ["'a-b'", "letters"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_refused_with_place_and_remedy(case, tmp_path, monkeypatch):
    contents, config, words = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    for name, text in contents.items():
        write(tmp_path / name, text)
    with pytest.raises(UserError) as error:
        attach(files(tmp_path, **config))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def frame(**columns):
    return pd.DataFrame({"user": [1, 2], "time": [DAY, DAY], **columns})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Frames([1, 2]), ["expected a pandas frame", "list"]),
        (lambda: Frames(frame(), items=frame()), ["item_key"]),
        (lambda: Frames(frame(), columns={"user": "usr"}), ["columns.user", "did you mean 'user'"]),
        (lambda: Frames(frame(), time_unit="hours"), ["Frames: time_unit", "hours"]),
        (lambda: Frames(frame(x=[1.0, float("inf")])), ["events: the frame, row 2, column 'x'", "infinite"]),
        (lambda: Frames(frame(user=[1.5, 2])), ["row 1, column 'user'", "no whole number"]),
        (lambda: Frames(frame(user=[DAY, DAY])), ["user column", "whole numbers or text"]),
        (lambda: Frames(frame(time=[1.0, 2.0])), ["holds numbers", "time_unit"]),
        (lambda: Frames(frame(time=[True, False])), ["is BOOLEAN", "timestamp"]),
        (lambda: Frames(frame(), time_unit="s"), ["time_unit has no meaning"]),
        (lambda: Frames(pd.concat([frame(), frame()], axis=1)), ["the frame has two columns 'user'"]),
    ],
)
def test_bad_frames_are_refused(make, words):
    with pytest.raises(UserError) as error:
        attach(make())
    for word in words:
        assert word in str(error.value)


def test_infinity_in_a_parquet_file_names_file_and_row(tmp_path):
    for name, value in (("a", 1.0), ("b", float("-inf"))):
        table = pa.table({"user": [1, 2], "time": [DAY, DAY], "x": [0.0, value]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"b\.parquet, row 2, column 'x': the value '-inf' is infinite"):
        attach(files(tmp_path, events=str(tmp_path)))
