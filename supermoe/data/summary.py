"""What a store holds, in numbers: kept as summary.json and printed by `prepare`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from supermoe.data.schema import PADDING, UNKNOWN, Schema
from supermoe.data.splits import Plan
from supermoe.data.staging import Staged
from supermoe.data.store import StoreWriter
from supermoe.typed_yaml import format_instant

BLOCK_ROWS = 4_000_000
MOSTLY_UNKNOWN = 0.5  # share of unknown values that is spoken of


def summarise(
    staged: Staged,
    writer: StoreWriter,
    schema: Schema,
    plan: Plan,
    num_duplicates: int,
    examples: dict[str, Any],
    audit: list[str],
) -> dict[str, Any]:
    """Counts of users and events, per field its size and share of unknown ids, and what examples and audit report."""
    limit = plan.cuts["train"][-1] if plan.cuts else None
    fields = {name: _field(writer, name, schema, limit) for name in schema.fields}
    return {
        "users": staged.num_users,
        "events": staged.num_events,
        "first_event": format_instant(staged.first_time),
        "last_event": format_instant(staged.last_time),
        "event_types": staged.event_types,
        "duplicates": num_duplicates,
        "notes": [*staged.notes, *_strangers(fields)],
        "fields": fields,
        **examples,
        "audit": audit,
    }


def _field(writer: StoreWriter, name: str, schema: Schema, limit: int | None) -> dict[str, Any]:
    """Kind, size, and shares of missing and unknown values, up to the last training cut `limit` and later."""
    field = schema.fields[name]
    found: dict[str, Any] = {"kind": field.kind} | ({"size": field.size} if field.size else {})
    if field.kind == "categories":
        return found | {"unknown": _unknown_items(writer, name)}
    counts = np.zeros((3, 2), np.int64)  # rows, missing, unknown; up to the limit and later
    for values, time in zip(
        writer.blocks(f"events/{name}", BLOCK_ROWS), writer.blocks("events/time", BLOCK_ROWS), strict=True
    ):
        later = np.zeros(len(time), bool) if limit is None else time >= limit
        missing = np.isnan(values) if field.kind == "number" else values == PADDING
        unknown = np.zeros(len(time), bool) if field.kind == "number" else values == UNKNOWN
        for row, mark in enumerate((np.ones(len(time), bool), missing, unknown)):
            counts[row] += [np.count_nonzero(mark & ~later), np.count_nonzero(mark & later)]
    shares = counts[1:] / np.maximum(counts[0], 1)
    periods = ("all",) if limit is None else ("train", "later")
    for kind, row in zip(("missing",) if field.kind == "number" else ("missing", "unknown"), shares, strict=False):
        found[kind] = {period: round(float(share), 6) for period, share in zip(periods, row, strict=False)}
    return found


def _strangers(fields: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Notes on categories most of whose values are met only once training is over."""
    for name, field in fields.items():
        unknown = field["unknown"].get("later", 0) if isinstance(field.get("unknown"), dict) else 0
        if unknown > MOSTLY_UNKNOWN:
            yield (
                f"the field '{name}' is a category, but {unknown:.0%} of its values after the last training cut are "
                f"unknown: if it is a quantity, list it as a number under data.fields, where all inputs then stand; if "
                f"a name that hardly recurs, give data.fields.{name}: null"
            )


def _unknown_items(writer: StoreWriter, name: str) -> float:
    """Share of unknown ids among the items of a list field."""
    found = np.zeros(2, np.int64)
    for ids in writer.blocks(f"events/{name}", BLOCK_ROWS):
        found += np.array([len(ids), np.count_nonzero(ids == UNKNOWN)])
    return round(float(found[1] / max(found[0], 1)), 6)


def render(summary: dict[str, Any]) -> str:
    """The summary as text for people."""
    types = ", ".join(f"{name} {count:,}" for name, count in summary["event_types"].items())
    lines = [
        f"users     {summary['users']:,}",
        f"events    {summary['events']:,} from {summary['first_event']} to {summary['last_event']} ({types})",
        f"repeated  {summary['duplicates']:,} rows equal another of their user and time (kept)",
        *(f"note      {note}" for note in summary["notes"]),
        *(f"field     {name}: {_describe(field)}" for name, field in summary["fields"].items()),
        *(f"cuts      {split}: {', '.join(cuts)}" for split, cuts in summary["cuts"].items()),
        "examples  " + ", ".join(f"{split} {count:,}" for split, count in summary["examples"].items()),
        *(f"label     {task}: {_describe(found)}" for task, found in summary["labels"].items()),
        f"audit     no leak found: {', '.join(summary['audit'])}",
    ]
    return "\n".join(lines)


def _describe(value: Any) -> str:
    """Nested numbers on one line."""
    if isinstance(value, dict):
        parts = [
            f"{key} ({_describe(item)})" if isinstance(item, dict) else f"{key} {_describe(item)}"
            for key, item in value.items()
        ]
        return ", ".join(parts)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
