from __future__ import annotations

import hashlib
import json

from supermoe.serving.manifest import sha256, write_json


def test_json_appears_whole(tmp_path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, 2.5]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2.5]}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_sha256_is_the_usual_one(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()
