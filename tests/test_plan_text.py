"""A plan that does not fit says so and what to do."""

from __future__ import annotations

from plans import config_of

from supermoe.studies.plan import make_plan
from supermoe.studies.plan_text import text_of


def test_advice_is_printed_where_it_is_needed() -> None:
    config = config_of("data.fields.item={kind: category, hash_size: 100000000}", "features={}", "model.layers=1")
    text = text_of(*make_plan(config, 2, "l4"))
    assert "DOES NOT FIT: 21 GiB of 22 may be used" in text
    assert "  distributed.shard_tables=100000 training.table_optimizer=rowwise_adagrad" in text
    assert "tables 4.9 B" in text
