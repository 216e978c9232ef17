"""The pictures of a seesaw study show the numbers they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from supermoe.studies import seesaw_plots


def facts(weights: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "weights": {"step": list(range(len(weights))), "weight": weights},
        "gradients": {"tasks": ["a", "b"], "cosine": [[1.0, -0.5], [-0.5, None]]},
        "experts": {"layer 1": {"a": [0.75, 0.25], "b": [0.5, 0.5]}},
    }


FIXED, MOVING = [{"a": 0.5, "b": 0.5}] * 3, [{"a": 0.5, "b": 0.5}, {"a": 0.8, "b": 0.2}]


def test_only_weights_that_move_get_a_panel() -> None:
    figure = seesaw_plots._weights({"equal": facts(FIXED), "dwa": facts(MOVING)})
    (axes,) = figure.axes
    assert axes.get_title() == "dwa"
    assert [line.get_ydata()[-1] for line in axes.lines] == [0.8, 0.2]


def test_cosines_leave_pairs_that_never_met_blank() -> None:
    figure = seesaw_plots._cosines({name: facts(FIXED) for name in ("one", "two", "three", "four")})
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 4
    shown = np.ma.filled(panels[0].images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[1.0, -0.5], [-0.5, np.nan]])


def test_without_experts_or_gradients_there_are_no_such_pictures(tmp_path: Path) -> None:
    bare = facts(FIXED) | {"gradients": {"tasks": [], "cosine": []}, "experts": {}}
    row = {"gain": 0.1, "interval": [0.0, 0.2]}
    result = {
        "split": "test",
        "tasks": {
            "a": {"methods": {"equal": row}},
            "b": {"methods": {"equal": row | {"gain": None, "interval": [None, None]}}},
        },
        "methods": {"equal": bare},
    }
    assert [path.name for path in seesaw_plots.draw(tmp_path, result)] == ["gains.png", "weights.png"]
