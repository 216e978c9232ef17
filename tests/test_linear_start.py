from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_run import make_task
from torch import Tensor

from supermoe.data.schema import LabelSchema
from supermoe.data.store import SPLITS
from supermoe.model.heads import DIRECT_PRIOR, LinearHead
from supermoe.training.linear_start import PRIORS, fit_direct

USERS, CUTS, INPUTS = 400, 3, 12  # every user is asked at two training cuts and at a test cut, in a shuffled store


@pytest.fixture(scope="module")
def examples() -> SimpleNamespace:
    order = np.random.default_rng(0).permutation(USERS * CUTS)
    cut = np.tile(np.arange(CUTS), USERS)[order]
    split = np.where(cut < CUTS - 1, SPLITS["train"], SPLITS["test"])
    return SimpleNamespace(user=np.repeat(np.arange(USERS), CUTS)[order], cut=cut, split=split)


@pytest.fixture(scope="module")
def x(examples: SimpleNamespace) -> Tensor:
    """Inputs of all examples; those that may not be read are NaN."""
    x_UX = torch.randn(USERS, INPUTS, generator=torch.Generator().manual_seed(0))
    x_NX = x_UX[examples.user]
    x_NX[torch.from_numpy(examples.cut != CUTS - 2)] = torch.nan
    return x_NX


def fit(
    examples: SimpleNamespace, x: Tensor, label_U: np.ndarray, direct_dim: int = INPUTS
) -> tuple[LinearHead, object]:
    label = label_U[examples.user].astype(np.float32)
    rows = np.flatnonzero(examples.split == SPLITS["train"])
    store = SimpleNamespace(examples=examples, labels={"y": label}, rows_of=lambda split: rows)
    task = make_task("binary", "y", label=LabelSchema(kind="number"))
    task.fit_prior(torch.from_numpy(label[rows]))
    task.num_users = int((~np.isnan(label_U)).sum())
    head = LinearHead(4, 1, [], dropout=0, direct_dim=direct_dim)
    task.init_head(head)
    fit_direct(head, task, store, lambda examples: x[examples], seed=0)
    return head, task


def labels(x: Tensor, examples: SimpleNamespace, strength: float) -> np.ndarray:
    """Drawn from a logistic model; a tenth of the users have none."""
    seen = examples.cut == CUTS - 2
    x_UX = torch.zeros(USERS, INPUTS).index_copy(0, torch.from_numpy(examples.user[seen]), x[seen])
    rng = np.random.default_rng(1)
    chance_U = torch.sigmoid(strength * x_UX[:, :3].sum(1)).numpy()
    return np.where(rng.random(USERS) < 0.9, rng.random(USERS) < chance_U, np.nan)


def test_strong_signals_get_a_weak_prior_and_noise_a_strong_one(examples: SimpleNamespace, x: Tensor) -> None:
    clear, _ = fit(examples, x, labels(x, examples, strength=8.0))
    noise, _ = fit(examples, x, labels(x, examples, strength=0.0))
    assert clear.direct_prior <= 6.0
    assert noise.direct_prior == max(PRIORS)
    assert noise.direct_CX.abs().max() < 0.02
    told = clear.direct_CX[0]
    assert told[:3].min() > 3 * told[3:].abs().max()


def test_the_start_is_the_optimum_of_the_loss_with_the_heads_own_penalty(examples: SimpleNamespace, x: Tensor) -> None:
    label_U = labels(x, examples, strength=2.0)
    head, task = fit(examples, x, label_U)
    rows = np.flatnonzero((examples.cut == CUTS - 2) & ~np.isnan(label_U[examples.user]))
    label = torch.from_numpy(label_U[examples.user[rows]]).float()
    weight, bias = (p.detach().double().requires_grad_() for p in (head.direct_CX, head.bias))
    loss = task.losses(F.linear(x[rows].double(), weight, bias), label.double()).mean()
    (loss + head.direct_prior / task.num_users * weight.square().sum()).backward()
    # a start at the prior has gradients of about 0.1; fp32 steps end where they no longer lower the loss
    assert weight.grad.abs().max() < 1e-3
    assert bias.grad.abs().max() < 1e-3


def test_a_head_without_anything_to_learn_stays_at_the_prior(examples: SimpleNamespace, x: Tensor) -> None:
    head, task = fit(examples, x, np.ones(USERS))
    assert (head.direct_CX == 0).all()
    assert head.direct_prior == DIRECT_PRIOR
    assert head.bias.item() == pytest.approx(torch.logit(task.prior).item())


def test_a_log_without_features_keeps_the_prior(examples: SimpleNamespace, x: Tensor) -> None:
    head, task = fit(examples, x, labels(x, examples, strength=8.0), direct_dim=0)
    assert head.bias.item() == pytest.approx(torch.logit(task.prior).item())


def test_two_labels_are_enough_to_start_from(examples: SimpleNamespace, x: Tensor) -> None:
    label_U = np.full(USERS, np.nan)
    label_U[[0, 5]] = [0, 1]
    head, _ = fit(examples, x, label_U)
    assert head.direct_CX.isfinite().all()
    assert head.direct_prior in PRIORS
