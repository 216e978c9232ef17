"""Chunks: all users once and in order, whatever their size; eligible examples numbered through."""

from __future__ import annotations

import numpy as np
import pytest
from logs import frame, staged, task, time_split, write_store

from supermoe.data import chunks as module
from supermoe.data.chunks import chunks
from supermoe.typed_yaml import UserError


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    rng = np.random.default_rng(0)
    days = [(u, int(d)) for u in range(20) for d in sorted(rng.integers(1, 30, rng.integers(1, 12)))]
    rows = [(u, f"2024-01-{d:02d}T0{n % 9}:00", "v", f"i{n % 7}", float(n)) for n, (u, d) in enumerate(days)]
    users = frame("user city", *[(u, "x") for u in range(22)])  # two without events
    return staged(tmp_path_factory.mktemp("log"), frame("user time event item amount", *rows), users)


SPLITS = time_split(train=["2024-01-08", "2024-01-15"], valid="2024-01-22")


def test_every_chunk_size_gives_the_same_store(tmp_path, log, monkeypatch):
    declared = {"windows": ["7d", "28d"], "sql": {"gap": "avg(gap_days)"}, "bag": ["item"]}
    groups = {"auto": {"auto": True, "windows": ["4d", "all"]}, "f": declared}
    label = task("set", {"window": "7d", "sql": "list(item)", "empty": []})
    whole = write_store(tmp_path / "whole", log, SPLITS, groups, asked=label)
    monkeypatch.setattr(module, "EVENTS", 30)
    parts = write_store(tmp_path / "parts", log, SPLITS, groups, asked=label)
    names = sorted(path.relative_to(whole.path) for path in whole.path.rglob("*.npy"))
    assert len(names) > 10
    for name in names:
        np.testing.assert_array_equal(np.load(parts.path / name), np.load(whole.path / name), err_msg=str(name))


def test_chunks_cover_all_users_in_order(log, monkeypatch):
    monkeypatch.setattr(module, "EVENTS", 25)
    found = list(chunks(log, SPLITS.plan(log.con, {})))
    assert len(found) > 3
    assert found[0].first_user == 0
    assert [c.first_user for c in found[1:]] == [c.first_user + len(c.offsets) - 1 for c in found[:-1]]
    assert found[-1].first_user + len(found[-1].offsets) - 1 == 22
    assert [c.first_example for c in found[1:]] == [c.first_example + c.num_examples for c in found[:-1]]
    assert found[-1].offsets[-1] == log.num_events
    order = np.stack([np.concatenate([c.user_B for c in found]), np.concatenate([c.cut_B for c in found])], 1)
    assert (np.lexsort((order[:, 1], order[:, 0])) == np.arange(len(order))).all()


def test_a_user_larger_than_a_chunk_is_one_chunk(log, monkeypatch):
    monkeypatch.setattr(module, "EVENTS", 1)
    assert [len(c.offsets) - 1 for c in chunks(log, SPLITS.plan(log.con, {}))][:19] == [1] * 19


def test_only_eligible_users_become_examples(log):
    splits = time_split(train=["2024-01-15"], eligible={"window": "7d", "sql": "count(*) >= 3"})
    [chunk] = chunks(log, splits.plan(log.con, {}))
    expected = log.con.execute(
        "SELECT user_row FROM log WHERE time >= '2024-01-08' AND time < '2024-01-15' GROUP BY 1 HAVING count(*) >= 3 "
        "ORDER BY 1"
    ).fetchall()
    assert chunk.user_B.tolist() == [row[0] for row in expected] != []


def test_users_without_events_may_be_asked(log):
    [chunk] = chunks(log, time_split(train=["2024-01-15"], eligible={"sql": "true"}).plan(log.con, {}))
    assert chunk.user_B.tolist() == list(range(22))
    assert chunk.visible_B[20:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("eligible", "word"),
    [({"sql": "count(*"}, "not valid SQL"), ({"sql": "max(amuont) > 1"}, "amuont"), ({"events": ["w"]}, "'w'")],
)
def test_bad_eligibility_is_refused(log, eligible, word):
    with pytest.raises(UserError, match=r"data\.splits\.eligible") as refused:
        list(chunks(log, time_split(train=["2024-01-15"], eligible=eligible).plan(log.con, {})))
    assert word in str(refused.value)
