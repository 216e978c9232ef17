from __future__ import annotations

import pytest
import torch
from ops_checks import assert_as_exact_as_torch, assert_same, values_and_grads
from torch import Tensor

from supermoe.ops import cross_entropy, reference

NUM_CLASSES, DIM = 50, 6


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, so that 63 and 100 rows are several and the last is short."""
    monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(cross_entropy, "_MIN_ROWS", 16)


def operands(num_rows: int, bias: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    shapes = [(num_rows, DIM), (NUM_CLASSES, DIM), (NUM_CLASSES,)][: 3 if bias else 2]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def targets_for(num_rows: int, ignored: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    target = torch.randint(0, NUM_CLASSES, (num_rows,), generator=generator)
    return target.masked_fill(torch.rand(num_rows, generator=generator) < ignored, -1)


def sets_for(num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    sizes = torch.randint(0, 5, (num_rows,), generator=generator)
    ids = [torch.randperm(NUM_CLASSES, generator=generator)[:size] for size in sizes.tolist()]
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]), torch.cat(
        [*ids, torch.zeros(0, dtype=torch.int64)]
    )


def single(module: object, target: Tensor, precision: torch.dtype | None = None):
    return lambda x, w, b=None: module.linear_cross_entropy(x, w, b, target, precision)


def multiple(module: object, offsets: Tensor, ids: Tensor):
    return lambda x, w, b=None: module.linear_cross_entropy_sets(x, w, b, offsets, ids)


@pytest.mark.parametrize("num_rows", [0, 1, 63, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_agrees_with_the_reference(num_rows: int, bias: bool, weighted: bool) -> None:
    weights = torch.linspace(-1, 2, num_rows, dtype=torch.float64) if weighted else None
    inputs, target, sets = operands(num_rows, bias), targets_for(num_rows), sets_for(num_rows)
    assert_same(single(cross_entropy, target), single(reference, target), inputs, weights)
    assert_same(multiple(cross_entropy, *sets), multiple(reference, *sets), inputs, weights)


def test_ignored_rows_have_no_loss_and_no_gradient() -> None:
    loss, dx, dw, db = values_and_grads(single(cross_entropy, torch.full((5,), -1)), operands(5))
    assert not loss.any()
    assert not dx.any()
    assert not dw.any()
    assert not db.any()


def test_a_set_of_one_is_a_single_target() -> None:
    inputs, target = operands(63), targets_for(63, ignored=0)
    assert_same(multiple(cross_entropy, torch.arange(64), target), single(cross_entropy, target), inputs)


def test_a_uniform_gradient_scales() -> None:
    inputs, target = operands(63), targets_for(63)
    plain = values_and_grads(single(cross_entropy, target), inputs)
    scaled = values_and_grads(lambda *x: 3 * single(cross_entropy, target)(*x), inputs)
    for ours, expected in zip(scaled, plain, strict=True):
        torch.testing.assert_close(ours, 3 * expected)


def test_losses_beyond_the_range_of_probabilities() -> None:
    x_ND, weight_VD = operands(20, bias=False)
    inputs = [(100 * x_ND).float(), weight_VD.float()]  # p of most targets underflows fp32
    target = targets_for(20, ignored=0)
    loss = single(cross_entropy, target)(*inputs)
    assert loss.max() > 100
    torch.testing.assert_close(loss, single(reference, target)(*inputs), rtol=1e-5, atol=1e-4)  # fp32 sums of 1e3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    target, sets = targets_for(100), sets_for(100)
    assert_as_exact_as_torch(single(cross_entropy, target), single(reference, target), operands(100), dtype)
    assert_as_exact_as_torch(multiple(cross_entropy, *sets), multiple(reference, *sets), operands(100), dtype)


def test_bf16_products_leave_fp32_parameters_and_loss() -> None:
    inputs, target = [x.float() for x in operands(100)], targets_for(100)
    rough = values_and_grads(single(cross_entropy, target, torch.bfloat16), inputs)
    exact = values_and_grads(single(cross_entropy, target), inputs)
    for ours, expected in zip(rough, exact, strict=True):
        assert ours.dtype == torch.float32
        # logits up to 10 are rounded by 1/512 of themselves, which moves p by up to 4 %
        assert (ours - expected).norm() <= 0.02 * expected.norm()


def test_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in operands(20)]
    assert torch.autograd.gradcheck(single(cross_entropy, targets_for(20)), leaves)
    assert torch.autograd.gradcheck(multiple(cross_entropy, *sets_for(20)), leaves)


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    inputs, target = operands(20), targets_for(20)
    with torch.no_grad():
        loss = single(cross_entropy, target)(*inputs)
    torch.testing.assert_close(loss, single(reference, target)(*inputs))
