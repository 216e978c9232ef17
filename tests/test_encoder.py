"""The history pass, its cache, and the indicator pass."""

from __future__ import annotations

import pytest
import torch
from factories import START, check_gradients
from torch import Tensor

from supermoe.config import ModelConfig
from supermoe.model.encoder import Encoder, read_starts

CONFIG = ModelConfig(dim=8, heads=2, layers=3, moe={"experts": 4}, dropout=0)
OFFSETS_S = torch.tensor([0, 5, 5, 8])
TIME_N = START + torch.tensor([0, 10, 10, 90_000, 10**7, 50, 60, 10**6])
READ_M, VISIBLE_M = torch.tensor([0, 0, 1, 2]), torch.tensor([5, 2, 0, 3])
CUT_M = START + torch.tensor([10**8, 1_000, 7, 2 * 10**6])
# fp64 sums of tens of terms of size one, taken in another order
EXACT = {"atol": 1e-12, "rtol": 0}


def make_encoder(config: ModelConfig = CONFIG) -> Encoder:
    torch.manual_seed(0)
    return Encoder(config).double()


def random(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ask(encoder: Encoder, x_ND: Tensor, x_MD: Tensor, time_N: Tensor = TIME_N) -> tuple[Tensor, Tensor]:
    history = encoder.extend(x_ND, time_N, OFFSETS_S)
    return history.event_ND, encoder.ask(history, x_MD, READ_M, VISIBLE_M, CUT_M)[0]


def differ(ours: Tensor, theirs: Tensor) -> list[int]:
    """Rows that differ by more than rounding."""
    return (ours - theirs).abs().amax(1).gt(1e-12).nonzero().flatten().tolist()


@pytest.mark.parametrize("event", range(8))
def test_an_event_is_seen_by_itself_and_later_ones_of_its_read(event: int) -> None:
    encoder, x_ND = make_encoder(), random(8)
    before, _ = ask(encoder, x_ND, random(4))
    changed_ND, time_N = x_ND.clone(), TIME_N.clone()
    changed_ND[event], time_N[event] = random(1, seed=2), TIME_N[event] + 5
    after, _ = ask(encoder, changed_ND, random(4), time_N)
    end = 5 if event < 5 else 8
    assert differ(after, before) == list(range(event, end))


def test_an_event_does_not_see_the_time_of_the_next() -> None:
    encoder, x_ND = make_encoder(), random(8)
    later_N = TIME_N + torch.tensor([0, 0, 0, 10**6, 10**6, 0, 0, 0])
    before, _ = ask(encoder, x_ND, random(4))
    after, _ = ask(encoder, x_ND, random(4), later_N)
    assert differ(after, before) == [3, 4]


def test_no_event_and_no_other_indicator_sees_an_indicator() -> None:
    encoder, x_ND, x_MD = make_encoder(), random(8), random(4)
    events, answers = ask(encoder, x_ND, x_MD)
    x_MD[1] = random(1, seed=2)
    events_after, answers_after = ask(encoder, x_ND, x_MD)
    assert torch.equal(events_after, events)
    assert differ(answers_after, answers) == [1]


def test_an_indicator_sees_what_is_visible() -> None:
    encoder, x_ND, x_MD = make_encoder(), random(8), random(4)
    _, answers = ask(encoder, x_ND, x_MD)
    for event, seen_by in enumerate([[0, 1], [0, 1], [0], [0], [0], [3], [3], [3]]):
        changed_ND = x_ND.clone()
        changed_ND[event] = random(1, seed=2)
        _, after = ask(encoder, changed_ND, x_MD)
        assert differ(after, answers) == seen_by


@pytest.mark.parametrize("known", [[0, 0, 0], [3, 0, 1], [5, 0, 0], [4, 0, 3]])
def test_cached_history_and_new_events_equal_reading_all_at_once(known: list[int]) -> None:
    encoder, x_ND, x_MD = make_encoder(), random(8), random(4)
    full = encoder.extend(x_ND, TIME_N, OFFSETS_S)
    index_N = torch.cat([torch.arange(5), torch.arange(3)])
    old_N = index_N < torch.tensor(known)[torch.tensor([0] * 5 + [2] * 3)]
    old_S = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(known).cumsum(0)])
    past = encoder.extend(x_ND[old_N], TIME_N[old_N], old_S)
    history = encoder.extend(x_ND[~old_N], TIME_N[~old_N], OFFSETS_S - old_S, past)
    torch.testing.assert_close(history.event_ND, full.event_ND[~old_N], **EXACT)
    assert torch.equal(history.time_J, TIME_N)
    assert torch.equal(history.offsets_S, OFFSETS_S)
    for ours, theirs in zip(history.layers, full.layers, strict=True):
        torch.testing.assert_close(ours.k_NHA, theirs.k_NHA, **EXACT)
        torch.testing.assert_close(ours.v_NHA, theirs.v_NHA, **EXACT)
    answers, _ = encoder.ask(history, x_MD, READ_M, VISIBLE_M, CUT_M)
    torch.testing.assert_close(answers, encoder.ask(full, x_MD, READ_M, VISIBLE_M, CUT_M)[0], **EXACT)


def test_routings_are_named_by_layer_and_tokens() -> None:
    encoder = make_encoder()
    history = encoder.extend(random(8), TIME_N, OFFSETS_S)
    _, asked = encoder.ask(history, random(4), READ_M, VISIBLE_M, CUT_M)
    entries = [(entry.layer, entry.tokens, len(entry.routing.expert_NK)) for entry in history.routings + asked]
    assert entries == [(1, "history", 8), (2, "history", 8), (1, "indicator", 4), (2, "indicator", 4)]
    assert all(entry.aux_loss.requires_grad for entry in history.routings + asked)


def test_read_starts() -> None:
    assert read_starts(torch.tensor([5, 6, 7]), torch.tensor([0, 0, 2, 3, 3])).tolist() == [0, 5, 7, 0]
    assert read_starts(torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0])).tolist() == [0]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradients(activation: str) -> None:
    encoder = make_encoder(CONFIG.model_copy(update={"activation": activation, "layers": 2, "task_gradient": 1.0}))
    check_gradients(encoder, lambda *x: torch.cat(ask(encoder, *x)), random(8), random(4))


def test_a_share_of_the_gradient_of_answers_reaches_the_events() -> None:
    def gradient(share: float) -> Tensor:
        encoder, x_ND = make_encoder(CONFIG.model_copy(update={"task_gradient": share})), random(8).requires_grad_()
        ask(encoder, x_ND, random(4))[1].sum().backward()
        return torch.zeros_like(x_ND) if x_ND.grad is None else x_ND.grad

    assert gradient(1.0).abs().sum() > 0
    torch.testing.assert_close(gradient(0.25), 0.25 * gradient(1.0))
    assert not gradient(0.0).any()
