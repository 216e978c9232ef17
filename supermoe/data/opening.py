"""Files, globs, folders and Python frames -> tables that DuckDB can scan in the file's order, with their columns."""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import duckdb
from pydantic import Field

from supermoe.data.sql import EMPTY, complaint, quote, text
from supermoe.typed_yaml import Config, UserError

PARQUET, CSV = (".parquet", ".pq"), (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst")
DELIMITERS = (",", ";", "\t", "|")
SNIFFED = 20_480  # rows of a CSV file that DuckDB takes the types from
WHOLE_LINES = "header=false, auto_detect=false, delim='\x01', quote='', escape='', columns={'line': 'VARCHAR'}"


class CsvReading(Config):
    """What the values of a CSV file look like."""

    decimal: Literal[".", ","] = "."
    nulls: list[str] = Field(default_factory=list)  # what stands for nothing, beside the empty text


@dataclass(frozen=True)
class Raw:
    """A table as it was found. `scan` reads its columns; `ordered` also file_order and file_name.

    file_order BIGINT rises from row to row and file to file; it is below `num_rows` where that is known.
    """

    key: str  # of the config, for messages
    place: str  # path or frame, for messages
    scan: str
    ordered: str
    types: dict[str, str]  # column -> DuckDB type
    num_rows: int | None = None  # None: not without reading them
    has_statistics: bool = False  # least and greatest values are known without reading the rows


def find_files(path: str, key: str) -> list[str]:
    """Files of a path, glob or folder, sorted; all Parquet or all CSV."""
    expanded = str(Path(path).expanduser())
    if Path(expanded).is_dir():
        files = [
            str(file)
            for file in Path(expanded).rglob("*")
            if file.is_file() and file.name.lower().endswith(PARQUET + CSV)
        ]
        missing = f"the folder {path} holds no Parquet or CSV file"
    else:
        files = [name for name in glob.glob(expanded, recursive=True) if Path(name).is_file()]
        missing = f"no file matches {path}" if glob.has_magic(expanded) else f"the file {path} does not exist"
    if not files:
        raise UserError(f"{key}: {missing}; relative paths start at the folder the command is run in, {Path.cwd()}.")
    if len({_is_parquet(name, key) for name in files}) > 1:
        raise UserError(f"{key}: {path} mixes Parquet and CSV files; give two entries, such as {path}/*.parquet.")
    for name in files:
        if Path(name).stat().st_size == 0:
            raise UserError(
                f"{key}: the file {name} is empty (0 bytes); write it again or leave it out of the pattern."
            )
    return sorted(files)


def _is_parquet(name: str, key: str) -> bool:
    if not name.lower().endswith(PARQUET + CSV):
        raise UserError(f"{key}: {name} has an unknown ending; expected one of {', '.join(PARQUET + CSV)}.")
    return name.lower().endswith(PARQUET)


def open_files(
    con: duckdb.DuckDBPyConnection,
    path: str,
    key: str,
    time_column: str | None = None,
    reading: CsvReading | None = None,
) -> Raw:
    """Look at the columns of a file set; in CSV the column `time_column` is left as text, for us to read."""
    files = find_files(path, key)
    is_parquet = _is_parquet(files[0], key)
    reading = reading or CsvReading()
    if is_parquet:
        if reading != CsvReading():
            raise UserError(f"{key}: decimal and nulls are for CSV, but {path} is Parquet; remove them.")
        for name in files:
            _check_names(_parquet_names(con, name, key), name, key)
        listed = f"[{', '.join(map(text, files))}]"
        rows = dict(con.execute(f"SELECT file_name, num_rows FROM parquet_file_metadata({listed})").fetchall())
        *starts, num_rows = accumulate(map(rows.__getitem__, files), initial=0)
        scan = f"read_parquet({listed}, union_by_name=true)"
        order = f"{starts}[file_index::BIGINT + 1] + file_row_number"
    else:
        scan, order, num_rows = _csv_scan(con, files, key, reading), "row_number() OVER () - 1", None
    types = _types(con, scan, path, key)
    if not is_parquet and _empty_texts(con, f"(FROM {scan} LIMIT {SNIFFED})", types):
        scan = f"{scan[:-1]}, sample_size=-1)"  # the type of what begins without values is told by all rows only
        types = _types(con, scan, path, key)
        types |= dict.fromkeys(_empty_texts(con, scan, types), EMPTY)
    if not is_parquet and time_column in types:
        scan = f"{scan[:-1]}, types={{{text(str(time_column))}: 'VARCHAR'}})"
        types[str(time_column)] = "VARCHAR"
    ordered = f"SELECT *, {order} AS file_order, filename AS file_name FROM {scan}"
    return Raw(key, path, scan, ordered, types, num_rows, has_statistics=is_parquet)


def open_frame(con: duckdb.DuckDBPyConnection, frame: Any, name: str, key: str) -> Raw:
    """Register a pandas frame, an Arrow table or a DuckDB relation under `name`."""
    if isinstance(frame, duckdb.DuckDBPyRelation):
        frame = frame.to_arrow_table()
    columns = getattr(frame, "column_names", None) or getattr(frame, "columns", None)
    if columns is None:
        raise UserError(
            f"{key}: expected a pandas frame, an Arrow table or a DuckDB relation, got {type(frame).__name__}."
        )
    _check_names(map(str, columns), "the frame", key)
    con.register(name, frame)
    ordered = f"SELECT *, row_number() OVER () - 1 AS file_order, 'the frame' AS file_name FROM {quote(name)}"
    return Raw(key, "the frame", quote(name), ordered, _types(con, quote(name), "the frame", key), len(frame))


def _types(con: duckdb.DuckDBPyConnection, scan: str, place: str, key: str) -> dict[str, str]:
    try:
        return {row[0]: row[1] for row in con.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()}
    except duckdb.Error as error:
        raise UserError(f"{key}: cannot read {place}: {complaint(error)}") from None


def _empty_texts(con: duckdb.DuckDBPyConnection, rows: str, types: dict[str, str]) -> list[str]:
    """Text columns without any value in these rows of CSV: nothing tells what they are."""
    texts = [name for name, kind in types.items() if kind == "VARCHAR"]
    if not texts:
        return []
    counts = con.execute(f"SELECT {', '.join(f'count({quote(name)})' for name in texts)} FROM {rows}").fetchall()[0]
    return [name for name, count in zip(texts, counts, strict=True) if count == 0]


def _parquet_names(con: duckdb.DuckDBPyConnection, name: str, key: str) -> list[str]:
    """Top-level columns as the file calls them; DuckDB itself would rename duplicates silently."""
    try:
        rows = con.execute(f"SELECT name, num_children FROM parquet_schema({text(name)})").fetchall()
    except duckdb.Error as error:
        raise UserError(
            f"{key}: {name} is not a readable Parquet file: {complaint(error)}; write it again or leave it out."
        ) from None
    names, rest = [], iter(rows[1:])
    for column, num_children in rest:
        names.append(column)
        _skip(rest, num_children or 0)
    return names


def _skip(rows: Iterator[tuple[str, int]], count: int) -> None:
    """Pass over `count` nested columns and all that is inside them."""
    for _ in range(count):
        _skip(rows, next(rows)[1] or 0)


def _csv_scan(con: duckdb.DuckDBPyConnection, files: list[str], key: str, reading: CsvReading) -> str:
    """read_csv of files whose first lines tell names and delimiter; text with a delimiter in it stands in quotes.

    DuckDB would guess all this from the first rows, and so skip a header that a broken row does not fit, and take
    quotes that come later for text.
    """
    options, columns = {}, {}
    for name in files:
        lines = _read_csv(con, name, WHOLE_LINES, "line", key)
        line = lines[0][0] if lines else ""
        delimiter = max(DELIMITERS, key=line.count)
        columns[name] = next(csv.reader([line], delimiter=delimiter), [])
        _check_names(filter(None, columns[name]), name, key)
        options[f"header=true, skip=0, quote='\"', escape='\"', delim='{delimiter}'"] = name
    if len(options) > 1:
        raise UserError(
            f"{key}: {' and '.join(options.values())} part their columns by different signs; write them alike."
        )
    (dialect,) = options
    nulls = ", ".join(map(text, ["", *reading.nulls]))
    values = f"nullstr=[{nulls}], decimal_separator='{reading.decimal}'"
    scan = f"read_csv([{', '.join(map(text, files))}], union_by_name=true, {dialect}, {values})"
    try:
        con.execute(f"DESCRIBE SELECT * FROM {scan}")
    except duckdb.Error:  # the types cannot be guessed where a row is broken; reading text tells which one
        for name in files:
            every = ", ".join(f"'c{number}': 'VARCHAR'" for number, _ in enumerate(columns[name]))
            _read_csv(con, name, f"{dialect}, auto_detect=false, columns={{{every}}}", "count(*)", key)
    return scan


def _read_csv(con: duckdb.DuckDBPyConnection, name: str, options: str, what: str, key: str) -> list[tuple]:
    """One row of one file; a broken line is a `UserError`."""
    try:
        return con.execute(f"SELECT {what} FROM read_csv({text(name)}, {options}) LIMIT 1").fetchall()
    except duckdb.Error as error:
        raise UserError(
            f"{key}: {name} is not a readable CSV file: {complaint(error)}; mend the line or the file."
        ) from None


def _check_names(names: Iterable[str], place: str, key: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            raise UserError(
                f"{key}: {place} has two columns '{name}' (capitals do not count); rename one of them there."
            )
        seen.add(name.lower())
