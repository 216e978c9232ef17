from __future__ import annotations

import errno
import hashlib

import pytest

from supermoe.serving.manifest import publishing, read_json, sha256, write_json
from supermoe.typed_yaml import UserError


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
        interrupted(tmp_path / "a.txt", OSError(errno.ENOSPC, "No space left on device"))
    assert names(tmp_path) == set()


def test_json_round_trip_and_errors(tmp_path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"x\.json.*copy it again"):
        read_json(path, "copy it again")
    write_json(path, {"a": [1, 2.5]})
    assert read_json(path, "") == {"a": [1, 2.5]}
    path.write_text('{"a": ')
    with pytest.raises(UserError, match=r"x\.json is not valid JSON.*copy it again"):
        read_json(path, "copy it again")


def test_sha256_is_the_usual_one(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()
