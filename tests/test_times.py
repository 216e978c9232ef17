"""Every way of writing a time, read as the same instant."""

from __future__ import annotations

import datetime as dt

import duckdb
import pyarrow as pa
import pytest

from supermoe.data.times import TimeReading, has_zone_sql, likely_unit, may_mix_zones, time_sql
from supermoe.typed_yaml import UserError, validate

NOON = dt.datetime(2020, 7, 1, 12)
SECONDS = 1593604800
BERLIN = dt.timezone(dt.timedelta(hours=2))

CASES = {
    "timestamp": (pa.array([NOON]), {}),
    "nanoseconds": (pa.array([NOON], pa.timestamp("ns")), {}),
    "with zone": (pa.array([NOON.replace(tzinfo=dt.UTC)], pa.timestamp("us", tz="UTC")), {}),
    "other zone": (pa.array([NOON.replace(hour=14, tzinfo=BERLIN)], pa.timestamp("us", tz="Europe/Berlin")), {}),
    "local": (pa.array([NOON.replace(hour=14)]), {"time_zone": "Europe/Berlin"}),
    "text": (pa.array(["2020-07-01T12:00:00"]), {}),
    "text with Z": (pa.array(["2020-07-01T12:00:00Z"]), {}),
    "text with offset": (pa.array(["2020-07-01 14:00:00+02:00"]), {}),
    "offset beats time_zone": (pa.array(["2020-07-01 14:00:00+02"]), {"time_zone": "Asia/Tokyo"}),
    "local text": (pa.array(["2020-07-01 14:00"]), {"time_zone": "Europe/Berlin"}),
    "seconds": (pa.array([SECONDS]), {"time_unit": "s"}),
    "milliseconds": (pa.array([SECONDS * 1000]), {"time_unit": "ms"}),
    "microseconds": (pa.array([SECONDS * 1_000_000]), {"time_unit": "us"}),
    "float seconds": (pa.array([float(SECONDS)]), {"time_unit": "s"}),
    "32 bit seconds": (pa.array([SECONDS], pa.int32()), {"time_unit": "s"}),
    "text seconds": (pa.array([str(SECONDS)]), {"time_unit": "s"}),
    "nanoseconds since 1970": (pa.array([SECONDS * 1_000_000_000 + 123]), {"time_unit": "ns"}),
    "text nanoseconds": (pa.array([f"{SECONDS}000000123"]), {"time_unit": "ns"}),
    "unsigned seconds": (pa.array([SECONDS], pa.uint64()), {"time_unit": "s"}),
    "decimal seconds": (pa.array([SECONDS], pa.decimal128(38, 0)), {"time_unit": "s"}),
    "German": (pa.array([" 1.7.2020 12:00"]), {"time_format": "%d.%m.%Y %H:%M"}),
    "German, local": (pa.array(["01.07.2020 14:00"]), {"time_format": "%d.%m.%Y %H:%M", "time_zone": "Europe/Berlin"}),
    "format with offset": (pa.array(["2020-07-01 14:00 +0200"]), {"time_format": "%Y-%m-%d %H:%M %z"}),
    "format in whole numbers": (pa.array([2020070112]), {"time_format": "%Y%m%d%H"}),
    "format in floats": (pa.array([2020070112.0]), {"time_format": "%Y%m%d%H"}),
}


def evaluate(values, **reading):
    con = duckdb.connect()
    con.execute("SET TimeZone = 'UTC'")
    con.register("t", pa.table({"at": values}))
    type_name = con.execute("DESCRIBE t").fetchall()[0][1]
    sql = time_sql("at", type_name, TimeReading(**reading), "here")
    return con.execute(f"SELECT {sql} FROM t").fetchall()[0][0]


@pytest.mark.parametrize("case", CASES)
def test_all_are_the_same_instant(case):
    values, reading = CASES[case]
    assert evaluate(values, **reading) == NOON


@pytest.mark.parametrize("values", [pa.array([dt.date(2020, 7, 1)]), pa.array(["2020-07-01"]), pa.array([NOON])])
def test_end_of_day_is_its_last_second(values):
    assert evaluate(values, end_of_day=True) == dt.datetime(2020, 7, 1, 23, 59, 59)


def test_end_of_a_local_day():
    found = evaluate(pa.array([dt.date(2020, 7, 1)]), end_of_day=True, time_zone="Europe/Berlin")
    assert found == dt.datetime(2020, 7, 1, 21, 59, 59)


@pytest.mark.parametrize("value", ["", "01/02/2020", "2020-02-30", "noon", "20200701"])
def test_what_is_not_iso_is_null(value):
    assert evaluate(pa.array([value])) is None


def test_parts_of_a_second_are_kept():
    assert evaluate(pa.array([f"{SECONDS}.25"]), time_unit="s") == NOON + dt.timedelta(milliseconds=250)


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        ({"time_unit": "s", "time_format": "%Y"}, "give one of the two"),
        ({"time_format": "dd.mm.yyyy"}, "time_format: expected strptime's letters"),
    ],
)
def test_readings_that_mean_nothing_are_refused(reading, words):
    with pytest.raises(UserError, match=words):
        validate(TimeReading, reading, "here")


def test_a_format_is_for_text_and_numbers():
    with pytest.raises(UserError, match="here is DATE, so time_format has no meaning; remove it"):
        evaluate(pa.array([dt.date(2020, 7, 1)]), time_format="%Y")


def test_units_are_told_by_the_size_of_numbers():
    assert [likely_unit(SECONDS * size) for size in (1, 10**3, 10**6, 10**9)] == ["s", "ms", "us", "ns"]
    assert likely_unit(1_000) is None


def test_number_that_overflows_is_null():
    assert evaluate(pa.array([2**62]), time_unit="s") is None


@pytest.mark.parametrize(
    ("value", "zoned"),
    [
        ("2020-07-01T12:00:00Z", True),
        ("2020-07-01 12:00-03:30", True),
        ("2020-07-01", False),
        ("2020-07-01 12:00", False),
    ],
)
def test_zones_are_seen(value, zoned):
    con = duckdb.connect()
    con.register("t", pa.table({"at": [value]}))
    assert con.execute(f"SELECT {has_zone_sql('at')} FROM t").fetchall() == [(zoned,)]


def test_only_text_can_mix_zones():
    assert may_mix_zones("VARCHAR", TimeReading())
    assert not may_mix_zones("VARCHAR", TimeReading(time_unit="s"))
    assert not may_mix_zones("VARCHAR", TimeReading(time_format="%Y"))
    assert not may_mix_zones("TIMESTAMP", TimeReading())
