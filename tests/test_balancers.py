from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from supermoe.objectives.balancer import Step
from supermoe.objectives.balancers import Equal, Fixed
from supermoe.typed_yaml import UserError

NAMES = ["churn", "spend", "age"]


def test_equal_weights_sum_to_one_and_stay() -> None:
    balancer = Equal(Equal.Config(), names=NAMES)
    step = Step(torch.tensor([9.0, torch.nan, 0.1]), torch.tensor([1.0, 0.0, 5.0]))
    torch.testing.assert_close(balancer(step), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_fixed_weights_keep_their_proportions_from_the_first_step_on() -> None:
    balancer = Fixed(Fixed.Config(weights={"spend": 2.0}), names=NAMES)
    expected = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(balancer.weight_T, expected)
    torch.testing.assert_close(balancer(Step(torch.ones(3), torch.ones(3))), expected)


def test_fixed_refuses_unknown_names_and_weights_that_are_not_positive() -> None:
    with pytest.raises(UserError, match=r"loss\.balancer\.weights\.chrun.*did you mean 'churn'"):
        Fixed(Fixed.Config(weights={"chrun": 1.0}), names=NAMES)
    with pytest.raises(ValidationError, match=r"tasks\.age=null"):
        Fixed.Config(weights={"age": 0.0})
