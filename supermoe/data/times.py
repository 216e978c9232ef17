"""Whatever a log calls a time -> TIMESTAMP in UTC: timestamps, dates, text, numbers since 1970, local times."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from supermoe.data.sql import FLOATS, is_number, quote, text
from supermoe.typed_yaml import Config, UserError

UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}  # in a second
TO_MICROSECONDS = {"s": "* 1000000", "ms": "* 1000", "us": "* 1", "ns": "// 1000"}
EARLIEST, LATEST = "1700-01-01", "2262-01-01"  # what pandas can hold
OUR_DAYS = (631_152_000, 4_102_444_800)  # 1990 to 2100 in seconds: in any other unit these numbers are far away
ZONE = r"[0-9]:[0-9.:]*\s*(Z|z|[+-][0-9:]+|[A-Za-z].*)$"  # what follows the time of day in a text with a zone


class TimeReading(Config):
    """How the column `time` is to be understood."""

    time_zone: str | None = None  # of times without a zone; default UTC
    time_unit: Literal["s", "ms", "us", "ns"] | None = None  # of times that are numbers since 1970
    time_format: str | None = None  # of times written otherwise than in ISO, in strptime's letters: "%d.%m.%Y"
    end_of_day: bool = False  # times mean the last second of their day, for dates of things known only after it

    @field_validator("time_format")
    @classmethod
    def _has_letters(cls, value: str | None) -> str | None:
        if value is not None and "%" not in value:
            raise ValueError("expected strptime's letters, such as %d.%m.%Y for 31.12.2017 or %Y%m%d for 20171231")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> TimeReading:
        if self.time_unit and self.time_format:
            raise ValueError("times are numbers since 1970 (time_unit) or written (time_format); give one of the two")
        return self


def time_sql(column: str, type_name: str, reading: TimeReading, place: str) -> str:
    """Expression of a column as TIMESTAMP in UTC, null where it cannot be read; `place` names the column in errors."""
    name = quote(column)
    if reading.time_unit is not None:
        number = number_sql(column, type_name, reading, place)
        micros = f"TRY(make_timestamp(TRY_CAST({number} {TO_MICROSECONDS[reading.time_unit]} AS BIGINT)))"
        return _in_utc(micros, reading, zone=None)
    if reading.time_format is not None:
        return _from_written(name, type_name, reading, reading.time_format, place)
    if is_number(type_name):
        raise UserError(
            f"{place} holds numbers ({type_name}); say what they count from 1970 on, time_unit: s, ms, us or ns, or "
            f"how dates are written in them, such as time_format: '%Y%m%d'."
        )
    if type_name == "TIMESTAMP WITH TIME ZONE":
        return _in_utc(f"timezone('UTC', {name})", reading, zone=None)
    if type_name == "DATE" or type_name.startswith("TIMESTAMP"):
        return _in_utc(f"CAST({name} AS TIMESTAMP)", reading, reading.time_zone)
    if type_name != "VARCHAR":
        raise UserError(f"{place} is {type_name}; expected a timestamp, a date, text, or numbers with time_unit.")
    zoned = _in_utc(f"timezone('UTC', TRY_CAST({name} AS TIMESTAMPTZ))", reading, zone=None)
    plain = _in_utc(f"TRY_CAST({name} AS TIMESTAMP)", reading, reading.time_zone)
    return f"CASE WHEN {has_zone_sql(column)} THEN {zoned} ELSE {plain} END"


def may_mix_zones(type_name: str, reading: TimeReading) -> bool:
    """Whether some values of the column may carry a zone and others not."""
    return type_name == "VARCHAR" and reading.time_unit is None and reading.time_format is None


def has_zone_sql(column: str) -> str:
    """Condition on a text column: its time carries a zone."""
    return f"regexp_matches({quote(column)}, '{ZONE}')"


def number_sql(column: str, type_name: str, reading: TimeReading, place: str) -> str:
    """Expression of a column that counts `time_unit`s as a number, null where it is none."""
    if not is_number(type_name) and type_name != "VARCHAR":
        raise UserError(f"{place} is {type_name}, not a number, so time_unit has no meaning; remove it.")
    has_parts = type_name in FLOATS or type_name == "VARCHAR" or type_name.startswith("DECIMAL")
    # a double holds microseconds exactly until 2255, nanoseconds it does not
    return f"TRY_CAST({quote(column)} AS {'DOUBLE' if has_parts and reading.time_unit != 'ns' else 'BIGINT'})"


def of_our_days_sql(number: str, unit: str) -> str:
    """Condition: a number of units since 1970 lies between 1990 and 2100."""
    return f"{number} BETWEEN {OUR_DAYS[0] * UNITS[unit]} AND {OUR_DAYS[1] * UNITS[unit]}"


def likely_unit(number: float) -> str | None:
    """The unit in which a number since 1970 lies between 1990 and 2100, if there is one."""
    return next((unit for unit, size in UNITS.items() if OUR_DAYS[0] <= number / size <= OUR_DAYS[1]), None)


def unread_remedy(reading: TimeReading) -> str:
    """What is wrong with a value that could not be read, and what to do."""
    if reading.time_format is not None:
        return f"is no time between 1700 and 2262 written as time_format: '{reading.time_format}'; mend one of the two"
    if reading.time_unit is not None:
        return "is no time between 1700 and 2262; write numbers since 1970, and set time_unit right"
    return (
        "is no time between 1700 and 2262; write ISO times such as 2017-11-05T12:00:00, or say how they are written, "
        "such as time_format: '%d.%m.%Y', or time_unit: s for numbers since 1970"
    )


def _from_written(name: str, type_name: str, reading: TimeReading, letters: str, place: str) -> str:
    if not is_number(type_name) and type_name != "VARCHAR":
        raise UserError(f"{place} is {type_name}, so time_format has no meaning; remove it.")
    written = name if type_name == "VARCHAR" else f"CAST(TRY_CAST({name} AS BIGINT) AS VARCHAR)"
    parsed = f"try_strptime(trim({written}), {text(letters)})"
    if "%z" in letters.lower():  # DuckDB then gives a time with a zone
        return _in_utc(f"timezone('UTC', {parsed})", reading, zone=None)
    return _in_utc(parsed, reading, reading.time_zone)


def _in_utc(local: str, reading: TimeReading, zone: str | None) -> str:
    if reading.end_of_day:
        local = f"date_trunc('day', {local}) + INTERVAL 86399 SECOND"
    return f"timezone('UTC', timezone({text(zone)}, {local}))" if zone else local
