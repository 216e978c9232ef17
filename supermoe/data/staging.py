"""STUB with final signatures: the raw log, checked and sorted by (user, time, file order), as views on one connection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb

from supermoe.config import DataConfig, FieldConfig


@dataclass(frozen=True)
class Staged:
    """Views on `con` (all lazily read from Parquet, none in memory):

    log(user_row BIGINT, position BIGINT, time TIMESTAMP, event VARCHAR, <raw columns>) in (user_row, position) order,
        with `row` BIGINT = people.first_row + position beside them (the row of the event in the store's columns)
    people(user_row BIGINT, "user" <own type>, first_row BIGINT, num_events BIGINT, <attributes>) ordered by user_row
    table_<name>(user_row BIGINT, time TIMESTAMP, <columns>)
    """

    con: duckdb.DuckDBPyConnection
    folder: Path  # scratch folder of the store under construction (may hold spill files)
    fields: dict[str, FieldConfig]  # the event columns that become inputs, `event` included where there are several types
    column_types: dict[str, str]  # every raw column of `log` (user_row, position, row, time left out) -> DuckDB type
    attributes: list[str]  # columns of the users table
    tables: list[str]  # names N of the views table_N
    event_types: list[str]  # sorted
    num_users: int
    num_events: int
    first_time: int  # seconds UTC of the log's first event
    last_time: int  # seconds UTC of its last one


def connect(memory_limit: str, threads: int | None, scratch: Path) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection in UTC with bounded memory that spills into `scratch`."""
    raise NotImplementedError


def stage(con: duckdb.DuckDBPyConnection, tables, config: DataConfig, folder: Path) -> Staged:
    """`tables`: SourceTables."""
    raise NotImplementedError
