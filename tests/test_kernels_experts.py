from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_tests import DEVICE, DTYPES, needs_device, needs_gpu
from ops_checks import assert_as_exact_as_torch, values_and_grads
from torch import Tensor

from supermoe.kernels import grouped_mm, tiles
from supermoe.kernels.tiles import Tile
from supermoe.ops import reference, triton_moe

pytestmark = needs_device
DIM, HIDDEN, EXPERTS = 24, 40, 3  # no multiples of a tile


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["tiled", "fused"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through a feed-forward, in fp32 too."""
    if request.param == "tiled":
        monkeypatch.setattr(tiles, "FUSED_WIDTH", 0)
    for kernel in ("fused_fwd", "fused_bwd"):
        monkeypatch.setitem(tiles.TILES, (kernel, 4, 64), (Tile(32, 16, 0, 4, 1),))
    return request.param


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are what the interpreter's time goes into."""
    monkeypatch.setattr(grouped_mm, "NUM_SMS", 4)


def choices(num_tokens: int, k: int, experts: int = EXPERTS) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.rand(num_tokens, experts, generator=generator).argsort(dim=1)[:, :k]


def operands(num_tokens: int, k: int, activation: str, experts: int = EXPERTS, hidden: int = HIDDEN) -> list[Tensor]:
    """x, weights of combination and both stacks, of a size that keeps outputs of order 1."""
    generator = torch.Generator().manual_seed(num_tokens)
    columns = 2 * hidden if activation == "swiglu" else hidden
    shapes = [(num_tokens, DIM), (num_tokens, k), (experts, DIM, columns), (experts, hidden, DIM)]
    scales = [1.0, 1.0, DIM**-0.5, hidden**-0.5]
    return [s * torch.randn(*shape, generator=generator).to(DEVICE) for s, shape in zip(scales, shapes, strict=True)]


def layer(function: Callable[..., Tensor], expert_NK: Tensor, *settings: object) -> Callable[..., Tensor]:
    where = expert_NK.to(DEVICE)
    return lambda x, g, w_in, w_out: function(x, where, g, w_in, w_out, *settings)


def check(
    expert_NK: Tensor, dtype: torch.dtype, activation: str = "silu", experts: int = EXPERTS, hidden: int = HIDDEN
) -> None:
    """Outputs and all gradients; that of the output, of a sum, has stride 0."""
    inputs = operands(*expert_NK.shape, activation, experts, hidden)
    ours = layer(triton_moe.expert_ffn, expert_NK, activation)
    assert_as_exact_as_torch(ours, layer(reference.expert_ffn, expert_NK, activation), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "k"), [("gelu", 1), ("silu", 2), ("relu2", 1), ("swiglu", 2)])
def test_as_exact_as_torch(path: str, activation: str, k: int, dtype: torch.dtype) -> None:
    expert_NK = choices(45, k)
    expert_NK[::7, 0] = -1
    expert_NK[5] = -1
    check(expert_NK, dtype, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uneven_loads(path: str, dtype: torch.dtype) -> None:
    check(torch.full((100, 1), 1), dtype)  # all rows on one expert, in two tiles; the others are empty
    check(torch.full((3, 2), -1), dtype)  # every row dropped
    check(choices(1, 2), dtype)
    check(torch.zeros(9, 1, dtype=torch.int64), dtype, experts=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_last_tile_half_full(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The half that lies outside must not be taken for one inside."""
    monkeypatch.setattr(tiles, "FUSED_WIDTH", 0)
    key = "up", dtype.itemsize, 64
    columns = tiles.TILES[key][0].columns
    check(choices(9, 2, 2), dtype, experts=2, hidden=columns * 3 // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(path: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in operands(0, 2, "gelu")]
    y, *grads = values_and_grads(layer(triton_moe.expert_ffn, choices(0, 2), "gelu"), inputs)
    assert y.shape == (0, DIM)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_memory_computes_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(tiles, "FUSED_WIDTH", 0)
    inputs = [x.to(dtype) for x in operands(9, 2, "swiglu")]
    saved: list[int] = []
    results = []
    for low_memory in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
            results.append(values_and_grads(layer(triton_moe.expert_ffn, choices(9, 2), "swiglu", low_memory), inputs))
        saved.append(-1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    full, low = sum(saved[: saved.index(-1)]), sum(saved[saved.index(-1) + 1 : -1])
    assert low < full


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_are_taken_as_they_are(dtype: torch.dtype) -> None:
    """Rows, weights and stacks that are not contiguous, and half of the choices."""
    inputs = operands(9, 1, "silu")
    views = [x.mT.contiguous().mT for x in inputs]
    pair = choices(9, 2)
    ours, theirs = (
        values_and_grads(layer(triton_moe.expert_ffn, experts, "silu"), [x.to(dtype) for x in tensors])
        for experts, tensors in ((pair[:, :1], views), (pair[:, :1].contiguous(), inputs))
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "hidden", "activation", "k"), [(256, 512, "gelu", 1), (512, 768, "swiglu", 2)])
def test_full_tiles_and_equal_bits(dim: int, hidden: int, activation: str, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = 2 * hidden if activation == "swiglu" else hidden
    sizes = [(6000, dim), (6000, k), (5, dim, columns), (5, hidden, dim)]
    inputs = [torch.randn(*size, generator=generator).to(DEVICE) * size[-2] ** -0.5 for size in sizes]
    inputs[0] *= 6000**0.5
    expert_NK = choices(6000, k, 5)
    ours = layer(triton_moe.expert_ffn, expert_NK, activation)
    assert_as_exact_as_torch(ours, layer(reference.expert_ffn, expert_NK, activation), inputs, dtype)
    low = [x.to(dtype) for x in inputs]
    first, second = values_and_grads(ours, low), values_and_grads(ours, low)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
def test_addresses_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 2^31 hidden values: the last tokens come out as they do alone."""
    monkeypatch.setattr(tiles, "FUSED_WIDTH", 0)
    torch.use_deterministic_algorithms(False)  # filling memory with NaN takes longer than the test
    generator = torch.Generator(DEVICE).manual_seed(0)
    num_tokens, dim, hidden, tail = 1_200_000, 64, 2048, 500
    shapes = [(num_tokens, dim), (num_tokens, 1), (2, dim, hidden), (2, hidden, dim)]
    x, g, w_in, w_out = (
        torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) * 0.1 for shape in shapes
    )
    expert_NK = torch.zeros(num_tokens, 1, dtype=torch.int64, device=DEVICE)
    x.requires_grad_()
    y = triton_moe.expert_ffn(x, expert_NK, g, w_in, w_out, "relu2")
    (dx,) = torch.autograd.grad(y.sum(), x)
    last = x.detach()[-tail:].requires_grad_()
    alone = triton_moe.expert_ffn(last, expert_NK[-tail:], g[-tail:], w_in, w_out, "relu2")
    (dlast,) = torch.autograd.grad(alone.sum(), last)
    torch.testing.assert_close(y[-tail:], alone)
    torch.testing.assert_close(dx[-tail:], dlast)
