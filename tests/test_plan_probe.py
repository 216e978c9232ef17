"""Activations scaled up from small runs are those of the whole run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plans import config_of
from torch import nn

from supermoe.studies import plan_probe
from supermoe.studies.plan_model import schema_of
from supermoe.studies.plan_probe import Activations, LiveBytes, activations, follow, shape_of


def test_live_bytes_follow_storages_not_views() -> None:
    with LiveBytes() as live:
        x = torch.ones(1000)
        view = x[10:].view(9, 110)
        assert live.now == 4000
        del x
        assert live.now == 4000
        del view
        assert live.now == 0
    assert live.peak == 4000


def test_finished_gradients_are_no_activations() -> None:
    layer, x = nn.Linear(100, 100, bias=False), torch.ones(10, 100)
    found = follow(layer, lambda: layer(x).square().sum())
    assert found.order == ["weight"]
    assert found.bytes_G[-1] < 3 * x.nbytes + layer.weight.nbytes
    assert layer.weight.grad is not None


def test_small_runs_tell_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("model.layers=1", "model.dense_layers=0", "features={}")
    schema, shape = schema_of(config), shape_of(config)

    def found(tokens: int, dim: int, experts: int) -> Activations:
        monkeypatch.setattr(plan_probe, "MAX_TOKENS", tokens)
        monkeypatch.setattr(plan_probe, "MAX_DIM", dim)
        monkeypatch.setattr(plan_probe, "MAX_EXPERTS", experts)
        return activations(config, schema, shape)

    whole = found(shape.tokens, config.model.dim, config.model.moe.experts)
    scaled = found(512, 16, 4)
    assert scaled.order == whole.order
    # what depends on widths squared, gradients under way, is small beside activations
    assert np.abs(scaled.bytes_G - whole.bytes_G).max() < 0.05 * whole.bytes_G.max()
