"""Random numbers as a function of where a run stands, so that no generator's state needs to be saved."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int, *place: int) -> None:
    """Seed Python, numpy and torch; every `place`, such as (step, rank), has numbers of its own."""
    if place:
        seed = int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
