from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from supermoe.config import FeatureConfig, MoEConfig, RunConfig, WindowLabel, load_run
from supermoe.typed_yaml import ALL_TIME, UserError, dump, validate

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


def test_tasks_and_features_that_are_null_are_left_out() -> None:
    found = config(tasks=RAW["tasks"] | {"spend": None}, features={"counts": None})
    assert set(found.tasks) == set(RAW["tasks"]) - {"spend"}
    assert found.features == {}


def test_the_store_lies_in_the_run_unless_it_is_named() -> None:
    assert config().store == Path("here/run/store")
    assert config(data=RAW["data"] | {"store": "shared/store"}).store == Path("shared/store")


def test_features_have_four_windows_and_none_are_derived_unless_asked_for() -> None:
    assert FeatureConfig().windows == [7 * 86400, 28 * 86400, 84 * 86400, ALL_TIME]
    assert not FeatureConfig().auto
    del (raw := dict(RAW))["features"]
    assert validate(RunConfig, raw, "test").features == {"auto": FeatureConfig(auto=True)}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({}, r"exactly one of sql, attribute, next \(got none\)"),
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
