from __future__ import annotations

import pytest
import torch

from supermoe.ops import groups
from supermoe.ops.groups import Blocks, Even, Pieces

GROUPS = {
    "pieces": (Pieces(0, 300, [1, 3], [20, 280], False), [1] * 20 + [3] * 280),
    "continued": (Pieces(0, 300, [1, 2], [270, 30], True), [1] * 270 + [2] * 30),
    "even": (Even(0, 300, 1, 4), [1] * 100 + [2] * 100 + [3] * 100),
    "blocks": (Blocks(0, 300, [2, 2, 0]), [2] * 200 + [0] * 100),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("widths", [(8, 20), (20, 8), (7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("large", [False, True])
def test_against_one_row_after_the_other(
    name: str, widths: tuple[int, int], dtype: torch.dtype, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_GATHERED", 0 if large else 1000)
    group, experts = GROUPS[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, widths[0]), (300, widths[1]), (4, *widths)]
    left, right, stack = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    product = torch.stack([row @ stack[e] for row, e in zip(left, experts, strict=True)])
    before = torch.ones_like(stack)  # what groups before left; overwritten where the group is an expert's first
    outer = before.clone()
    for e in {"pieces": [1, 3], "continued": [2], "even": [1, 2, 3], "blocks": []}[name]:
        outer[e] = 0
    outer.index_add_(0, torch.tensor(experts), left[:, :, None] * right[:, None, :])
    grad = before.to(dtype)
    group.add_outer(left.to(dtype), right.to(dtype), grad)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-12}[dtype]  # sums of 300 products of order 1
    torch.testing.assert_close(grad.double(), outer, rtol=tolerance, atol=tolerance)
    found = torch.empty(300, widths[1], dtype=dtype)
    group.product(left.to(dtype), stack.to(dtype), found)
    torch.testing.assert_close(found.double(), product, rtol=tolerance, atol=tolerance)
    turned = torch.empty(300, widths[0], dtype=dtype)
    group.product(right.to(dtype), stack.to(dtype).transpose(1, 2), turned)
    transposed = torch.stack([row @ stack[e].t() for row, e in zip(right, experts, strict=True)])
    torch.testing.assert_close(turned.double(), transposed, rtol=tolerance, atol=tolerance)
