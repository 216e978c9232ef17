from __future__ import annotations

import random

import numpy as np
import torch

from supermoe.training.seeding import seed_everything


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_numbers_follow_from_the_place_alone_and_differ_between_places() -> None:
    found = {}
    for place in [(), (0, 0), (0, 1), (1, 0), (2**20, 63)]:
        seed_everything(7, *place)
        found[place] = draws()
        seed_everything(7, *place)
        assert draws() == found[place]
    assert len({value for values in found.values() for value in values}) == 15
