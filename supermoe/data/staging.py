"""The raw log, checked and sorted by (user, time, file order), as views on one DuckDB connection with bounded memory.

Sorting is DuckDB's (`supermoe/data/sorting.py`); nothing is ever gathered into lists, which could not spill.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb

from supermoe.config import DataConfig, FieldConfig
from supermoe.data.fields import OWN_COLUMNS, check_kind, choose_fields, names_of_one_user, stored_sql, whole_names
from supermoe.data.numerals import suspect
from supermoe.data.sorting import NUMBERING, sort_log
from supermoe.data.sql import complaint, quote, text
from supermoe.data.tables import SourceTables
from supermoe.typed_yaml import UserError, format_instant, nearest


@dataclass(frozen=True)
class Staged:
    """Views on `con`, read from Parquet in the scratch folder when asked for:

    log(user_row BIGINT, position BIGINT, time TIMESTAMP, event VARCHAR, <raw columns>, row BIGINT), in (user_row,
        position) order; `row` = first_row of the user + position is the event's row in the store's columns
    log_sample: about 250,000 of these rows, for quantiles
    people(user_row BIGINT, "user" <own type>, first_row BIGINT, num_events BIGINT, <attributes>), one row per user, in
        user_row order, users without events included
    table_<name>(user_row BIGINT, time TIMESTAMP, <columns>)
    """

    con: duckdb.DuckDBPyConnection
    fields: dict[str, FieldConfig]  # the columns that become inputs, `event` included where there are several types
    column_types: dict[str, str]  # the log's columns but user_row, position, time, row -> DuckDB type
    attributes: list[str]  # columns of the users table
    tables: list[str]  # names of the label tables
    event_types: dict[str, int]  # type -> number of events
    num_users: int
    num_events: int
    first_time: int  # seconds UTC of the log's first event, 0 in an empty log
    last_time: int  # seconds UTC of its last event
    notes: tuple[str, ...]  # what the user should know


def connect(memory_limit: str, threads: int | None, scratch: Path) -> duckdb.DuckDBPyConnection:
    """A connection in UTC that keeps to `memory_limit` (such as 2GB) and spills into `scratch`."""
    con = duckdb.connect()
    con.execute("SET TimeZone = 'UTC'")
    con.execute("SET python_enable_replacements = false")
    con.execute(f"SET temp_directory = {text(str(scratch / 'spill'))}")
    con.execute("SET enable_external_file_cache = false")  # every file is read once; sorts need the memory
    con.execute("SET enable_progress_bar = true")
    con.execute("SET enable_progress_bar_print = false")
    try:
        con.execute(f"SET memory_limit = {text(memory_limit)}")
    except duckdb.Error as error:
        raise UserError(f"data.memory_limit: '{memory_limit}' is not a size such as 2GB: {complaint(error)}") from None
    if threads:
        con.execute(f"SET threads = {threads}")
    return con


def stage(
    con: duckdb.DuckDBPyConnection,
    source: SourceTables,
    config: DataConfig,
    scratch: Path,
    wanted: Collection[str] = (),
) -> Staged:
    """Sort the events of `source` and number its users; a `UserError` for an unknown field and for an empty log.

    `wanted`: columns that are inputs whatever they hold, as tasks, features or objectives name them.
    """
    event_types, num_events = _count(con, source.events)
    if not event_types:
        raise UserError("data.source: the events hold no rows; check the files and the `where` conditions.")
    whole = whole_names(con, source.events, config.fields, _types(con, source.events), wanted)
    if whole:
        casts = ", ".join(f"TRY_CAST({quote(name)} AS BIGINT) AS {quote(name)}" for name in whole)
        con.execute(f"CREATE TEMP VIEW whole_events AS SELECT * REPLACE ({casts}) FROM {quote(source.events)}")
        source = replace(source, events="whole_events")
    fields, notes = choose_fields(config.fields, _types(con, source.events), len(event_types))
    notes += [f"the column '{name}' names things by whole numbers, kept as floating-point ones" for name in whole]
    if source.num_null_users:
        notes.append(f"{source.num_null_users} rows without a user were left out (drop_null_users)")
    staged = _stage(con, source, fields, event_types, num_events, scratch, [*source.notes, *notes])
    _check_ids(con, source)
    inferred = [name for name in fields if name not in {*config.fields, "event"}]
    unasked = [name for name in inferred if name not in wanted and fields[name].kind == "category"]
    names = names_of_one_user(con, unasked)
    passed_over = [
        f"the column '{name}' names what belongs to one user, so it is no input; labels and features may use it in "
        f"their SQL, and data.fields may list it with all other inputs"
        for name in names
    ]
    texts = [name for name in inferred if name not in names and staged.column_types[name] == "VARCHAR"]
    return replace(
        staged,
        fields={name: field for name, field in fields.items() if name not in names},
        notes=(*staged.notes, *passed_over, *suspect(con, texts)),
    )


def stage_serving(
    con: duckdb.DuckDBPyConnection, source: SourceTables, fields: dict[str, FieldConfig], as_of: int, scratch: Path
) -> Staged:
    """Like `stage`, with a model's fields and only the events before `as_of` (seconds UTC); there may be none."""
    types = _types(con, source.events)
    for name, field in fields.items():
        if name not in types:
            have = types.keys() - set(OWN_COLUMNS)
            raise UserError(
                f"the events have no column '{name}', which the model reads; {nearest(name, have)} Where it is not "
                f"known any more, add it empty."
            )
        check_kind(name, types[name], field.kind)
    past = f"SELECT * FROM {quote(source.events)} WHERE time < make_timestamp({as_of * 1_000_000}::BIGINT)"
    con.execute(f"CREATE OR REPLACE TEMP VIEW past_events AS {past}")
    source = replace(source, events="past_events", tables={})
    staged = _stage(con, source, fields, *_count(con, "past_events"), scratch, [])
    if staged.num_users == 0:
        raise UserError(
            f"no user to serve: the events hold no rows before {format_instant(as_of)} and there is no users table; "
            f"check the date and the files."
        )
    return staged


def _stage(
    con: duckdb.DuckDBPyConnection,
    source: SourceTables,
    fields: dict[str, FieldConfig],
    event_types: dict[str, int],
    num_events: int,
    scratch: Path,
    notes: list[str],
) -> Staged:
    try:
        _sort(con, source, fields, event_types, num_events, scratch)
        attributes = _make_people(con, source.users)
    except (duckdb.ConversionException, duckdb.InvalidInputException) as error:
        raise UserError(f"data.source: a file does not hold what its first rows promise: {complaint(error)}") from None
    for name, view in source.tables.items():
        columns = ", ".join(f"t.{quote(column)}" for column in _types(con, view) if column != "user")
        rows = f'SELECT people.user_row, {columns} FROM {quote(view)} AS t JOIN people ON t."user" = people."user"'
        path = text(str(scratch / f"table_{name}.parquet"))
        con.execute(f"COPY ({rows} ORDER BY user_row, t.time) TO {path} (FORMAT parquet)")
        con.execute(f"CREATE OR REPLACE VIEW {quote('table_' + name)} AS SELECT * FROM read_parquet({path})")
    num_users = _rows(con, "SELECT count(*) FROM people")[0][0]
    first, last = _rows(con, "SELECT epoch_us(min(time)), epoch_us(max(time)) FROM log")[0]
    return Staged(
        con=con,
        fields=fields,
        column_types={name: kind for name, kind in _types(con, "log").items() if name not in NUMBERING},
        attributes=attributes,
        tables=list(source.tables),
        event_types=event_types,
        num_users=num_users,
        num_events=num_events,
        first_time=(first or 0) // 1_000_000,
        last_time=(last or 0) // 1_000_000,
        notes=tuple(notes),
    )


def _check_ids(con: duckdb.DuckDBPyConnection, source: SourceTables) -> None:
    """Refuse a further table that knows none of the log's users: their ids are written in two ways."""
    views = {"users": source.users} if source.users else {}
    for name, view in (views | {f"tables.{name}": view for name, view in source.tables.items()}).items():
        if not _rows(con, f'SELECT 1 FROM active SEMI JOIN {quote(view)} USING ("user") LIMIT 1'):
            ids = [_rows(con, f'SELECT min("user") FROM {rows}')[0][0] for rows in (quote(view), "active")]
            raise UserError(
                f"data.source.{name}: none of its users has an event; its first id is {ids[0]!r}, that of the events "
                f"{ids[1]!r}. Write ids alike, or leave the table out."
            )


def _count(con: duckdb.DuckDBPyConnection, events: str) -> tuple[dict[str, int], int]:
    """Number of events of each type, and of all, those without a type included."""
    counts = _rows(con, f"SELECT event, count(*) FROM {quote(events)} GROUP BY event ORDER BY event")
    return {event: count for event, count in counts if event is not None}, sum(count for _, count in counts)


def _rows(con: duckdb.DuckDBPyConnection, sql: str) -> list[tuple]:
    return con.execute(sql).fetchall()


def _types(con: duckdb.DuckDBPyConnection, view: str) -> dict[str, str]:
    return {row[0]: row[1] for row in _rows(con, f"DESCRIBE {quote(view)}")}


def _make_people(con: duckdb.DuckDBPyConnection, users: str | None) -> list[str]:
    """Make the table people of the log's users and those of the view `users`; returns the names of the attributes."""
    attributes: list[str] = []
    rows = "active"
    if users:
        attributes = [name for name in _types(con, users) if name != "user"]
        rows = (
            'SELECT "user", coalesce(num_events, 0) AS num_events, u.* EXCLUDE ("user") '
            f'FROM active FULL JOIN {users} AS u USING ("user")'
        )
    con.execute(
        f"""
        CREATE OR REPLACE TABLE people AS
        SELECT row_number() OVER (ORDER BY "user") - 1 AS user_row, "user",
               CAST(sum(num_events) OVER (ORDER BY "user" ROWS UNBOUNDED PRECEDING) - num_events AS BIGINT)
                   AS first_row,
               * EXCLUDE ("user")
        FROM ({rows}) ORDER BY "user"
        """
    )
    return attributes


def _sort(
    con: duckdb.DuckDBPyConnection,
    source: SourceTables,
    fields: dict[str, FieldConfig],
    event_types: dict[str, int],
    num_events: int,
    scratch: Path,
) -> None:
    """Make the views over the log in (user, time, file order)."""
    types = _types(con, source.events)
    rows = f"FROM {quote(source.events)}"
    if "file_order" not in types:
        rows = f"SELECT *, row_number() OVER () AS file_order {rows}"
    columns = {name: stored_sql(name, types[name], fields.get(name)) for name in types if name not in OWN_COLUMNS}
    constants = dict(zip(["event"], event_types, strict=False)) if [*event_types.values()] == [num_events] else {}
    if constants:
        del columns["event"]
    else:
        known_types = ", ".join(map(text, event_types)) or text("none")
        columns["event"] = f"CAST(event AS ENUM ({known_types}))"  # a byte to sort, not a text
    sort_log(con, rows, columns, constants, types["user"], num_events, source.users, scratch)
