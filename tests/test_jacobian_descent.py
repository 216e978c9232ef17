"""The aggregators of torchjd at their papers' answers, by inner products alone."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from supermoe.objectives.balancer import Step
from supermoe.objectives.balancers import REGISTRY
from supermoe.objectives.jacobian_descent import JacobianDescent
from supermoe.typed_yaml import UserError

NAMES = ["churn", "spend", "age"]
KINDS = ["pcgrad", "cagrad", "nash", "aligned", "upgrad"]


def make(kind: str, names: list[str] = NAMES, **options) -> JacobianDescent:
    pytest.importorskip("torchjd", reason="the extra `torchjd` is not installed")
    return REGISTRY[kind](REGISTRY[kind].Config(**options), names=names)


def gradients(size: int, seed: int = 0) -> Tensor:
    """Gradients that conflict in places -> [size, 5]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, dtype=torch.float64, generator=generator) * torch.arange(1, size + 1)[:, None]


CONFLICT = torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)  # inner product -2


def sent_back(kind: str, gradient_TX: Tensor, **options) -> Tensor:
    """The combination that reaches what the tasks share, with length one."""
    balancer = make(kind, NAMES[: len(gradient_TX)], **options)
    combined_X = balancer.steer(gradient_TX @ gradient_TX.t()) @ gradient_TX
    return combined_X / combined_X.norm()


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def test_pcgrad_removes_the_part_along_the_other_gradient() -> None:
    a, b = CONFLICT
    projected = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)
    torch.testing.assert_close(sent_back("pcgrad", CONFLICT), unit(projected))


def test_upgrad_is_the_mean_of_projections_that_harm_no_task() -> None:
    a, b = CONFLICT
    projected = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)  # of two, the half space of the other
    found = sent_back("upgrad", CONFLICT)
    torch.testing.assert_close(found, unit(projected), rtol=0, atol=1e-3)  # its matrix is regularised by 1e-4
    many = gradients(3, seed=3)
    assert ((many @ many.t()) < 0).any()
    assert (unit_rows(many) @ sent_back("upgrad", many) > -1e-3).all()


def unit_rows(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def test_cagrad_solves_its_dual() -> None:
    """g0 + c |g0| g_w / |g_w| where w minimises g_w g0 + c |g0| |g_w|, by trying every w of two tasks."""
    g0, c = CONFLICT.mean(0), 0.4
    share = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    mixed = share[:, None] * CONFLICT[0] + (1 - share)[:, None] * CONFLICT[1]
    g_w = mixed[(mixed @ g0 + c * g0.norm() * mixed.norm(dim=1)).argmin()]
    expected = unit(g0 + c * g0.norm() * g_w / g_w.norm())
    torch.testing.assert_close(sent_back("cagrad", CONFLICT, c=c), expected, rtol=0, atol=1e-4)


def test_nash_weights_solve_the_bargain() -> None:
    """(G G^T) w = 1 / w: the weights times what each task gains are the same for all."""
    gradient_TX = gradients(3)
    gram_TT = gradient_TX @ gradient_TX.t()
    share_T = make("nash").steer(gram_TT)
    gains_T = share_T * (gram_TT @ share_T)
    torch.testing.assert_close(gains_T / gains_T.mean(), torch.ones(3).double(), rtol=0, atol=1e-3)  # its solver's
    assert (share_T > 0).all()


def test_aligned_combines_gradients_of_equal_singular_values() -> None:
    gradient_TX = gradients(3)
    u, _, v = torch.linalg.svd(gradient_TX, full_matrices=False)
    torch.testing.assert_close(sent_back("aligned", gradient_TX), unit((u @ v).mean(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_shares_average_one_whatever_the_scale(kind: str) -> None:
    gradient_TX = gradients(3, seed=1)
    gram_TT = gradient_TX @ gradient_TX.t()
    share_T, tiny_T = make(kind).steer(gram_TT), make(kind).steer(1e-14 * gram_TT)
    assert float(share_T.abs().mean()) == pytest.approx(1)
    torch.testing.assert_close(share_T, tiny_T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_without_a_gradient_is_left_out(kind: str) -> None:
    gradient_TX = gradients(2, seed=1)
    alone_T = make(kind, NAMES[:2]).steer(gradient_TX @ gradient_TX.t())
    padded_TX = torch.stack([gradient_TX[0], torch.zeros(5).double(), gradient_TX[1]])
    share_T = make(kind).steer(padded_TX @ padded_TX.t())
    torch.testing.assert_close(share_T[[0, 2]], alone_T)
    assert share_T[1] == 1
    only_T = make(kind).steer(torch.diag(torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)))
    assert only_T.tolist() == [1.0, 1.0, 1.0]


def test_heads_weigh_the_same_and_shares_stay_between_measurements() -> None:
    balancer, gradient_TX = make("pcgrad", every=4), gradients(3, seed=1)
    share_T = balancer.steer(gradient_TX @ gradient_TX.t())
    weight_T = balancer(Step(torch.ones(3).double(), torch.ones(3).double()))
    torch.testing.assert_close(weight_T, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.equal(balancer.share_T, share_T)
    assert balancer.every == 4


def test_pcgrads_order_is_drawn_apart_from_other_random_numbers() -> None:
    gradient_TX = gradients(3, seed=5)
    gram_TT = gradient_TX @ gradient_TX.t()
    one, other, before = make("pcgrad"), make("pcgrad"), torch.get_rng_state()
    first = [one.steer(gram_TT) for _ in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert all(torch.equal(a, other.steer(gram_TT)) for a in first)
    assert len({tuple(share_T.tolist()) for share_T in first}) > 1  # and it changes


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(UserError, match=r"loss\.balancer=nash needs the extra: pip install 'supermoe\[torchjd\]'"):
        REGISTRY["nash"](REGISTRY["nash"].Config(), names=NAMES)
