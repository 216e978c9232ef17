"""Rotary attention of events and of indicators."""

from __future__ import annotations

import math

import torch
from factories import check_gradients
from torch import Tensor

from supermoe import ops
from supermoe.model.attention import Attention, EventLayout, IndicatorLayout, KeyValues, Rotary, rotate

DIM, HEADS = 16, 2
OFFSETS_S = torch.tensor([0, 4, 4, 6])
INDEX_N = torch.tensor([0, 1, 2, 3, 0, 1])
SECONDS_N = torch.tensor([0, 60, 86400, 90000, 0, 10**7])


def event_layout(index_N: Tensor = INDEX_N, seconds_N: Tensor = SECONDS_N) -> EventLayout:
    turn_NA = Rotary(DIM // HEADS).double()(index_N, seconds_N)
    return EventLayout(turn_NA, OFFSETS_S, OFFSETS_S, None, ops.pack(OFFSETS_S))


def indicator_layout(read_M: Tensor, visible_M: Tensor, seconds_M: Tensor) -> IndicatorLayout:
    turn_MA = Rotary(DIM // HEADS).double()(visible_M, seconds_M)
    return IndicatorLayout(turn_MA, OFFSETS_S, read_M, visible_M, ops.pack_indicators(OFFSETS_S, read_M, visible_M))


def make_attention() -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention(DIM, HEADS).double(), torch.randn(6, DIM, dtype=torch.float64)


def test_rotary_turns_pairs_by_index_and_by_time() -> None:
    rotary = Rotary(8).double()
    turn_NA = rotary(torch.tensor([0, 3]), torch.tensor([0, 86400]))
    assert torch.equal(turn_NA[0], torch.ones(4, dtype=torch.complex128))
    hour, four_years = 2 * math.pi * 24, 2 * math.pi / (4 * 365.25)
    angles = torch.tensor([3.0, 0.03, hour, four_years], dtype=torch.float64)
    # The frequencies are kept in fp32: 1e-7 of 151 radians.
    torch.testing.assert_close(turn_NA[1], torch.polar(torch.ones(4, dtype=torch.float64), angles), atol=2e-5, rtol=0)


def test_rotate_is_a_rotation_of_neighbouring_pairs() -> None:
    x = torch.randn(2, 1, 4, dtype=torch.float64)
    angles = torch.tensor([[0.3, 1.2], [0.0, -2.0]], dtype=torch.float64)
    left, right = x[:, 0, 0::2], x[:, 0, 1::2]
    expected = [left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()]
    rotated = rotate(x, torch.polar(torch.ones_like(angles), angles))
    torch.testing.assert_close(rotated[:, 0], torch.stack(expected, dim=-1).flatten(1))


def test_only_differences_of_index_and_time_count() -> None:
    attention, x_ND = make_attention()
    y_ND, _ = attention.history(x_ND, event_layout(), None)
    shifted, _ = attention.history(x_ND, event_layout(INDEX_N + 5, SECONDS_N + 86400 * 30), None)
    torch.testing.assert_close(shifted, y_ND, atol=1e-9, rtol=0)  # angles of up to 5,000 radians in fp64
    stretched, _ = attention.history(x_ND, event_layout(INDEX_N * 2), None)
    later, _ = attention.history(x_ND, event_layout(seconds_N=SECONDS_N * 2), None)
    for other in (stretched, later):
        assert (other - y_ND)[[0, 4]].abs().max() < 1e-12  # alone in view, an event attends to itself
        assert (other - y_ND)[[1, 2, 3, 5]].abs().amax(1).min() > 1e-6


def test_indicators_see_their_events_and_themselves() -> None:
    attention, x_ND = make_attention()
    x_MD = torch.randn(4, DIM, dtype=torch.float64)
    _, known = attention.history(x_ND, event_layout(), None)
    layout = indicator_layout(torch.tensor([0, 0, 1, 2]), torch.tensor([2, 4, 0, 1]), torch.tensor([70, 10**6, 0, 5]))
    y_MD = attention.indicators(x_MD, layout, known)
    for event, seen_by in enumerate([[0, 1], [0, 1], [1], [1], [3], []]):
        k_NHA, v_NHA = known.k_NHA.clone(), known.v_NHA.clone()
        k_NHA[event], v_NHA[event] = 9.0, 9.0
        changed = (attention.indicators(x_MD, layout, KeyValues(k_NHA, v_NHA)) != y_MD).any(1)
        assert changed.nonzero().flatten().tolist() == seen_by
    alone = attention.out(attention.qkv(x_MD[2]).chunk(3)[2])  # nothing in view: its own value
    torch.testing.assert_close(y_MD[2], alone)


def test_gradients_of_history() -> None:
    attention, x_ND = make_attention()
    check_gradients(attention, lambda x: attention.history(x, event_layout(), None)[0], x_ND)


def test_gradients_of_indicators_reach_the_history() -> None:
    attention, x_ND = make_attention()
    layout = indicator_layout(torch.tensor([0, 0, 1, 2]), torch.tensor([2, 4, 0, 1]), torch.tensor([70, 10**6, 0, 5]))

    def asked(x_ND: Tensor, x_MD: Tensor) -> Tensor:
        _, known = attention.history(x_ND, event_layout(), None)
        return attention.indicators(x_MD, layout, known)

    check_gradients(attention, asked, x_ND, torch.randn(4, DIM))
