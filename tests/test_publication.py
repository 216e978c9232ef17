from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe.serving.manifest import MANIFEST, sha256
from supermoe.serving.publication import Publication, parse_shard, schema_of
from supermoe.typed_yaml import UserError

IDENTITY = {"kind": "embeddings", "model_id": "m1", "as_of": "2020-01-01"}


def rows(*values: int) -> pa.Table:
    return pa.table({"user_id": pa.array(values, pa.int64())})


def publish(folder, *tables: pa.Table, shard: int = 0, of: int = 1, **identity) -> dict:
    publication = Publication(folder, {**IDENTITY, **identity}, shard, of)
    for part, table in enumerate(tables):
        publication.write(publication.name("part", part), table, size=table.num_rows)
    return json.loads(publication.finish(schema=schema_of(tables[0])).read_text())


def test_manifest_tells_what_lies_there(tmp_path) -> None:
    manifest = publish(tmp_path, rows(1, 2, 3), rows(4))
    assert manifest["schema"] == {"user_id": "int64"}
    assert (manifest["rows"], manifest["complete"], manifest["model_id"]) == (4, True, "m1")
    assert [(part["file"], part["rows"], part["size"]) for part in manifest["parts"]] == [
        ("part-00000.parquet", 3, 3),
        ("part-00001.parquet", 1, 1),
    ]
    for part in manifest["parts"]:
        assert sha256(tmp_path / part["file"]) == part["sha256"]


def test_shards_in_any_order_make_one_manifest(tmp_path) -> None:
    first = publish(tmp_path, rows(3), shard=1, of=2)
    assert (first["complete"], first["rows"]) == (False, 1)
    second = publish(tmp_path, rows(1, 2), shard=0, of=2)
    assert (second["complete"], second["rows"]) == (True, 3)
    found = [
        value for part in second["parts"] for value in pq.read_table(tmp_path / part["file"])["user_id"].to_pylist()
    ]
    assert found == [1, 2, 3]


def test_running_a_shard_again_replaces_its_parts_only(tmp_path) -> None:
    publish(tmp_path, rows(9), shard=1, of=2)
    once = publish(tmp_path, rows(1), rows(2), shard=0, of=2)
    assert publish(tmp_path, rows(1), rows(2), shard=0, of=2) == once
    fewer = publish(tmp_path, rows(5), shard=0, of=2)
    assert fewer["rows"] == 2
    assert {part["file"] for part in fewer["parts"]} == {path.name for path in tmp_path.glob("*.parquet")}


def test_nothing_looks_complete_while_a_shard_is_run_again(tmp_path) -> None:
    publish(tmp_path, rows(1))
    publication = Publication(tmp_path, IDENTITY)
    publication.write("part-00000.parquet", rows(7))
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"model_id": "m2"}, "model_id m1"), ({"as_of": "2021-01-01"}, "as_of"), ({"of": 3}, "shards 1")],
)
def test_another_model_date_or_division_is_refused(tmp_path, change: dict, named: str) -> None:
    publish(tmp_path, rows(1))
    before = (tmp_path / MANIFEST).read_text()
    with pytest.raises(UserError, match=f"{named}.*empty folder"):
        publish(tmp_path, rows(2), **change)
    assert (tmp_path / MANIFEST).read_text() == before


def test_shards_on_the_command_line() -> None:
    assert parse_shard("0/1") == (0, 1)
    assert parse_shard("3/4") == (3, 4)
    for text in ("4/4", "1", "a/b", "-1/2", "0/0"):
        with pytest.raises(UserError, match="expected i/n"):
            parse_shard(text)
