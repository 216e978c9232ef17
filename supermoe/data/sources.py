"""Where a log comes from: files, Python frames, named data sets. Each source attaches canonical views to a DuckDB connection."""

from __future__ import annotations

from dataclasses import dataclass, field

import duckdb


@dataclass(frozen=True)
class SourceTables:
    """Names of the views that a source attached.

    events(user, time TIMESTAMP, event VARCHAR, <columns>, file_order BIGINT); users(user, <attributes>) or None;
    tables: name -> view(user, time TIMESTAMP, <columns>).
    """

    events: str
    users: str | None = None
    tables: dict[str, str] = field(default_factory=dict)


def connect(memory_limit: str, threads: int | None, scratch) -> duckdb.DuckDBPyConnection:
    """STUB (moves to staging.connect)."""
    raise NotImplementedError


REGISTRY: dict = {}
