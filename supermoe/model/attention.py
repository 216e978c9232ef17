"""Rotary self-attention of events and of indicators, with one set of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supermoe import ops
from supermoe.model.gradient import share_gradient

PERIODS = (1 / 24, 4 * 365.25)  # days: the shortest and the longest that time is told by
INDEX_BASE = 10_000.0


@dataclass(frozen=True)
class EventLayout:
    """Where the N events of a history pass stand: the same in all layers."""

    turn: Tensor  # of the N events; see `Rotary`
    offsets_S: Tensor  # of the N events
    known_offsets_S: Tensor  # of the past and the new events together; the same tensor where there is no past
    merge: Tensor | None  # order of the rows of cat([past, new]); None where there is no past
    packing: ops.Packing  # of `offsets_S`


@dataclass(frozen=True)
class IndicatorLayout:
    """Where the M tokens of an indicator pass stand: each sees the first `visible_M` events of its read."""

    turn: Tensor  # of the M tokens; see `Rotary`
    offsets_S: Tensor  # of the known events
    read_M: Tensor
    visible_M: Tensor
    packing: ops.IndicatorPacking  # of the three above


@dataclass(frozen=True)
class KeyValues:
    """What a block remembers of the events it has read: all that later events and questions need."""

    k_NHA: Tensor
    v_NHA: Tensor

    def with_gradient(self, share: float) -> KeyValues:
        """The same values, through which only a share of the gradient flows back."""
        if share == 0:
            return KeyValues(self.k_NHA.detach(), self.v_NHA.detach())
        return KeyValues(share_gradient(self.k_NHA, share), share_gradient(self.v_NHA, share))


class Rotary(nn.Module):
    """Half of the pairs of a head rotate with the event's index, half with its time.

    Attention then depends on how many events and on how many days lie between two rows. Time periods are log-spaced
    from an hour to four years, so days relative to the read's first event are exact enough in fp32.
    """

    index_freq: Tensor
    time_freq: Tensor

    def __init__(self, head_dim: int):
        super().__init__()
        pairs = head_dim // 4
        index_freq = INDEX_BASE ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        shortest, longest = map(math.log, PERIODS)
        time_freq = 2 * math.pi * torch.linspace(-shortest, -longest, pairs, dtype=torch.float64).exp()
        self.register_buffer("index_freq", index_freq.float(), persistent=False)
        self.register_buffer("time_freq", time_freq.float(), persistent=False)

    def forward(self, index_N: Tensor, seconds_N: Tensor) -> Tensor:
        """Index in the read and seconds since its first event -> exp(i angle) of every pair, complex [N, A / 2]."""
        days_N = (seconds_N.double() / 86400).to(self.time_freq.dtype)
        angle_NA = torch.cat([index_N[:, None] * self.index_freq, days_N[:, None] * self.time_freq], dim=1)
        return torch.complex(angle_NA.cos(), angle_NA.sin())


def rotate(x_NHA: Tensor, turn_NA: Tensor) -> Tensor:
    """Turn the pairs (x_2i, x_2i+1) of every head by their angles: complex numbers do it in one pass."""
    pairs = torch.view_as_complex(x_NHA.to(turn_NA.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn_NA[:, None]).flatten(-2).to(x_NHA.dtype)


class Attention(nn.Module):
    """Multi-head attention: causal among a read's events, and of an indicator over the events it may see."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def history(self, x_ND: Tensor, layout: EventLayout, past: KeyValues | None) -> tuple[Tensor, KeyValues]:
        """Outputs y_ND of new events, and the keys and values of past and new events together, read by read."""
        q_NHA, k_NHA, v_NHA = self._project(x_ND, layout.turn)
        known = _join(past, k_NHA, v_NHA, layout)
        offsets = layout.offsets_S, layout.known_offsets_S
        o_NHA = ops.history_attention(q_NHA, known.k_NHA, known.v_NHA, *offsets, packing=layout.packing)
        return self.out(o_NHA.flatten(1)), known

    def remember(self, x_ND: Tensor, layout: EventLayout, past: KeyValues | None) -> KeyValues:
        """The keys and values that `history` gives, without its outputs."""
        kv_ND = F.linear(x_ND, self.qkv.weight[self.qkv.in_features :])
        k_NHA, v_NHA = kv_ND.view(len(x_ND), 2, self.heads, self.head_dim).unbind(1)
        return _join(past, rotate(k_NHA, layout.turn), v_NHA, layout)

    def indicators(self, x_MD: Tensor, layout: IndicatorLayout, known: KeyValues) -> Tensor:
        """Each indicator attends to the events it may see and to itself -> y_MD."""
        q_MHA, k_MHA, v_MHA = self._project(x_MD, layout.turn)
        keys = k_MHA, v_MHA, known.k_NHA, known.v_NHA
        where = layout.offsets_S, layout.read_M, layout.visible_M
        o_MHA = ops.indicator_attention(q_MHA, *keys, *where, packing=layout.packing)
        return self.out(o_MHA.flatten(1))

    def _project(self, x_ND: Tensor, turn_NA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values."""
        # `unbind` gathers one gradient of all three; slices would each fill a tensor of their own with zeros.
        q_NHA, k_NHA, v_NHA = self.qkv(x_ND).view(len(x_ND), 3, self.heads, self.head_dim).unbind(1)
        return rotate(q_NHA, turn_NA), rotate(k_NHA, turn_NA), v_NHA


def _join(past: KeyValues | None, k_NHA: Tensor, v_NHA: Tensor, layout: EventLayout) -> KeyValues:
    """Keys and values of the past and of new events, read by read."""
    if past is None:
        return KeyValues(k_NHA, v_NHA)
    return KeyValues(torch.cat([past.k_NHA, k_NHA])[layout.merge], torch.cat([past.v_NHA, v_NHA])[layout.merge])
