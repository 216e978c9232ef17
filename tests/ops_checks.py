"""What the tests of the ops share: operands of experts, the comparison of outputs and gradients with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DIM, HIDDEN, EXPERTS = 16, 32, 4
ACTIVATIONS = ["gelu", "silu", "relu2", "swiglu"]


def operands(num_tokens: int, k: int, activation: str = "gelu", experts: int = EXPERTS) -> list[Tensor]:
    """x, combination weights and both stacks, of a size that keeps outputs of order 1."""
    generator = torch.Generator().manual_seed(num_tokens)
    columns = 2 * HIDDEN if activation == "swiglu" else HIDDEN
    shapes = [(num_tokens, DIM), (num_tokens, k), (experts, DIM, columns), (experts, HIDDEN, DIM)]
    scales = [1.0, 1.0, DIM**-0.5, HIDDEN**-0.5]
    return [s * torch.randn(*shape, generator=generator) for s, shape in zip(scales, shapes, strict=True)]


def choices(num_tokens: int, k: int, experts: int = EXPERTS) -> Tensor:
    """k different experts for every token."""
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.rand(num_tokens, experts, generator=generator).argsort(dim=1)[:, :k]


def layer(
    module: object, expert_NK: Tensor, activation: str = "gelu", low_memory: bool = False
) -> Callable[..., Tensor]:
    """A module's feed-forward of the operands, the experts chosen."""
    options = (low_memory,) if low_memory else ()
    return lambda x, g, w_in, w_out: module.expert_ffn(x, expert_NK, g, w_in, w_out, activation, *options)


def values_and_grads(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Tensor | None = None
) -> list[Tensor]:
    """Output and gradients of `(output * weights).sum()`; without weights of the sum, whose gradient has stride 0."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    loss = output.sum() if weights is None else (output * weights.to(output.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [output.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def assert_same(
    fast: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    weights: Tensor | None = None,
    tolerance: float = 1e-12,
) -> None:
    """Outputs and all gradients agree; the default tolerance is rounding in fp64 over sums of a few hundred terms."""
    pairs = zip(values_and_grads(fast, inputs, weights), values_and_grads(reference, inputs, weights), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def assert_as_exact_as_torch(
    fast: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """In `dtype`, outputs and gradients err by at most twice what plain PyTorch does in `dtype`, and one rounding."""
    low = [x.to(dtype) for x in inputs]
    truth = values_and_grads(reference, [x.double() for x in low])
    for ours, plain, exact in zip(values_and_grads(fast, low), values_and_grads(reference, low), truth, strict=True):
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + rounding
