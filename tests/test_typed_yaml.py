"""Durations, instants, seats, overrides, and the wording of config errors."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from supermoe import typed_yaml
from supermoe.typed_yaml import ALL_TIME, Config, UserError


class Inner(Config):
    width: int = 4
    rate: float = 1e-3


class Outer(Config):
    name: str
    inner: Inner = Inner()
    table: dict[str, Inner] = Field(default_factory=dict)


def write(tmp_path, text, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


@given(st.integers(1, 10**9))
def test_a_formatted_duration_reads_back_equal(seconds):
    assert typed_yaml.parse_duration(typed_yaml.format_duration(seconds)) == seconds


def test_durations_and_the_unbounded_window():
    assert typed_yaml.parse_duration("28d") == 28 * 86400
    assert typed_yaml.parse_duration("all") == ALL_TIME
    assert typed_yaml.format_duration(ALL_TIME) == "all"
    for bad in ("28", "0d", "d", "-1d", True, 0, "1 month"):
        with pytest.raises(ValueError, match="duration"):
            typed_yaml.parse_duration(bad)


@given(st.integers(0, 4 * 10**9))
def test_a_formatted_instant_reads_back_equal(seconds):
    assert typed_yaml.parse_instant(typed_yaml.format_instant(seconds)) == seconds


def test_instants_are_utc_unless_they_carry_a_zone():
    midnight = 1509840000
    assert typed_yaml.parse_instant("2017-11-05") == midnight
    assert typed_yaml.parse_instant(dt.date(2017, 11, 5)) == midnight
    assert typed_yaml.parse_instant("2017-11-05T01:00:00+01:00") == midnight
    for bad in ("05.11.2017", "soon", 1.5, False):
        with pytest.raises(ValueError, match="date"):
            typed_yaml.parse_instant(bad)


def test_extends_and_overrides_merge_in_order(tmp_path):
    write(tmp_path, "name: base\ninner: {width: 8}\ntable: {a: {width: 1}, b: {width: 2}}", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\nname: child\ntable: {b: {rate: 0.5}}")
    config = typed_yaml.load(Outer, path, ["inner.rate=1e-2", "table.a.width=7"])
    assert config == Outer(
        name="child", inner=Inner(width=8, rate=0.01), table={"a": Inner(width=7), "b": Inner(width=2, rate=0.5)}
    )


def test_the_resolved_config_loads_back_equal(tmp_path):
    config = Outer(name="x", inner=Inner(width=3), table={"a": Inner(rate=2.5e-4)})
    assert typed_yaml.load(Outer, write(tmp_path, typed_yaml.dump(config))) == config


def test_another_type_replaces_a_component_instead_of_merging():
    assert typed_yaml.merge({"r": {"type": "a", "x": 1}}, {"r": {"type": "b"}}) == {"r": {"type": "b"}}
    assert typed_yaml.merge({"r": {"type": "a", "x": 1}}, {"r": {"y": 2}}) == {"r": {"type": "a", "x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\ninner: {widht: 3}", "inner.widht: unknown key, did you mean 'width'?"),
        ("name: x\ntable: {a: {widht: 3}}", "table.a.widht: unknown key, did you mean 'width'?"),
        ("inner: {width: 3}", "name: is required"),
        ("name: x\ninner: {width: wide}", "inner.width"),
        ("name: x\ninner: {rate: .nan}", "inner.rate"),
        ("name: x\nname: y", "line 2, column 1: not valid YAML: key 'name' given twice"),
        ("name: [x", "not valid YAML"),
        ("- x", "must be a mapping"),
        ("extends: c.yaml", "goes in a circle"),
        ("extends: missing.yaml", "cannot read config file"),
    ],
)
def test_errors_name_the_place_and_the_remedy(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        typed_yaml.load(Outer, write(tmp_path, text))
    assert message in str(caught.value)


@pytest.mark.parametrize("override", ["inner.width", "=3", "inner..width=3", "inner.width=[1"])
def test_malformed_overrides_are_refused(tmp_path, override):
    with pytest.raises(UserError, match="override"):
        typed_yaml.load(Outer, write(tmp_path, "name: x"), [override])


def test_scientific_notation_is_a_number(tmp_path):
    assert typed_yaml.load(Outer, write(tmp_path, "name: x\ninner: {rate: 1e-4}")).inner.rate == 1e-4


def test_a_component_is_found_by_import_path():
    assert typed_yaml.resolve("supermoe.model.routers", f"{Inner.__module__}:Inner").__name__ == "Inner"
    with pytest.raises(ValueError, match="cannot import"):
        typed_yaml.resolve("supermoe.model.routers", "no_such_module:Thing")


def test_a_date_that_does_not_exist_is_left_to_its_key():
    assert typed_yaml.read_yaml("a: 2017-13-01", "here") == {"a": "2017-13-01"}
    assert typed_yaml.read_yaml("a: 2017-11-05", "here") == {"a": dt.date(2017, 11, 5)}


def test_the_nearest_choice_or_all_of_them_or_none():
    assert typed_yaml.nearest("chrun", ["churn", "spend"]) == "did you mean 'churn'?"
    assert typed_yaml.nearest("xyz", {"b": 1, "a": 2}) == "expected one of: a, b"
    assert typed_yaml.nearest("xyz", []) == "there is none at all"
