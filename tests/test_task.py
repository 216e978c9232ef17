from __future__ import annotations

import math

import pytest
import torch
from fake_run import make_sets, make_task

from supermoe.data.batch import SetLabels, take_labels
from supermoe.objectives.task import asked, concat_labels, gain, repeat_row, set_rows
from supermoe.typed_yaml import UserError


def as_lists(labels: SetLabels) -> list[list[int]]:
    return [labels.ids[a:b].tolist() for a, b in zip(labels.offsets[:-1], labels.offsets[1:], strict=True)]


def test_asked() -> None:
    assert asked(torch.tensor([1.0, math.nan])).tolist() == [True, False]
    assert asked(torch.tensor([0, -1])).tolist() == [True, False]
    sets = SetLabels(torch.tensor([False, True]), torch.tensor([0, 0, 0]), torch.zeros(0, dtype=torch.int64))
    assert asked(sets).tolist() == [False, True]


def test_labels_are_joined_and_picked() -> None:
    parts = [make_sets(n, 0, 5, torch.Generator().manual_seed(n)) for n in (4, 0, 3)]
    joined = concat_labels(list(parts))
    assert as_lists(joined) == [row for part in parts for row in as_lists(part)]
    assert joined.asked_B.tolist() == [flag for part in parts for flag in part.asked_B.tolist()]
    index = torch.tensor([6, 0, 3])
    assert as_lists(take_labels(joined, index)) == [as_lists(joined)[i] for i in index]
    assert torch.equal(concat_labels([torch.tensor([1, 2]), torch.tensor([3])]), torch.tensor([1, 2, 3]))


def test_set_rows() -> None:
    sets = SetLabels(torch.tensor([True] * 3), torch.tensor([0, 2, 2, 3]), torch.tensor([4, 5, 6]))
    assert set_rows(sets).tolist() == [0, 0, 2]


def test_gain_is_the_share_of_the_way_to_perfect() -> None:
    assert gain(0.75, 0.5) == 0.5
    assert gain(0.25, 0.5) == -0.5
    assert math.isnan(gain(math.nan, 0.5))
    assert math.isnan(gain(1.0, 1.0))


def test_repeat_row() -> None:
    assert repeat_row(torch.tensor([0.5, 0.25]), 3).tolist() == [[0.5, 0.25]] * 3


def test_a_task_without_labels_names_itself_and_the_remedy() -> None:
    with pytest.raises(UserError, match=r"tasks\.churn: no training example has a label.*tasks\.churn=null"):
        make_task("binary", "churn").fit_prior(torch.tensor([math.nan]))
