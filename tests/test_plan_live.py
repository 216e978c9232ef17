"""Storages in use, and which of them belong to weights."""

from __future__ import annotations

import torch
from torch import nn

from supermoe.studies.plan_live import LiveBytes, follow


def test_storages_are_followed_not_views() -> None:
    with LiveBytes() as live:
        x = torch.ones(1000)
        view = x[10:].view(9, 110)
        del x
        assert [event.bytes for event in live.events] == [4000]
        del view
    assert [event.bytes for event in live.events] == [4000, -4000]


def test_weights_are_apart_from_activations() -> None:
    """Under autocast: two uses share one 16-bit copy, gradients meet in 16 bits and are finished in 32."""
    layer, x = nn.Linear(100, 100, bias=False), torch.ones(10, 100)

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(layer(x)).float().square().sum()

    found = follow(layer, step)
    assert found.order == ["weight"]
    assert found.bytes_G.max() < 6 * x.nbytes < layer.weight.nbytes
    before, after = found.weights["weight"]
    assert before == 6  # at first the copy and two gradients in 16 bits, then one of these and the finished gradient
    assert after == 0
    assert layer.weight.grad is not None
