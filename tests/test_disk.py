from __future__ import annotations

import errno
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe.data.disk import publish_text, publishing, read_json, read_table, writing
from supermoe.data.staging import connect
from supermoe.typed_yaml import UserError

FULL = OSError(errno.ENOSPC, "No space left on device")


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def interrupted(path, error: Exception) -> None:
    with publishing(path) as beside:
        beside.write_text("half")
        raise error


def test_a_file_appears_only_when_the_block_ends(tmp_path) -> None:
    with publishing(tmp_path / "a.txt") as beside:
        beside.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == {"a.txt"}


def test_a_folder_replaces_an_older_one_whole(tmp_path) -> None:
    for content in ("old", "new"):
        with publishing(tmp_path / "model") as beside:
            beside.mkdir()
            (beside / f"{content}.txt").write_text(content)
    assert names(tmp_path) == {"model"}
    assert names(tmp_path / "model") == {"new.txt"}


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyError):
        interrupted(tmp_path / "a.txt", KeyError())
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_a_full_disk_is_the_users_to_mend(tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left on device; free space"):
        interrupted(tmp_path / "a.txt", FULL)
    assert names(tmp_path) == set()


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*report\.md: Not a directory \(.*file/run\); free space, or"):
        publish_text(tmp_path / "file" / "run" / "report.md", "text")


def test_running_out_of_spill_space_names_the_keys_that_help(tmp_path: Path) -> None:
    con = connect("40MB", 1, tmp_path)
    con.execute("SET max_temp_directory_size = '1MB'")
    with pytest.raises(UserError, match=r"raise `data\.memory_limit`.*`data\.store`"), writing(tmp_path):
        con.execute("CREATE TABLE t AS SELECT random() AS a, random() AS b FROM range(5000000) ORDER BY a")


def test_duckdb_on_a_full_disk_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No space left on device; free space"), writing(tmp_path):
        raise duckdb.IOException("IO Error: Could not write: No space left on device")


def test_our_own_mistakes_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(duckdb.BinderException), writing(tmp_path):
        duckdb.connect().execute("SELECT nothing")


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"x\.json.*copy it again"):
        read_json(path, "copy it again")
    publish_text(path, '{"a": [1, 2.5]}')
    assert read_json(path, "") == {"a": [1, 2.5]}
    path.write_text('{"a": ')
    with pytest.raises(UserError, match=r"x\.json is not valid JSON.*copy it again"):
        read_json(path, "copy it again")


def test_a_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    publish_text(tmp_path / "x.json", '{"a": 1}')
    assert read_json(tmp_path / "x.json", "", "a") == {"a": 1}
    with pytest.raises(UserError, match=r"x\.json has no key 'b'; copy it again"):
        read_json(tmp_path / "x.json", "copy it again", "a", "b")


def test_a_table_or_some_of_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet", "").to_pydict() == {"a": [1], "b": [2]}
    assert read_table(tmp_path / "t.parquet", "", ["b"]).to_pydict() == {"b": [2]}


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and no more"])
def test_a_damaged_table_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*t\.parquet: .+; prepare it again"):
        read_table(tmp_path / "t.parquet", "prepare it again")
