from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from supermoe.config import FeatureConfig, MoEConfig, RunConfig, WindowLabel, load_run, windows_around
from supermoe.typed_yaml import UserError, dump, format_duration, parse_duration, validate

RAW = tiny.make_config(Path("here")).model_dump(mode="json")


def config(**sections: Any) -> RunConfig:
    return validate(RunConfig, RAW | sections, "test")


def test_a_dumped_config_loads_back_equal(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(config()))
    assert load_run(tmp_path / "config.yaml") == config()


def test_a_kind_alone_is_a_field_and_null_takes_a_column_out() -> None:
    fields = config(data=RAW["data"] | {"fields": {"type": "category", "value": None}}).data.fields
    assert fields["type"] is not None
    assert (fields["type"].kind, fields["type"].hash_size) == ("category", None)
    assert fields["value"] is None


def test_splits_are_in_time_where_nothing_else_is_said() -> None:
    splits = config(data=RAW["data"] | {"splits": {"valid": "2024-05-06"}}).data.splits
    assert (splits.type, splits.valid) == ("time", 1_714_953_600)


def test_tasks_and_features_that_are_null_are_left_out() -> None:
    found = config(tasks=RAW["tasks"] | {"spend": None}, features={"counts": None})
    assert set(found.tasks) == set(RAW["tasks"]) - {"spend"}
    assert found.features == {}


def test_the_store_lies_in_the_run_unless_it_is_named() -> None:
    assert config().store == Path("here/run/store")
    assert config(data=RAW["data"] | {"store": "shared/store"}).store == Path("shared/store")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], "7d 28d 56d 112d all"),
        (["28d"], "7d 28d 56d 112d all"),
        (["365d", "365d"], "91d 365d 730d 1460d all"),
        (["7d", "28d"], "1d 7d 28d 56d 112d all"),
        (["5d"], "1d 5d 10d 20d 28d all"),
        (["1h"], "15m 1h 2h 4h 7d 28d all"),
        (["1s"], "1s 2s 4s 7d 28d all"),
    ],
)
def test_windows_of_features_lie_around_those_of_the_labels(labels: list[str], expected: str) -> None:
    assert " ".join(map(format_duration, windows_around(set(map(parse_duration, labels))))) == expected


def test_groups_without_windows_get_them_from_the_tasks() -> None:
    churn = {"type": "binary", "label": {"window": "90d", "sql": "false", "empty": True}}
    features = {"mine": {"sql": {"n": "count(*)"}}, "other": {"windows": ["3d"], "sql": {"n": "count(*)"}}}
    groups = config(tasks={"churn": churn}, features=features).features
    found = {name: [format_duration(window) for window in group.windows] for name, group in groups.items()}
    assert found == {"mine": ["22d", "90d", "180d", "360d", "all"], "other": ["3d"]}


def test_no_features_are_derived_unless_asked_for() -> None:
    assert not FeatureConfig().auto
    del (raw := dict(RAW))["features"]
    assert validate(RunConfig, raw, "test").features.keys() == {"auto"}
    assert validate(RunConfig, raw, "test").features["auto"].auto


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({}, r"exactly one of `sql: AGGREGATE`.*next event \(got none\)"),
        ({"sql": "count(*)", "next": "type", "window": "7d"}, r"exactly one .* \(got sql, next\)"),
        ({"sql": "count(*)"}, "a label with sql needs a window"),
        ({"sql": "count(*)", "window": "all"}, "a label window must end"),
        ({"attribute": "age", "min_share": 1.0}, "min_share: .*less than 1"),
    ],
)
def test_labels_that_say_nothing_or_two_things(label: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(WindowLabel, label, "label")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tasks": {}}, "at least one task is needed"),
        ({"tasks": {"a-b": RAW["tasks"]["churn"]}}, "'a-b': names of tasks and features may hold letters"),
        ({"features": {"a b": {}}}, "'a b': names of tasks and features"),
        ({"model": {"dim": 20, "heads": 4}}, r"dim \(20\) must be a multiple of 4 \* heads \(4\)"),
        ({"model": {"moe": {"experts": 2, "top_k": 3}}}, r"model\.moe: top_k \(3\) cannot exceed experts \(2\)"),
        ({"training": {"betas": [0.9]}}, r"training\.betas"),
    ],
)
def test_keys_that_do_not_go_together(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**sections)


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        MoEConfig().top_k = 1
