"""Activations scaled up from small runs are those of the whole run."""

from __future__ import annotations

import numpy as np
import pytest
from plans import config_of

from supermoe.studies import plan_probe
from supermoe.studies.plan_live import Activations
from supermoe.studies.plan_model import schema_of
from supermoe.studies.plan_probe import activations, shape_of


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
