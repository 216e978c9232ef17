"""Which columns become inputs, by declaration or by type."""

from __future__ import annotations

import duckdb
import pytest

from supermoe.config import FieldConfig
from supermoe.data.fields import check_kind, choose_fields, stored_sql
from supermoe.typed_yaml import UserError

TYPES = {
    "user": "BIGINT",
    "time": "TIMESTAMP",
    "event": "VARCHAR",
    "item": "BIGINT",
    "price": "DOUBLE",
    "tax": "DECIMAL(18,3)",
    "tags": "VARCHAR[]",
    "day": "DATE",
    "color": "ENUM('a', 'b')",
    "ok": "BOOLEAN",
    "deep": "STRUCT(a INTEGER)",
    "file_order": "BIGINT",
}


def kinds(declared=None, num_event_types=1, types=TYPES):
    fields, _ = choose_fields(declared or {}, types, num_event_types)
    return {name: field.kind for name, field in fields.items()}


def test_kinds_follow_types_and_what_is_passed_over_is_said():
    wanted = {"item": "category", "price": "number", "tax": "number", "tags": "categories", "color": "category"}
    assert kinds() == {**wanted, "ok": "category"}
    _, notes = choose_fields({}, TYPES, 1)
    assert len(notes) == 2
    assert "'day' (DATE)" in notes[0]
    assert "'deep'" in notes[1]


def test_event_is_a_field_where_there_are_several_types_unless_told_otherwise():
    assert "event" in kinds(num_event_types=2)
    assert list(kinds({"item": FieldConfig(kind="category")}, 2)) == ["event", "item"]
    assert "event" not in kinds({"item": FieldConfig(kind="category"), "event": None}, 2)


def test_declared_fields_are_all_fields_and_null_takes_one_away():
    assert kinds({"item": FieldConfig(kind="number")}) == {"item": "number"}
    assert "item" not in kinds({"item": None})
    assert "price" in kinds({"item": None})


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"pric": "number"}, ["data.fields.pric", "did you mean 'price'"]),
        ({"color": "number"}, ["data.fields.color", "not a number"]),
        ({"tags": "category"}, ["data.fields.tags", "use categories"]),
        ({"item": "categories"}, ["data.fields.item", "use category"]),
    ],
)
def test_what_does_not_fit_is_refused(declared, words):
    with pytest.raises(UserError) as error:
        kinds({name: FieldConfig(kind=kind) for name, kind in declared.items()})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["a/b", "features", "my field"])
def test_names_that_cannot_be_files_are_refused(name):
    with pytest.raises(UserError, match="letters, digits"):
        kinds(types={name: "BIGINT"})


@pytest.mark.parametrize(
    ("value", "type_name", "kind", "stored"),
    [
        ("3", "SMALLINT", "category", 3),
        ("1.5", "FLOAT", "category", 1.5),
        ("'a'", "ENUM('a', 'b')", "category", "a"),
        ("12345678901234567890", "HUGEINT", "category", "12345678901234567890"),
        ("[1, NULL, 2]", "INTEGER[]", "categories", [1, 2]),
        ("NULL", "VARCHAR[]", "categories", None),
        ("2.5", "DECIMAL(5,1)", "number", 2.5),
    ],
)
def test_the_log_keeps_plain_values(value, type_name, kind, stored):
    sql = stored_sql("x", type_name, FieldConfig(kind=kind))
    found = duckdb.connect().execute(f"SELECT {sql} FROM (SELECT CAST({value} AS {type_name}) AS x)").fetchall()[0][0]
    assert found == stored
    assert kind == "number" or type(found) is type(stored)


def test_a_column_without_values_fits_every_kind():
    for kind in ("category", "categories", "number"):
        check_kind("x", '"NULL"', kind)
        sql = stored_sql("x", '"NULL"', FieldConfig(kind=kind))
        assert duckdb.connect().execute(f"SELECT {sql} FROM (SELECT NULL AS x)").fetchall() == [(None,)]
