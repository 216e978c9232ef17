"""Examples: sorted, with exactly the events before the cut visible, and a summary of what was found."""

from __future__ import annotations

import numpy as np
import pytest
from logs import frame, seconds, staged, store_under_construction, task, time_split, write_store

from supermoe.config import Eligible
from supermoe.data.examples import write_examples
from supermoe.data.splits import LeaveOneOut, serving_plan
from supermoe.typed_yaml import UserError

COUNT = task("number", {"window": "5d", "sql": "count(*)", "empty": 0})


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    rows = [
        (u, f"2024-01-{d:02d}", "v", f"i{d % 3}")
        for u, step in (("b", 2), ("a", 5), ("c", 7))
        for d in range(step, 31, step)
    ]
    return staged(tmp_path_factory.mktemp("log"), frame("user time event item", *rows))


def test_examples_are_sorted_and_see_what_lies_before_the_cut(tmp_path, log):
    splits = time_split(train=["2024-01-06", "2024-01-11"], valid="2024-01-16", test="2024-01-21")
    store = write_store(tmp_path / "store", log, splits, asked=COUNT)
    columns = (store.examples.user, store.examples.cut, store.examples.visible, store.examples.split)
    found = list(zip(*(np.asarray(column).tolist() for column in columns), strict=True))
    days = (6, 11, 16, 21)
    expected = []
    for user, step in enumerate((5, 2, 7)):
        for day, split in zip(days, (0, 0, 1, 2), strict=True):
            visible = (day - 1) // step  # multiples of the step before the day
            if visible:
                expected.append((user, seconds(f"2024-01-{day:02d}"), visible, split))
    assert found == expected
    assert store.summary["examples"] == {"train": 5, "valid": 3, "test": 3}
    assert store.summary["cuts"] == {
        "train": ["2024-01-06", "2024-01-11"],
        "valid": ["2024-01-16"],
        "test": ["2024-01-21"],
    }


def test_no_test_cut(tmp_path, log):
    store = write_store(tmp_path / "store", log, time_split(train=["2024-01-11"], valid="2024-01-21"), asked=COUNT)
    assert store.summary["examples"].keys() == {"train", "valid"}


def test_a_split_without_examples_is_refused(tmp_path, log):
    splits = time_split(train=["2024-01-11"], valid="2024-01-21", eligible={"sql": "max(age_days) < 12"})
    with pytest.raises(
        UserError, match=r"data\.splits: no user is eligible for the valid split, cut 2024-01-21 \(condition: max"
    ):
        write_store(tmp_path / "store", log, splits, asked=COUNT)
    assert not (tmp_path / "store").exists()


def test_leave_one_out_examples(tmp_path, log):
    store = write_store(
        tmp_path / "store", log, LeaveOneOut(LeaveOneOut.Config()), asked=task("class", {"next": "item"})
    )
    assert np.asarray(store.examples.visible).tolist() == [4, 4, 5, 13, 13, 14, 2, 2, 3]
    assert np.asarray(store.examples.split).tolist() == [0, 1, 2] * 3


def test_serving_asks_everyone_at_one_time(tmp_path, log):
    plan = serving_plan(seconds("2024-01-06"), Eligible(sql="true"))
    with store_under_construction(log, tmp_path / "store", "true") as (writer, vocabularies):
        written = write_examples(log, writer, vocabularies, plan, {}, {}, {})
        columns = {name: writer.read(f"examples/{name}").tolist() for name in ("user", "visible", "split")}
    assert columns == {"user": [0, 1, 2], "visible": [1, 2, 0], "split": [3, 3, 3]}
    assert written.summary["examples"] == {"serve": 3}
