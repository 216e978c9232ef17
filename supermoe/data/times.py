"""Whatever a log calls a time -> TIMESTAMP in UTC: timestamps, dates, ISO text, numbers since 1970, local times."""

from __future__ import annotations

from typing import Literal

from supermoe.data.sql import FLOATS, INTEGERS, quote, text
from supermoe.typed_yaml import Config, UserError

FACTORS = {"s": 1_000_000, "ms": 1_000, "us": 1}  # microseconds
EARLIEST, LATEST = "1700-01-01", "2262-01-01"  # what pandas can hold; a wrong time_unit falls outside
ZONE = r"[0-9]:[0-9.:]*\s*(Z|z|[+-][0-9:]+|[A-Za-z].*)$"  # what follows the time of day in a text with a zone


class TimeReading(Config):
    """How the column `time` is to be understood."""

    time_zone: str | None = None  # of times without a zone; default UTC
    time_unit: Literal["s", "ms", "us"] | None = None  # of times that are numbers since 1970
    end_of_day: bool = False  # times mean the last second of their day, for dates of things known only after it


def time_sql(column: str, type_name: str, reading: TimeReading, place: str) -> str:
    """Expression of a column as TIMESTAMP in UTC, null where it cannot be read; `place` names the column in errors."""
    name = quote(column)
    if reading.time_unit is not None:
        return _from_number(name, type_name, reading, place)
    if type_name in (*INTEGERS, *FLOATS):
        raise UserError(
            f"{place} holds numbers ({type_name}); say what they count from 1970 on: time_unit: s, ms or us."
        )
    if type_name == "TIMESTAMP WITH TIME ZONE":
        return _in_utc(f"timezone('UTC', {name})", reading, zone=None)
    if type_name == "DATE" or type_name.startswith("TIMESTAMP"):
        return _in_utc(f"CAST({name} AS TIMESTAMP)", reading, reading.time_zone)
    if type_name != "VARCHAR":
        raise UserError(f"{place} is {type_name}; expected a timestamp, a date, ISO text, or numbers with time_unit.")
    zoned = _in_utc(f"timezone('UTC', TRY_CAST({name} AS TIMESTAMPTZ))", reading, zone=None)
    plain = _in_utc(f"TRY_CAST({name} AS TIMESTAMP)", reading, reading.time_zone)
    return f"CASE WHEN {has_zone_sql(column)} THEN {zoned} ELSE {plain} END"


def may_mix_zones(type_name: str, reading: TimeReading) -> bool:
    """Whether some values of the column may carry a zone and others not."""
    return type_name == "VARCHAR" and reading.time_unit is None


def has_zone_sql(column: str) -> str:
    """Condition on a text column: its time carries a zone."""
    return f"regexp_matches({quote(column)}, '{ZONE}')"


def _from_number(name: str, type_name: str, reading: TimeReading, place: str) -> str:
    if type_name not in (*INTEGERS, *FLOATS, "VARCHAR"):
        raise UserError(f"{place} is {type_name}, not a number, so time_unit has no meaning; remove it.")
    number = f"TRY_CAST({name} AS {'DOUBLE' if type_name in FLOATS else 'BIGINT'})"
    micros = f"TRY_CAST({number} * {FACTORS[str(reading.time_unit)]} AS BIGINT)"
    return _in_utc(f"TRY(make_timestamp({micros}))", reading, zone=None)


def _in_utc(local: str, reading: TimeReading, zone: str | None) -> str:
    if reading.end_of_day:
        local = f"date_trunc('day', {local}) + INTERVAL 86399 SECOND"
    return f"timezone('UTC', timezone({text(zone)}, {local}))" if zone else local
