from __future__ import annotations

import json

import pytest
from factories import make_schema

from supermoe.data.schema import FIRST_ID, PADDING, UNKNOWN, Schema
from supermoe.typed_yaml import UserError, validate


def test_a_saved_schema_loads_back_equal_and_in_order() -> None:
    schema = make_schema()
    again = validate(Schema, json.loads(schema.model_dump_json()), "schema.json")
    assert again == schema
    assert list(again.fields) == list(schema.fields)


def test_reserved_ids_come_first() -> None:
    assert (PADDING, UNKNOWN, FIRST_ID) == (0, 1, 2)


def test_a_schema_of_another_make_is_refused() -> None:
    raw = {**make_schema().model_dump(mode="json"), "filds": {}}
    with pytest.raises(UserError, match=r"schema\.json: filds: unknown key, did you mean 'fields'"):
        validate(Schema, raw, "schema.json")
