"""Routers: choice, balance, precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from supermoe import ops
from supermoe.model.routers import REGISTRY, Router
from supermoe.typed_yaml import build, resolve

SEAT = "supermoe.model.routers"


def make_router(kind: str = "softmax", experts: int = 4, top_k: int = 2, **options: Any) -> Router:
    torch.manual_seed(0)
    config = resolve(SEAT, kind).Config(**options)
    return build(SEAT, config, dim=8, experts=experts, top_k=top_k)


def make_tokens(num_tokens: int = 50) -> Tensor:
    return torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_weights_are_scores_normalised_over_the_chosen(kind: str) -> None:
    router, x_ND = make_router(kind), make_tokens()
    routing = router(x_ND)
    logits_NE = x_ND @ router.weight.t()
    scores_NE = logits_NE.softmax(1) if kind == "softmax" else logits_NE.sigmoid()
    chosen_NK = scores_NE.gather(1, routing.expert_NK)
    assert torch.equal(routing.expert_NK, scores_NE.topk(2).indices)
    torch.testing.assert_close(routing.weight_NK, chosen_NK / chosen_NK.sum(1, keepdim=True))
    torch.testing.assert_close(routing.probs_NE, scores_NE)
    assert routing.counts_E.tolist() == torch.bincount(routing.expert_NK.flatten(), minlength=4).tolist()


def test_selection_bias_changes_the_choice_but_not_the_weights() -> None:
    router, x_ND = make_router(), make_tokens()
    router.bias_E += torch.tensor([0.0, 0.0, 0.0, 10.0])
    routing = router(x_ND)
    assert (routing.expert_NK == 3).any(1).all()
    scores_NE = (x_ND @ router.weight.t()).softmax(1)
    chosen_NK = scores_NE.gather(1, routing.expert_NK)
    torch.testing.assert_close(routing.weight_NK, chosen_NK / chosen_NK.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_bias_updates_even_out_a_skewed_router(kind: str) -> None:
    router = make_router(kind, bias_rate=2e-3)
    x_ND = make_tokens(400) + 1
    with torch.no_grad():
        router.weight *= 10
        router.weight[:2] += 0.2  # most tokens want experts 0 and 1
    before = router(x_ND).counts_E
    for _ in range(400):
        router.update(router(x_ND).counts_E)
    after = router(x_ND).counts_E
    assert before.max() > 1.6 * before.float().mean()
    assert after.max() < 1.1 * after.float().mean()


@pytest.mark.parametrize("balance", ["aux", "none"])
def test_without_bias_balancing_update_does_nothing(balance: str) -> None:
    router = make_router(balance=balance)
    router.update(torch.tensor([9, 1, 0, 0]))
    assert not router.bias_E.any()


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_auxiliary_loss_is_its_weight_when_even_and_its_gradient_evens(kind: str) -> None:
    router = make_router(kind, balance="aux", aux_weight=0.5, z_weight=0.0)
    with torch.no_grad():
        router.weight.zero_()
    # All scores are equal: P_e = 1/E, and sum_e f_e = 1 whatever the choice.
    torch.testing.assert_close(router(make_tokens()).aux_loss, torch.tensor(0.5))

    with torch.no_grad():
        router.weight[0] += 0.4
    x_ND = make_tokens() + 1
    losses, loads = [], []
    for _ in range(100):
        routing = router(x_ND)
        (gradient,) = torch.autograd.grad(routing.aux_loss, router.weight)
        losses.append(float(routing.aux_loss.detach()))
        loads.append(int(routing.counts_E[0]))
        with torch.no_grad():
            router.weight -= gradient
    assert losses[-1] < losses[0]
    assert loads[0] == len(x_ND)
    assert loads[-1] < 0.7 * loads[0]


def test_z_loss_is_the_mean_squared_logsumexp_and_differentiable() -> None:
    router, x_ND = make_router(balance="none", z_weight=0.1), make_tokens()
    loss = router(x_ND).aux_loss
    torch.testing.assert_close(loss, 0.1 * (x_ND @ router.weight.t()).logsumexp(1).square().mean())
    (gradient,) = torch.autograd.grad(loss, router.weight)
    assert gradient.abs().max() > 0


def test_statistics_of_the_back_end_take_the_place_of_the_scores() -> None:
    router, logits_NE = make_router(balance="aux", z_weight=1.0, aux_weight=1.0), torch.randn(50, 4)
    routing = ops.route(logits_NE, 2)
    z, mean_score_E = logits_NE.logsumexp(1).square().mean(), routing.probs_NE.mean(0)
    known = replace(routing, probs_NE=routing.probs_NE.new_empty(0), z=z, mean_score_E=mean_score_E)
    torch.testing.assert_close(router.losses(logits_NE, known), router.losses(logits_NE, routing))


def test_no_tokens_have_no_loss() -> None:
    routing = make_router(balance="aux")(torch.zeros(0, 8))
    assert routing.aux_loss.item() == 0
    assert routing.counts_E.tolist() == [0, 0, 0, 0]


def test_router_stays_in_fp32_under_bf16_autocast() -> None:
    router, x_ND = make_router(balance="aux"), make_tokens().bfloat16()
    plain = router(x_ND)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_ND)
    assert routing.probs_NE.dtype == routing.weight_NK.dtype == routing.aux_loss.dtype == torch.float32
    assert torch.equal(routing.probs_NE, plain.probs_NE)
    assert torch.equal(routing.aux_loss, plain.aux_loss)


def test_selection_bias_is_part_of_the_state() -> None:
    router = make_router()
    router.update(torch.tensor([9, 1, 0, 0]))
    other = make_router()
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.bias_E, torch.tensor([-1e-3, 1e-3, 1e-3, 1e-3]))
