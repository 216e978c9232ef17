"""Products of rows with the matrices of their experts, on a CPU: three ways to lay rows out, one interface.

A group holds the slots `start:end`. `product` multiplies its rows by their experts' matrices; `add_outer` puts the sum
of its rows' outer products into each expert's gradient, whose memory is not yet filled where no group did before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from supermoe.ops.grouped import grouped_mm_takes

_GATHERED = 1 << 15  # values of a matrix up to which it is copied for a batched product
_TALL = 256  # rows from which a thin product is worth being made transposed and turned


@dataclass(frozen=True)
class Pieces:
    """Rows of the experts from `first` on end to end, `counts[i]` of the i-th; nothing is padded."""

    start: int
    end: int
    first: int
    counts: list[int]
    continues: bool  # the first expert has rows in the group before, too

    def product(self, rows_RI: Tensor, stack_EIO: Tensor) -> Tensor:
        """Rows times their experts' matrices -> [rows, O]."""
        stack_eIO = stack_EIO[self.first : self.first + len(self.counts)]
        if grouped_mm_takes(rows_RI, stack_eIO):
            return F.grouped_mm(rows_RI, stack_eIO, offs=torch.tensor(self.counts).cumsum(0, dtype=torch.int32))
        out_RO = rows_RI.new_empty(len(rows_RI), stack_EIO.shape[2])
        parts = zip(stack_eIO.unbind(), rows_RI.split(self.counts), out_RO.split(self.counts), strict=True)
        for matrix_IO, rows, out in parts:
            torch.mm(rows, matrix_IO, out=out)
        return out_RO

    def add_outer(self, left_RI: Tensor, right_RO: Tensor, grad_EIO: Tensor) -> None:
        """grad[e] = left_e^T right_e, added to what the group before left there."""
        grads = grad_EIO[self.first : self.first + len(self.counts)].unbind()
        parts = zip(grads, left_RI.split(self.counts), right_RO.split(self.counts), strict=True)
        for place, (grad, left, right) in enumerate(parts):
            added = place == 0 and self.continues
            if left.shape[1] > right.shape[1] and len(left) >= _TALL:  # a third faster in MKL than the direct product
                turned = (right.t() @ left).t()
                grad.add_(turned) if added else grad.copy_(turned)
            elif added:
                grad.addmm_(left.t(), right)
            else:
                torch.mm(left.t(), right, out=grad)


@dataclass(frozen=True)
class Even:
    """The same number of rows for each of the experts `first:last`: one batched product on the stack itself."""

    start: int
    end: int
    first: int
    last: int

    def product(self, rows_RI: Tensor, stack_EIO: Tensor) -> Tensor:
        """Rows times their experts' matrices -> [rows, O]."""
        return torch.bmm(self._by_expert(rows_RI), stack_EIO[self.first : self.last]).flatten(0, 1)

    def add_outer(self, left_RI: Tensor, right_RO: Tensor, grad_EIO: Tensor) -> None:
        """grad[e] = left_e^T right_e."""
        left_EIR = self._by_expert(left_RI).transpose(1, 2)
        torch.bmm(left_EIR, self._by_expert(right_RO), out=grad_EIO[self.first : self.last])

    def _by_expert(self, rows_RI: Tensor) -> Tensor:
        return rows_RI.unflatten(0, (self.last - self.first, -1))


@dataclass(frozen=True)
class Blocks:
    """Blocks of equally many rows, block b of expert `experts[b]`; one batched product where matrices are small."""

    start: int
    end: int
    experts: list[int]

    def product(self, rows_RI: Tensor, stack_EIO: Tensor) -> Tensor:
        """Rows times their experts' matrices -> [rows, O]."""
        rows_bRI = self._by_block(rows_RI)
        if stack_EIO[0].numel() <= _GATHERED:
            return torch.bmm(rows_bRI, stack_EIO[self.experts]).flatten(0, 1)
        return torch.cat([rows @ stack_EIO[expert] for rows, expert in zip(rows_bRI, self.experts, strict=True)])

    def add_outer(self, left_RI: Tensor, right_RO: Tensor, grad_EIO: Tensor) -> None:
        """grad[e] += left_e^T right_e; every expert's gradient is filled before."""
        left_bIR, right_bRO = self._by_block(left_RI).transpose(1, 2), self._by_block(right_RO)
        if grad_EIO[0].numel() <= _GATHERED:
            grad_EIO.index_add_(0, torch.tensor(self.experts), torch.bmm(left_bIR, right_bRO))
            return
        for left, right, expert in zip(left_bIR, right_bRO, self.experts, strict=True):
            grad_EIO[expert].addmm_(left, right)

    def _by_block(self, rows_RI: Tensor) -> Tensor:
        return rows_RI.unflatten(0, (len(self.experts), -1))
