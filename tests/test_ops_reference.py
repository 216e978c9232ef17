from __future__ import annotations

import math

import pytest
import torch

from supermoe.ops import reference


def logits(num_tokens: int = 63, experts: int = 5) -> torch.Tensor:
    return torch.randn(num_tokens, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [2, 5])
def test_routes_to_the_best_scores_with_normalised_weights(score: str, k: int) -> None:
    routing = reference.route(logits(), k, score)
    probs = logits().softmax(dim=1) if score == "softmax" else logits().sigmoid()
    best = probs.sort(dim=1, descending=True)
    torch.testing.assert_close(routing.probs_NE, probs)
    assert torch.equal(routing.expert_NK, best.indices[:, :k])
    torch.testing.assert_close(routing.weight_NK, best.values[:, :k] / best.values[:, :k].sum(dim=1, keepdim=True))
    assert torch.equal(routing.counts_E, torch.stack([(routing.expert_NK == e).sum() for e in range(5)]))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_choice_keeps_its_score_and_so_the_gradient(score: str) -> None:
    leaf = logits().requires_grad_()
    routing = reference.route(leaf, 1, score)
    torch.testing.assert_close(routing.weight_NK, routing.probs_NE.amax(dim=1, keepdim=True))
    routing.weight_NK.sum().backward()
    assert leaf.grad.abs().min(dim=1).values.max() > 0 or score == "sigmoid"
    assert leaf.grad.abs().amax(dim=1).min() > 0


def test_bias_takes_part_in_the_choice_only() -> None:
    bias = torch.tensor([0.0, 0, 0, 0, 10])
    routing = reference.route(logits(), 2, bias_E=bias)
    assert (routing.expert_NK[:, 0] == 4).all()
    assert routing.counts_E[4] == 63
    chosen = reference.route(logits(), 5).probs_NE.gather(1, routing.expert_NK)
    torch.testing.assert_close(routing.weight_NK, chosen / chosen.sum(dim=1, keepdim=True))


def test_weights_of_improbable_experts_are_finite() -> None:
    far = torch.tensor([[-500.0, -501.0, -502.0]])
    weight = reference.route(far, 2, "sigmoid").weight_NK
    torch.testing.assert_close(weight, torch.tensor([[1.0, math.exp(-1)]]) / (1 + math.exp(-1)))


def test_routes_no_tokens() -> None:
    routing = reference.route(logits()[:0], 2)
    assert routing.expert_NK.shape == routing.weight_NK.shape == (0, 2)
    assert routing.counts_E.tolist() == [0] * 5


@pytest.mark.parametrize("k", [0, 6])
def test_more_choices_than_experts_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"cannot choose k = {k} of 5 experts: model\.moe\.top_k"):
        reference.route(logits(), k)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_token_without_finite_scores_spoils_itself_alone(score: str, k: int) -> None:
    spoilt = logits()
    spoilt[3, 1], spoilt[8] = torch.nan, torch.nan
    routing, clean = reference.route(spoilt, k, score), reference.route(logits(), k, score)
    others = torch.arange(63)[~torch.isin(torch.arange(63), torch.tensor([3, 8]))]
    assert routing.weight_NK[[3, 8]].isnan().any(dim=1).all()
    assert torch.equal(routing.weight_NK[others], clean.weight_NK[others])
    assert torch.equal(routing.expert_NK[others], clean.expert_NK[others])
    for chosen in routing.expert_NK[[3, 8]].tolist():
        assert len({e for e in chosen if 0 <= e < 5}) == k


@pytest.mark.parametrize("k", [1, 2])
def test_impossible_experts_are_defined(k: int) -> None:
    far = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert reference.route(far, k).weight_NK.tolist() == [[1.0, 0.0][:k]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2])
def test_route_gradcheck(score: str, k: int) -> None:
    assert torch.autograd.gradcheck(lambda x: reference.route(x, k, score).weight_NK, logits(7).requires_grad_())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="softmax or sigmoid, got 'cosine'"):
        reference.route(logits(), 1, "cosine")
    with pytest.raises(ValueError, match="got 'tanh'"):
        reference.activate(logits(), "tanh")


def test_sampled_softmax_over_every_class_is_the_full_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in [(9, 4), (20, 4), (20,)])
    target = torch.tensor([3, 0, 19, -1, 5, 5, 7, -1, 2])
    uniform = torch.full((20,), -math.log(20))  # a constant cancels
    sampled = reference.sampled_cross_entropy(x, weight, bias, target, torch.arange(20), uniform)
    torch.testing.assert_close(sampled, reference.linear_cross_entropy(x, weight, bias, target))


def test_log_q_makes_the_sampled_sum_an_unbiased_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in [(40, 4), (20, 4)])
    target = torch.randint(0, 20, (40,), generator=generator)
    q = torch.arange(1, 21) / 210
    draws = torch.multinomial(q, 40_000, replacement=True, generator=generator)
    log_q = (q * len(draws)).log()  # a class is drawn J q times, so J draws divided by J q sum up to all classes
    sampled = reference.sampled_cross_entropy(x, weight, None, target, draws, log_q)
    full = reference.linear_cross_entropy(x, weight, None, target)
    odds_against = torch.expm1(sampled) / (q * len(draws))[target]  # the target itself is not drawn: undo its own share
    assert (odds_against.log() - torch.expm1(full).log()).abs().mean() < 0.02  # 40,000 draws leave 1 to 2 %


def test_sampled_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in [(5, 3), (9, 3), (9,)]
    ]
    target, negatives = torch.tensor([1, 8, -1, 0, 4]), torch.tensor([0, 4, 4, 7])
    log_q = torch.randn(9, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: reference.sampled_cross_entropy(*x, target, negatives, log_q), leaves)


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu2", "swiglu"])
def test_activations_gradcheck(activation: str) -> None:
    assert torch.autograd.gradcheck(lambda x: reference.activate(x, activation), logits(3, 6).requires_grad_())
