from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import duckdb
import pytest
from tiny import CUT, make_log

from supermoe.data.sources import Files
from supermoe.serving.artifact import Artifact
from supermoe.serving.population import Request, ShardOfUsers, add_arguments, open_source, serving_store
from supermoe.testing import check_source
from supermoe.typed_yaml import UserError, parse_instant


@pytest.fixture(scope="module")
def artifact(model_folder: Path) -> Artifact:
    return Artifact.load(model_folder)


def users_of(source) -> list[str]:
    with duckdb.connect() as con:
        tables = source.attach(con)
        events = {row[0] for row in con.execute(f'SELECT DISTINCT "user" FROM {tables.events}').fetchall()}
        people = {row[0] for row in con.execute(f'SELECT "user" FROM {tables.users}').fetchall()}
    assert events <= people
    return sorted(people)


def test_shards_split_users_with_all_that_is_theirs(artifact: Artifact) -> None:
    whole = open_source(artifact)
    shards = [ShardOfUsers(whole, shard, 3) for shard in range(3)]
    found = [users_of(shard) for shard in shards]
    assert all(found)
    assert sorted(user for users in found for user in users) == users_of(whole)
    for shard in shards:
        check_source(shard)
        assert shard.fingerprint() is None


def test_the_bucket_of_a_user_never_changes(artifact: Artifact) -> None:
    whole = open_source(artifact)
    expected = [user for user in users_of(whole) if int(hashlib.md5(user.encode()).hexdigest()[:15], 16) % 8 == 5]
    assert users_of(ShardOfUsers(whole, 5, 8)) == expected != []


def test_files_are_read_like_the_configured_ones(artifact: Artifact, tmp_path: Path) -> None:
    configured = open_source(artifact)
    given = open_source(artifact, ["other.parquet"], "people.csv")
    assert isinstance(configured, Files)
    assert [entry.path for entry in given.config.events] == ["other.parquet"]
    assert given.config.users.path == "people.csv"
    assert given.config.events[0].model_copy(update={"path": ""}) == configured.config.events[0].model_copy(
        update={"path": ""}
    )
    several = open_source(artifact, ["a.parquet", "b.parquet"])
    assert [entry.path for entry in several.config.events] == ["a.parquet", "b.parquet"]
    assert several.config.users is None


def test_the_store_lives_as_long_as_it_is_used(artifact: Artifact, tmp_path: Path) -> None:
    request = Request(open_source(artifact), parse_instant(CUT))
    with serving_store(artifact, request, tmp_path / "scratch") as store:
        assert store.path.is_relative_to(tmp_path / "scratch")
        assert set(store.examples.cut) == {parse_instant(CUT)}
        assert store.time.max() < parse_instant(CUT)
        assert len(store.examples.user) == make_log()["user"].nunique()
    assert not list((tmp_path / "scratch").iterdir())


def test_the_command_line(artifact: Artifact) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["model", "--as-of", CUT, "--out", "out", "--shard", "1/4"])
    request = Request.parse(artifact, args)
    assert (request.as_of, request.shard, request.shards) == (parse_instant(CUT), 1, 4)
    args.as_of = "2020-13-01"
    with pytest.raises(UserError, match=r"--as-of: expected a date"):
        Request.parse(artifact, args)
