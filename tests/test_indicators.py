"""Indicator tokens: what a question is made of."""

from __future__ import annotations

import dataclasses

import torch
from factories import DAY, START, check_gradients, make_batch, make_schema
from torch import Tensor

from supermoe.config import ModelConfig
from supermoe.data.batch import Batch
from supermoe.model.indicators import Indicators

CONFIG = ModelConfig(dim=8, heads=2, number_bins=4, bag_dim=6)
LAST_B = torch.tensor([START] * 5)
SEEN_B = torch.tensor([True, True, True, True, False])


def make_indicators() -> tuple[Indicators, Batch]:
    torch.manual_seed(0)
    return Indicators(make_schema(), CONFIG, ["user", "churn"]).eval(), make_batch()


def test_every_question_is_asked_about_every_example() -> None:
    indicators, batch = make_indicators()
    x_QBD, _ = indicators(batch, LAST_B, SEEN_B)
    assert x_QBD.shape == (2, 5, 8)
    assert (x_QBD[0] != x_QBD[1]).any(1).all()
    with torch.no_grad():
        indicators.questions["churn"].vector_D += torch.randn(8)
    changed, _ = indicators(batch, LAST_B, SEEN_B)
    assert torch.equal(changed[0], x_QBD[0])
    assert (changed[1] != x_QBD[1]).any(1).all()


def test_time_since_the_last_event_counts_where_there_is_one() -> None:
    indicators, batch = make_indicators()
    earlier, _ = indicators(batch, LAST_B - 30 * DAY, SEEN_B)
    changed = (earlier != indicators(batch, LAST_B, SEEN_B)[0]).any(2)
    assert changed.tolist() == [SEEN_B.tolist()] * 2


def test_a_closed_gate_keeps_the_features_out_of_one_question() -> None:
    indicators, batch = make_indicators()
    with torch.no_grad():
        indicators.questions["churn"].gate_D.zero_()
    other = dataclasses.replace(batch, features_BP=(1 - batch.features_BP).nan_to_num(0.3))
    changed = (indicators(other, LAST_B, SEEN_B)[0] != indicators(batch, LAST_B, SEEN_B)[0]).any(2)
    assert changed.tolist() == [[True] * 5, [False] * 5]


def test_gradients() -> None:
    indicators, batch = make_indicators()

    def asked() -> Tensor:
        return indicators(batch, LAST_B, SEEN_B)[0]

    check_gradients(indicators, asked)
