from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_run import make_task
from torch import Tensor, nn

from supermoe.data.batch import SetLabels
from supermoe.data.schema import LabelSchema
from supermoe.training import relevance
from supermoe.training.relevance import squared_correlations, target_columns, weigh_inputs

COUNT, INPUTS = 400, 6


@pytest.fixture
def x() -> Tensor:
    """Inputs of very different size; the last one never varies."""
    x_NJ = torch.randn(COUNT, INPUTS, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 5, 0.1, 1, 1, 0])
    return x_NJ + 2


def test_correlations_are_those_of_numpy_over_the_examples_that_count(x: Tensor) -> None:
    rows = torch.arange(0, COUNT, 3)
    y_nC = torch.stack([x[rows, 0] - x[rows, 1], x[rows, 2] * 3 + 1], dim=1)
    (square_J,), variance_J = squared_correlations(x.split(37), [(rows, y_nC)])
    expected = np.corrcoef(torch.cat([x[rows, :5], y_nC], dim=1).numpy().T)[:5, 5:] ** 2
    expected = np.maximum(expected.max(1) - 1 / len(rows), 0)
    np.testing.assert_allclose(square_J[:5], expected, atol=1e-4)  # sums of fp32 values of size two
    assert square_J[5] == 0
    torch.testing.assert_close(variance_J, x.double().var(0, correction=0), rtol=1e-3, atol=1e-6)


def test_targets_are_columns_of_those_who_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, y_nC = target_columns(torch.tensor([1.5, torch.nan, -1.0]))
    assert (rows.tolist(), y_nC.tolist()) == ([0, 2], [[1.5], [-1.0]])
    rows, y_nC = target_columns(torch.tensor([-1, 2, 0, 2]))
    assert (rows.tolist(), y_nC[:, :2].tolist()) == ([1, 2, 3], [[1, 0], [0, 1], [1, 0]])
    sets = SetLabels(torch.tensor([True, False, True]), torch.tensor([0, 2, 2, 3]), torch.tensor([4, 1, 4]))
    monkeypatch.setattr(relevance, "MAX_CLASSES", 1)
    rows, y_nC = target_columns(sets)
    assert (rows.tolist(), y_nC.tolist()) == ([0, 2], [[1], [1]])


def weights(x: Tensor, monkeypatch: pytest.MonkeyPatch, **labels: Tensor) -> Tensor | None:
    """What the encoder is told, for binary tasks of these names; None: nothing."""
    found: list[Tensor] = []
    encoder = SimpleNamespace(network=nn.Identity(), weigh=found.append)
    store = SimpleNamespace(
        rows_of=lambda split: np.arange(COUNT), labels={name: label.numpy() for name, label in labels.items()}
    )
    monkeypatch.setattr(relevance, "network_inputs", lambda model, store, chunk: x[chunk])
    tasks = {name: make_task("binary", name, label=LabelSchema(kind="number")) for name in labels}
    weigh_inputs(SimpleNamespace(indicators=SimpleNamespace(features=encoder)), tasks, store, seed=0)
    return found[0] if found else None


def test_what_tells_a_task_most_counts_most_and_the_whole_varies_as_before(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    strong = (x[:, 0] > 2).float()
    noise = torch.rand(COUNT, generator=torch.Generator().manual_seed(1))
    weak = (x[:, 2] - 2 + 0.3 * (noise - 0.5) > 0).float()  # its best input counts as much as that of the strong one
    told_J = weights(x, monkeypatch, strong=strong, weak=weak)
    assert told_J is not None
    assert told_J[0] == told_J[2] == told_J.max()
    assert told_J[[1, 3, 4]].max() < 0.6 * told_J[0]
    variance_J = x.double().var(0, correction=0)
    torch.testing.assert_close((variance_J * told_J.square()).sum(), variance_J.sum(), rtol=1e-3, atol=0)


def test_inputs_that_tell_nothing_by_themselves_have_half_a_say(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        relevance, "squared_correlations", lambda *_: ([torch.eye(INPUTS)[0], torch.eye(INPUTS)[1]], torch.ones(INPUTS))
    )
    told_J = weights(x, monkeypatch, one=(x[:, 0] > 2).float(), other=(x[:, 1] > 2).float())
    assert told_J is not None
    silent = told_J[2:].square()
    torch.testing.assert_close(silent, silent[:1].expand(INPUTS - 2))
    torch.testing.assert_close(INPUTS * silent[0], told_J.square().sum() / 2)


def test_nothing_is_weighed_by_labels_that_say_nothing(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights(x, monkeypatch, constant=torch.ones(COUNT)) is None
    assert weights(x, monkeypatch, missing=torch.full((COUNT,), torch.nan)) is None


def test_sets_that_are_all_empty_have_no_columns() -> None:
    nobody = SetLabels(torch.ones(3, dtype=torch.bool), torch.zeros(4, dtype=torch.int64), torch.zeros(0).long())
    assert target_columns(nobody)[1].shape == (3, 0)
