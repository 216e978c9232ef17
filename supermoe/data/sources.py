"""Where a log comes from: files named in the config, frames handed over in Python, or a named data set.

A source has `attach(con) -> SourceTables`, which makes views in our column names, and `fingerprint()`, which changes
with the content (None: never reuse a store). Named data sets are in `supermoe/data/datasets.py` and `synthetic.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import duckdb
from pydantic import Field, field_validator

from supermoe import typed_yaml
from supermoe.data.datasets import CompleteJourney, MovieLens
from supermoe.data.opening import CsvReading, Raw, find_files, open_files, open_frame
from supermoe.data.reading import Columns, TimedColumns
from supermoe.data.synthetic import Synthetic
from supermoe.data.tables import EventTable, ItemTable, SourceTables, attach
from supermoe.typed_yaml import UserError, nearest, validate


class EventFiles(TimedColumns, CsvReading):
    """One set of event files; `event` is the type of its rows where no column says so."""

    path: str
    event: str | None = None


class TableFiles(TimedColumns, CsvReading):
    """Files of a further table with a user and a time, to take labels from."""

    path: str


class UserFiles(Columns, CsvReading):
    """Files with one row per user."""

    path: str


class ItemFiles(Columns, CsvReading):
    """Files with one row per item, joined onto the events by `key`."""

    path: str
    key: str


def _as_mapping(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Files:
    """Parquet and CSV files: paths, globs or folders, relative to where the command is run."""

    class Config(typed_yaml.Config):
        type: str = "files"
        events: list[EventFiles] = Field(min_length=1)
        users: UserFiles | None = None
        items: ItemFiles | None = None
        tables: dict[str, TableFiles] = Field(default_factory=dict)
        drop_null_users: bool = False  # leave out rows without a user instead of refusing them

        @field_validator("events", mode="before")
        @classmethod
        def _one_or_many(cls, value: Any) -> Any:
            return [_as_mapping(item) for item in value] if isinstance(value, list) else [_as_mapping(value)]

        @field_validator("users", "items", mode="before")
        @classmethod
        def _path(cls, value: Any) -> Any:
            return _as_mapping(value)

        @field_validator("tables", mode="before")
        @classmethod
        def _paths(cls, value: Any) -> Any:
            return {name: _as_mapping(item) for name, item in value.items()} if isinstance(value, dict) else value

    def __init__(self, config: Files.Config):
        self.config = config

    def attach(self, con: duckdb.DuckDBPyConnection) -> SourceTables:
        """Make the views; everything wrong with the files is a `UserError`."""
        config = self.config
        events = [EventTable(_open(con, item, key), item, item.event) for key, item in _numbered(config.events)]
        users = (_open(con, config.users, "users"), config.users) if config.users else None
        items = ItemTable(_open(con, config.items, "items"), config.items, config.items.key) if config.items else None
        tables = {name: (_open(con, item, f"tables.{name}"), item) for name, item in config.tables.items()}
        return attach(con, events, users, items, tables, config.drop_null_users)

    def fingerprint(self) -> Any:
        """Name, size and time of change of every file."""
        config = self.config
        parts: list[tuple[str, Any]] = list(_numbered(config.events))
        parts += [(f"tables.{name}", item) for name, item in config.tables.items()]
        parts += [(name, item) for name, item in (("users", config.users), ("items", config.items)) if item]
        names = [name for key, item in parts for name in find_files(item.path, f"data.source.{key}")]
        return [[name, os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in names]


def _numbered(events: list[EventFiles]) -> list[tuple[str, EventFiles]]:
    return [(f"events[{number}]", item) for number, item in enumerate(events)]


def _open(con: duckdb.DuckDBPyConnection, item: Any, place: str) -> Raw:
    time_column = item.columns.get("time", "time") if isinstance(item, TimedColumns) else None
    reading = CsvReading(decimal=item.decimal, nulls=item.nulls)
    return open_files(con, item.path, f"data.source.{place}", time_column, reading)


class Frames:
    """pandas frames, Arrow tables or DuckDB relations, from Python.

    `events`: one frame, or event type -> frame. Optional: `users`, `items` (with `item_key`), `tables` (name -> frame).
    `columns` maps our names to the frames' own ("user", "time", and any other), where a frame has them.

    >>> Frames(events=frame, columns={"user": "customer_id", "time": "ts"})
    """

    def __init__(
        self,
        events: Any,
        users: Any = None,
        items: Any = None,
        tables: Mapping[str, Any] | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        item_key: str | None = None,
        time_zone: str | None = None,
        time_unit: Any = None,
        time_format: str | None = None,
        drop_null_users: bool = False,
    ):
        self.events = dict(events) if isinstance(events, Mapping) else {None: events}
        self.users, self.items, self.tables = users, items, dict(tables or {})
        self.columns, self.item_key = dict(columns or {}), item_key
        self.timed = {"time_zone": time_zone, "time_unit": time_unit, "time_format": time_format}
        self.drop_null_users = drop_null_users
        if (items is None) != (item_key is None):
            raise UserError(
                "Frames: items and item_key go together: the items table is joined onto the events by that column."
            )

    def attach(self, con: duckdb.DuckDBPyConnection) -> SourceTables:
        """Make the views; everything wrong with the frames is a `UserError`."""
        events = []
        for event, frame in self.events.items():
            raw, config = self._open(con, frame, "events" if event is None else f"events.{event}", TimedColumns)
            events.append(EventTable(raw, config, event))
        users = None if self.users is None else self._open(con, self.users, "users", Columns)
        items = None
        if self.items is not None:
            items = ItemTable(*self._open(con, self.items, "items", Columns), str(self.item_key))
        tables = {name: self._open(con, frame, f"tables.{name}", TimedColumns) for name, frame in self.tables.items()}
        raws = [table.raw for table in events] + [raw for raw, _ in tables.values()]
        raws += ([users[0]] if users else []) + ([items.raw] if items else [])
        for ours, theirs in self.columns.items():
            if not any(theirs in raw.types for raw in raws):
                have = {name for raw in raws for name in raw.types}
                raise UserError(f"columns.{ours}: no frame has a column '{theirs}', {nearest(theirs, have)}")
        return attach(con, events, users, items, tables, self.drop_null_users)

    def _open(self, con: duckdb.DuckDBPyConnection, frame: Any, key: str, model: type[Columns]) -> tuple[Raw, Any]:
        raw = open_frame(con, frame, f"frame_{key}", key)
        columns = {ours: theirs for ours, theirs in self.columns.items() if theirs in raw.types}
        timed = self.timed if model is TimedColumns else {}
        return raw, validate(model, {"columns": columns, **timed}, "Frames")

    def fingerprint(self) -> None:
        """Frames are not remembered: a store made of them is prepared anew."""
        return None


REGISTRY = {"files": Files, "complete_journey": CompleteJourney, "movielens": MovieLens, "synthetic": Synthetic}
