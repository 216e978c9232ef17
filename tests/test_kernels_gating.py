from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from kernel_tests import DEVICE, needs_device
from torch import Tensor

from supermoe.ops import reference, triton_moe

pytestmark = needs_device
ROUNDING = 2e-6  # a few dozen fp32 operations on numbers of order 1


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def logits(num_tokens: int, num_experts: int) -> Tensor:
    return 2 * torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k"), [(0, 4, 2), (1, 1, 1), (63, 6, 1), (63, 6, 3), (900, 8, 2), (5, 300, 2)]
)
def test_agrees_with_the_reference(score: str, num_tokens: int, num_experts: int, k: int) -> None:
    logits_NE = logits(num_tokens, num_experts)
    bias_E = 0.1 * logits(1, num_experts)[0]
    leaf, exact = logits_NE.clone().to(DEVICE).requires_grad_(), logits_NE.double().requires_grad_()
    ours = triton_moe.route(leaf, k, score, bias_E.to(DEVICE))
    theirs = reference.route(exact, k, score, bias_E.double())
    assert torch.equal(ours.expert_NK.cpu(), theirs.expert_NK)
    assert torch.equal(ours.counts_E.cpu(), theirs.counts_E)
    floats = [ours.weight_NK, ours.probs_NE]
    exact_floats = [theirs.weight_NK, theirs.probs_NE]
    if num_tokens:
        floats += [ours.mean_score_E, ours.z]
        exact_floats += [F.normalize(theirs.probs_NE, p=1, dim=1).mean(0), exact.logsumexp(1).square().mean()]
    total, exact_total = torch.zeros((), device=DEVICE), torch.zeros((), dtype=torch.float64)
    for found, expected in zip(floats, exact_floats, strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=ROUNDING, atol=ROUNDING)
        seesaw = torch.linspace(-1, 2, found.numel()).reshape(found.shape)
        total = total + (found * seesaw.to(DEVICE)).sum()
        exact_total = exact_total + (expected * seesaw.double()).sum()
    total.backward()
    exact_total.backward()
    torch.testing.assert_close(leaf.grad.cpu().double(), exact.grad, rtol=ROUNDING, atol=ROUNDING)


def test_gradient_of_the_weights_alone() -> None:
    leaf = logits(63, 6).to(DEVICE).requires_grad_()
    triton_moe.route(leaf, 1).weight_NK.sum().backward()  # a gradient of stride 0
    exact = logits(63, 6).double().requires_grad_()
    reference.route(exact, 1).weight_NK.sum().backward()
    torch.testing.assert_close(leaf.grad.cpu().double(), exact.grad, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_logits_that_are_not_finite_harm_their_own_token_only() -> None:
    logits_NE = logits(5, 6)
    logits_NE[1, 2], logits_NE[3, 0] = torch.nan, torch.inf
    routing = triton_moe.route(logits_NE.to(DEVICE), 3)
    for experts in routing.expert_NK.tolist():
        assert len(set(experts) & set(range(6))) == 3
    finite = routing.weight_NK.isfinite().all(1).tolist()
    assert finite == [True, False, True, False, True]


def test_probabilities_of_zero_are_finite_scores() -> None:
    logits_NE = torch.tensor([[0.0, -300.0, -200.0]])
    routing = triton_moe.route(logits_NE.to(DEVICE), 2)
    assert routing.expert_NK[0, 0] == 0
    assert routing.weight_NK.cpu().tolist() == [[1.0, 0.0]]
