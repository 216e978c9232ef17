"""Sizes without data: from the config's fields, or from a store."""

from __future__ import annotations

import pytest
import torch
from plans import config_of

from supermoe.studies.plan_model import blueprint, count, schema_of
from supermoe.typed_yaml import UserError


def test_sizes_come_from_the_config() -> None:
    schema = schema_of(config_of())
    assert {name: field.size for name, field in schema.fields.items()} == {"item": 3002, "price": 0, "tags": 52}
    assert schema.features == ["counts_n_7d", "counts_n_28d"]
    assert schema.bags["counts_tags_7d"].size == 52
    assert {name: label.kind for name, label in schema.labels.items()} == {"churn": "number", "segment": "class"}


def test_counts_add_up_and_take_no_memory() -> None:
    config = config_of()
    model = blueprint(config, schema_of(config)).model
    counts = count(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.experts == 8 * 2 * 48 * 96
    assert counts.tables["embedding.tables.item_.weight"] == 3002 * 48
    assert counts.tables["heads.next_event__item_.bias"] == 3002
    whole = blueprint(config, schema_of(config), "cpu").model
    assert torch.tensor([p.numel() for p in whole.parameters()]).sum() == counts.total


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("data.fields={item: null, price: null, tags: null}", "data.fields"),
        ("features={auto: {auto: true}}", r"features\.auto=null.*supermoe\.prepare"),
    ],
)
def test_what_only_the_log_knows_is_asked_for(override: str, place: str) -> None:
    with pytest.raises(UserError, match=place):
        schema_of(config_of(override))
