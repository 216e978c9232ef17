"""Configs for tests of the plan: small enough to run, unlike one another."""

from __future__ import annotations

from typing import Any

from supermoe.config import RunConfig
from supermoe.typed_yaml import apply_override, validate

CHURN = {"type": "binary", "label": {"window": "28d", "sql": "count(*) = 0", "empty": True}}
SEGMENT = {"type": "multiclass", "label": {"attribute": "segment"}}
NEXT = {"type": "next_item", "label": {"next": "item", "window": "28d"}}

FULL: dict[str, Any] = {  # features, bags, a list field, full softmax
    "run": "runs/plan",
    "data": {
        "source": {"type": "files", "events": "log.parquet"},
        "splits": {"type": "time"},
        "fields": {
            "item": {"kind": "category", "max_size": 3000},
            "price": "number",
            "tags": {"kind": "categories", "max_size": 50},
        },
    },
    "features": {"counts": {"windows": ["7d", "28d"], "sql": {"n": "count(*)"}, "bag": ["tags"]}},
    "tasks": {"churn": CHURN, "segment": SEGMENT},
    "model": {"dim": 48, "layers": 2, "heads": 2, "max_events": 32, "moe": {"experts": 8}},
    "training": {"tokens_per_batch": 768},
}
VARIANTS: dict[str, list[str]] = {
    "full softmax, features": [],
    "16 bits, many experts, large table by row": [
        "data.fields.item={kind: category, hash_size: 30000}",
        "features={}",
        "model.activation=swiglu",
        "model.dim=64",
        "model.moe={experts: 32, top_k: 2, hidden: 96, shared_hidden: 32}",
        "training.table_optimizer=rowwise_adagrad",
        "training.precision=bf16",
    ],
    "deep, few experts, accumulated": [
        "tasks={next: {type: next_item, label: {next: item, window: 28d}, negatives: 64}}",
        "features={}",
        "model.layers=4",
        "model.dense_layers=2",
        "training.accumulate=2",
        "training.ema=null",
    ],
}


def config_of(*overrides: str) -> RunConfig:
    """`FULL` with overrides laid over it."""
    raw = FULL
    for text in overrides:
        raw = apply_override(raw, text)
    return validate(RunConfig, raw, "test")
