"""Cuts: automatic and given, what is refused, user folds, leave-one-out."""

from __future__ import annotations

import numpy as np
import pytest
from logs import frame, seconds, staged

from supermoe.config import WindowLabel
from supermoe.data.splits import LeaveOneOut, TimeSplit, UserFolds
from supermoe.typed_yaml import UserError, format_instant

LABEL = {"spend": WindowLabel(sql="count(*)", window="7d", empty=0)}


def daily(path, days: int, users: int = 2):
    """One event per user and day at noon, from 2024-01-01 on."""
    rows = [(u, f"{np.datetime64('2024-01-01') + d}T12:00", "view", "x") for u in range(users) for d in range(days)]
    return staged(path, frame("user time event item", *rows))


def plan(log, labels=None, **config):
    return TimeSplit(TimeSplit.Config(**config)).plan(log.con, LABEL if labels is None else labels)


def dates(cuts):
    return [format_instant(cut) for cut in cuts]


def test_automatic_cuts_fill_the_data(tmp_path):
    cuts = plan(daily(tmp_path, 35)).cuts
    assert dates(cuts["test"]) == ["2024-01-29"]  # its week ends with the data, at midnight after the last event
    assert dates(cuts["valid"]) == ["2024-01-22"]
    assert dates(cuts["train"]) == [
        "2024-01-15"
    ]  # 2024-01-08 has less than a week of history: the first event is at noon


def test_automatic_cuts_stop_at_the_limit(tmp_path):
    assert dates(plan(daily(tmp_path, 70), cuts=3).cuts["train"]) == ["2024-02-05", "2024-02-12", "2024-02-19"]


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        (400, ["2024-12-10", "2025-01-07", "2025-02-04"]),
        (35, ["2024-01-30", "2024-02-02", "2024-02-05"]),  # a tenth of the log apart
        (3, ["2024-01-03T02:24:01", "2024-01-03T07:12:01", "2024-01-03T12:00:01"]),
    ],
)
def test_attributes_alone_are_asked_at_the_end_of_the_data(tmp_path, days, expected):
    cuts = plan(daily(tmp_path, days), labels={"age": WindowLabel(attribute="age")}).cuts
    assert dates([cuts["train"][-1], *cuts["valid"], *cuts["test"]]) == expected
    assert len(cuts["train"]) == 8


def test_training_cuts_are_derived_from_a_given_validation_cut(tmp_path):
    cuts = plan(daily(tmp_path, 40), valid="2024-01-29").cuts
    assert dates(cuts["train"]) == ["2024-01-15", "2024-01-22"]
    assert "test" not in cuts  # deployment: everything up to now is for training and validation


def test_series_and_lists_of_cuts(tmp_path):
    log = daily(tmp_path, 60)
    series = plan(log, train={"first": "2024-01-08", "last": "2024-01-22", "every": "7d"})
    assert dates(series.cuts["train"]) == ["2024-01-08", "2024-01-15", "2024-01-22"]
    assert plan(log, train=["2024-01-08", "2024-01-15", "2024-01-22"]).candidates_sql == series.candidates_sql


def test_candidates_count_the_events_before_each_cut(tmp_path):
    log = staged(
        tmp_path,
        frame(
            "user time event item",
            ("a", "2024-01-02", "v", "x"),
            ("a", "2024-01-09", "v", "x"),
            ("b", "2024-01-20", "v", "y"),
        ),
        frame("user age", ("a", 5), ("c", 7)),
    )
    chosen = plan(log, train=["2024-01-09"], valid="2024-01-10", labels={})
    found = log.con.execute(
        f"SELECT user_row, epoch(cut)::BIGINT, visible, split FROM ({chosen.candidates_sql}) ORDER BY ALL"
    ).fetchall()
    first, second = seconds("2024-01-09"), seconds("2024-01-10")
    # the event at the cut itself is not visible; user c has no events at all
    assert found == [
        (0, first, 1, 0),
        (0, second, 2, 1),
        (1, first, 0, 0),
        (1, second, 0, 1),
        (2, first, 0, 0),
        (2, second, 0, 1),
    ]


def test_training_rows_end_at_the_last_training_cut(tmp_path):
    log = daily(tmp_path, 40)
    chosen = plan(log, train=["2024-01-15", "2024-01-22"], valid="2024-01-29")
    latest = log.con.execute(f"SELECT max(time)::VARCHAR FROM log WHERE {chosen.training_sql}").fetchall()[0][0]
    assert latest == "2024-01-21 12:00:00"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train": ["2024-01-23"], "valid": "2024-01-29"}, ["data.splits.train", "2024-01-30", "valid cut 2024-01-29"]),
        (
            {"train": ["2024-01-15"], "valid": "2024-01-22", "test": "2024-01-28"},
            ["data.splits.valid", "test cut 2024-01-28"],
        ),
        ({"train": ["2024-01-15"], "test": "2024-01-20"}, ["data.splits.train", "test cut 2024-01-20"]),
        ({"train": ["2024-01-15"], "valid": "2024-02-05"}, ["data.splits.valid", "2024-02-12", "log ends at"]),
        ({"train": ["2024-01-15", "2024-01-15"]}, ["data.splits.train", "2024-01-15 stands twice"]),
        ({"train": ["2024-01-22", "2024-01-15"]}, ["data.splits.train", "2024-01-15 stands after 2024-01-22"]),
        ({"train": ["2023-12-01"]}, ["data.splits.train", "no event lies before the cut 2023-12-01"]),
        ({"train": []}, ["data.splits.train", "no training cut"]),
        ({"train": {"first": "2024-01-22", "last": "2024-01-15"}}, ["data.splits.train", "no training cut"]),
    ],
)
def test_refused_cuts(tmp_path, config, words):
    with pytest.raises(UserError) as refused:
        plan(daily(tmp_path, 40), **config)
    for word in words:
        assert word in str(refused.value)


def test_a_window_may_end_with_the_last_day(tmp_path):
    log = daily(tmp_path, 35)  # the last event is on 2024-02-04 at noon
    assert plan(log, train=["2024-01-15"], valid="2024-01-29").cuts["valid"] == [seconds("2024-01-29")]
    with pytest.raises(UserError, match="Move the cut to 2024-01-29 or earlier"):
        plan(log, train=["2024-01-15"], valid="2024-01-30")


def test_a_short_log_is_refused_with_its_span(tmp_path):
    with pytest.raises(
        UserError, match=r"spans 2024-01-01T12:00:00 to 2024-01-10T12:00:00, too short for automatic cuts"
    ):
        plan(daily(tmp_path, 10))


def test_buckets_agree_between_python_and_sql(tmp_path):
    folds = UserFolds(folds=7, fold=6, salt=3)
    users = [*range(50), "\u00e4", "o'neil", ""]
    log = daily(tmp_path, 1)
    for user in users:
        text = str(user)
        found = log.con.execute(f"SELECT {folds.split_sql('name')} FROM (SELECT ? AS name)", [text]).fetchall()[0][0]
        assert found == {6: 2, 0: 1}.get(folds.bucket(text), 0)


def test_folds_cover_every_user_once():
    test_users = [{u for u in range(200) if UserFolds(folds=5, fold=f).bucket(u) == f} for f in range(5)]
    assert set.union(*test_users) == set(range(200))
    assert sum(map(len, test_users)) == 200
    assert min(map(len, test_users)) > 20  # of 40 expected


def test_salt_changes_the_buckets():
    assert [UserFolds().bucket(u) for u in range(40)] != [UserFolds(salt=1).bucket(u) for u in range(40)]


@pytest.mark.parametrize("bad", [{"folds": 2}, {"folds": 5, "fold": 5}])
def test_refused_folds(bad):
    with pytest.raises(ValueError, match="fold"):
        UserFolds(**bad)


def leave_one_out(path):
    rows = [("a", f"2024-01-0{d}", "v", f"i{d}") for d in range(1, 6)]
    rows += [
        ("b", "2024-01-01", "v", "x"),
        ("b", "2024-01-01", "v", "y"),
        ("b", "2024-01-01", "v", "z"),
        ("c", "2024-01-02", "v", "x"),
    ]
    return staged(path, frame("user time event item", *rows))


def test_leave_one_out_targets_the_last_two_events(tmp_path):
    log = leave_one_out(tmp_path)
    chosen = LeaveOneOut(LeaveOneOut.Config()).plan(log.con, {"item": WindowLabel(next="item")})
    found = log.con.execute(
        f"SELECT x.user_row, visible, split, item FROM ({chosen.candidates_sql}) AS x JOIN log ON log.user_row = "
        "x.user_row AND log.position = visible AND log.time = cut ORDER BY ALL"
    ).fetchall()
    # (user, visible, split, the event at the cut); b's events share one time and keep the file's order; c is too short
    assert found == [(0, 3, 0, "i4"), (0, 3, 1, "i4"), (0, 4, 2, "i5"), (1, 1, 0, "y"), (1, 1, 1, "y"), (1, 2, 2, "z")]
    rows = log.con.execute(f"SELECT user_row, position FROM log WHERE {chosen.training_sql} ORDER BY ALL").fetchall()
    assert rows == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_leave_one_out_refuses_window_labels(tmp_path):
    with pytest.raises(UserError, match=r"tasks\.spend\.label\.sql.*data\.splits\.type: time"):
        LeaveOneOut(LeaveOneOut.Config()).plan(leave_one_out(tmp_path).con, LABEL)
