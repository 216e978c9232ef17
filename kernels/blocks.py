"""Parts of tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fits(index, LIMIT: tl.constexpr):
    """Which indices lie below LIMIT, in one of the blocks that cover it; if they fill it, all do, at no cost."""
    if LIMIT // index.shape[0] * index.shape[0] == LIMIT:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < LIMIT


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of a tile's columns: what follows needs registers for one half at a time."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
