"""Every rule against its paper's equation in fp64: gradients by autograd, optimiser steps by torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from supermoe.objectives.balancer import Balancer, Step, to_one
from supermoe.objectives.task_weighting import DWA, FAMO, STCH, GradNorm, Uncertainty

NAMES = ["churn", "spend", "age"]


def make(cls: type, **options) -> Balancer:
    return cls(cls.Config(**options), names=NAMES)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ask(balancer: Balancer, loss_T: Tensor, after_T: Tensor | None = None, norm_T: Tensor | None = None) -> Tensor:
    """The answer to a step with these losses, and gradients of these norms at right angles."""
    gram_TT = None if norm_T is None else norm_T.square().diag()
    balancer.weight_T = balancer(Step(loss_T, torch.ones(3).double(), gram_TT, after_T))
    return balancer.weight_T


def losses(steps: int, seed: int = 0) -> Tensor:
    """Random losses of three tasks -> [steps, 3]."""
    return torch.rand(steps, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.2


def test_uncertainty_descends_on_its_loss() -> None:
    balancer, s_T = make(Uncertainty, lr=0.1), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([s_T], lr=0.1)
    for loss_T in losses(6):
        weight_T = ask(balancer, loss_T)
        optimizer.zero_grad()
        (loss_T / (2 * s_T.exp()) + s_T / 2).sum().backward()
        optimizer.step()
        torch.testing.assert_close(balancer.s_T, s_T.detach())
        torch.testing.assert_close(weight_T, to_one(1 / (2 * s_T.detach().exp())))


def test_uncertainty_ends_at_weights_inverse_to_constant_losses() -> None:
    balancer, loss_T = make(Uncertainty, lr=0.05), vector(0.5, 1.0, 4.0)
    for _ in range(400):
        ask(balancer, loss_T)
    torch.testing.assert_close(balancer.weight_T, to_one(1 / loss_T), rtol=1e-3, atol=0)  # Adam still trembles


def test_dwa_is_a_softmax_of_the_ratios_of_mean_losses() -> None:
    balancer, loss_KT = make(DWA, temperature=2.0, period=2), losses(6)
    answers = [ask(balancer, loss_T) for loss_T in loss_KT]
    for answer in answers[:3]:
        torch.testing.assert_close(answer, vector(1 / 3, 1 / 3, 1 / 3))  # the paper: r = 1 in the first two periods
    for step, (before, last) in ((3, (0, 2)), (4, (0, 2)), (5, (2, 4))):
        ratio_T = loss_KT[last : last + 2].mean(0) / loss_KT[before : before + 2].mean(0)
        torch.testing.assert_close(answers[step], to_one((ratio_T / 2).exp()))


def test_gradnorm_descends_on_its_loss() -> None:
    balancer = make(GradNorm, alpha=1.5, lr=0.02)
    weight_T = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight_T], lr=0.02)
    first_T = losses(6)[0]
    for loss_T, norm_T in zip(losses(6), losses(6, seed=1), strict=True):
        ask(balancer, loss_T, norm_T=norm_T)
        rate_T = (loss_T / first_T) / (loss_T / first_T).mean()
        size_T = weight_T * norm_T
        target_T = (size_T.mean() * rate_T**1.5).detach()
        optimizer.zero_grad()
        (size_T - target_T).abs().sum().backward()
        optimizer.step()
        weight_T.data *= 3 / weight_T.data.sum()
        torch.testing.assert_close(balancer.weight_T, weight_T.detach() / 3)


def test_gradnorm_ends_with_equal_norms_at_equal_rates() -> None:
    balancer, norm_T = make(GradNorm, lr=0.01), vector(1.0, 2.0, 4.0)
    for _ in range(600):
        ask(balancer, vector(0.5, 0.5, 0.5), norm_T=norm_T)
    torch.testing.assert_close(balancer.weight_T, to_one(1 / norm_T), rtol=0.05, atol=0)  # steps of 1 % do not settle


def test_famo_is_its_algorithm() -> None:
    balancer, xi_T = make(FAMO, lr=0.1, decay=0.01), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([xi_T], lr=0.1, weight_decay=0.01)
    for before_T, after_T in zip(losses(6), losses(6, seed=1), strict=True):
        weight_T = ask(balancer, before_T, after_T)
        fall_T = before_T.log() - after_T.log()
        optimizer.zero_grad()
        (xi_T.softmax(0) @ fall_T).backward()
        optimizer.step()
        torch.testing.assert_close(balancer.xi_T, xi_T.detach())
        z_T = xi_T.detach().softmax(0)
        torch.testing.assert_close(weight_T, (z_T / after_T) / (z_T / after_T).sum())


def test_famo_gives_weight_to_the_loss_that_falls_least() -> None:
    balancer, loss_T = make(FAMO), vector(1.0, 1.0, 1.0)
    for _ in range(30):
        ask(balancer, loss_T, loss_T * vector(0.9, 0.99, 0.9))
    assert balancer.weight_T.argmax() == 1


def test_stch_weights_are_the_gradient_of_the_smooth_maximum() -> None:
    balancer, loss_KT = make(STCH, mu=0.5, warmup=3), losses(5)
    answers = [ask(balancer, loss_T) for loss_T in loss_KT]
    nadir_T = loss_KT[:3].mean(0)
    for step, answer in enumerate(answers):
        loss_T = loss_KT[step].clone().requires_grad_()
        smooth = 0.5 * ((loss_T / nadir_T).log() / 0.5).exp().sum().log()
        (loss_T.log().sum() if step < 3 else smooth).backward()
        torch.testing.assert_close(answer, to_one(loss_T.grad))


@pytest.mark.parametrize("cls", [Uncertainty, DWA, GradNorm, FAMO, STCH])
def test_a_task_that_is_not_asked_neither_moves_nor_breaks_anything(cls: type) -> None:
    """Also one that is not asked in the first steps, or ever."""
    options = {DWA: {"period": 2}, STCH: {"warmup": 2}}.get(cls, {})
    balancer = make(cls, **options)
    for step, loss_T in enumerate(losses(8)):
        loss_T[2], loss_T[0] = math.nan, math.nan if step in (0, 4) else loss_T[0]
        norm_T = torch.where(loss_T.isnan(), 0.0, 1.0)
        weight_T = ask(balancer, loss_T, loss_T * 0.9, norm_T)
        assert bool((weight_T > 0).all())
        assert float(weight_T.sum()) == pytest.approx(1)
    moved = {name: value for name, value in balancer.state_dict().items() if name in ("s_T", "xi_T", "adam.mean_T")}
    assert all(value[2] == 0 for value in moved.values())
    if cls in (GradNorm, FAMO, Uncertainty):
        assert balancer.adam.steps_T.tolist() == [6, 8, 0]
