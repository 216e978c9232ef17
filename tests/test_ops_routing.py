from __future__ import annotations

import pytest
import torch

from supermoe.ops import reference, routing


def logits(num_tokens: int = 63, experts: int = 5) -> torch.Tensor:
    return torch.randn(num_tokens, experts, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [0, 1, 63])
def test_chooses_as_the_reference(score: str, k: int, num_tokens: int) -> None:
    bias_E = torch.tensor([0.0, 0.3, -0.2, 0.1, 0.0])
    for bias in (None, bias_E):
        ours, theirs = (module.route(logits(num_tokens), k, score, bias) for module in (routing, reference))
        assert torch.equal(ours.expert_NK, theirs.expert_NK)
        assert torch.equal(ours.weight_NK, theirs.weight_NK)
        assert torch.equal(ours.counts_E, theirs.counts_E)


@pytest.mark.parametrize("k", [1, 2])
def test_gradcheck(k: int) -> None:
    leaf = logits(7).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: routing.route(x, k).weight_NK, leaf)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_token_without_finite_scores_spoils_itself_alone(score: str, k: int) -> None:
    spoilt = logits()
    spoilt[3, 1], spoilt[8] = torch.nan, torch.nan
    found, clean = routing.route(spoilt, k, score), routing.route(logits(), k, score)
    others = torch.ones(63, dtype=torch.bool).index_fill(0, torch.tensor([3, 8]), False)
    assert found.weight_NK[~others].isnan().any(dim=1).all()
    assert torch.equal(found.weight_NK[others], clean.weight_NK[others])
    for chosen in found.expert_NK[~others].tolist():
        assert len({e for e in chosen if 0 <= e < 5}) == k


def test_ties_choose_different_experts() -> None:
    chosen = routing.route(torch.zeros(4, 3), 2).expert_NK
    assert (chosen[:, 0] != chosen[:, 1]).all()


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot choose k = 2 of 1 experts"):
        routing.route(logits(experts=1), 2)
