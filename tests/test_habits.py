"""Habits: what earlier choices count, the ranking that they make, and that fitting finds what choices follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factories import make_batch
from fake_run import make_task
from torch import Tensor

from supermoe.data.batch import Batch, Jagged
from supermoe.data.schema import FIRST_ID
from supermoe.model.habits import FADING, LEAST, Habits
from supermoe.training.habits import MIN_LABELS, ask_last, counts_of, fit_habits

SIZE = 11
BAGS = [None, "type_all"]
CONSTANT = FADING.index(1.0)


def expected_counts(batch: Batch, bag: str | None) -> Tensor:
    """The same, event by event -> [B, V, K]."""
    count_BVK = torch.zeros(batch.num_examples, SIZE, len(FADING))
    for b, (read, visible) in enumerate(zip(batch.read_B.tolist(), batch.visible_B.tolist(), strict=True)):
        start = int(batch.offsets_S[read])
        for later, n in enumerate(reversed(range(start, start + visible))):
            for k, fading in enumerate(FADING):
                if bag is None or k != CONSTANT:
                    count_BVK[b, batch.fields["type"][n], k] += fading**later
        if bag is not None:
            counted = batch.bags[bag]
            for r in range(int(counted.offsets[b]), int(counted.offsets[b + 1])):
                count_BVK[b, counted.ids[r], CONSTANT] += counted.weights[r]
    count_BVK[:, :FIRST_ID] = 0
    return count_BVK


@pytest.mark.parametrize("bag", BAGS)
def test_logits_are_the_log_of_fading_counts_over_a_prior(bag: str | None) -> None:
    batch, habits = make_batch(), Habits("type", SIZE, bag)
    weight_K, prior_V = torch.rand(len(FADING)), torch.rand(SIZE)
    prior_V[:FIRST_ID] = 0.0
    habits.plant(weight_K, prior_V)
    expected = expected_counts(batch, bag) @ weight_K + prior_V.clamp(min=LEAST)
    torch.testing.assert_close(habits.logits(batch), expected.log())
    assert bool(habits.logits(batch).isfinite().all())


@pytest.mark.parametrize("bag", BAGS)
def test_counts_of_wanted_ids_are_those_of_the_whole_vocabulary(bag: str | None) -> None:
    batch = make_batch()
    example_n = torch.arange(batch.num_examples).repeat_interleave(SIZE - FIRST_ID)
    id_n = torch.arange(FIRST_ID, SIZE).repeat(batch.num_examples)
    own_nK, all_nK = counts_of(Habits("type", SIZE, bag), batch, example_n, id_n)
    expected = expected_counts(batch, bag)
    torch.testing.assert_close(own_nK, expected[example_n, id_n])
    torch.testing.assert_close(all_nK, expected.sum(dim=1)[example_n])
    assert bool((own_nK == 0).all(dim=1).any())  # some were never chosen


@pytest.mark.parametrize("bag", BAGS)
def test_the_last_event_is_asked_for_and_out_of_its_own_history(bag: str | None) -> None:
    batch = make_batch([4, 3], [(0, 4), (0, 1), (1, 3), (1, 0)])
    fields = {**batch.fields, "type": torch.tensor([5, 3, 4, 2, 7, 8, 9])}
    bags = {"type_all": Jagged(torch.arange(5), torch.tensor([2, 5, 9, 2]), torch.tensor([3.0, 1.0, 0.0, 2.0]))}
    asked = ask_last(replace(batch, fields=fields, bags=bags), "item", Habits("type", SIZE, bag))
    assert asked.labels["item"].tolist() == [2, 5, 9, -1]  # of nothing there is no last
    assert asked.visible_B.tolist() == [3, 0, 2, 0]
    assert asked.bags["type_all"].weights.tolist() == ([2.0, 0.0, 0.0, 2.0] if bag else [3.0, 1.0, 0.0, 2.0])


def test_a_rank_may_be_dealt_nobody() -> None:
    batch, habits = make_batch((), ()), Habits("type", SIZE, None)
    assert habits.logits(batch).shape == (0, SIZE)
    assert ask_last(batch, "item", habits).labels["item"].shape == (0,)


def batches(choose: Any) -> Iterator[Batch]:
    """Users with seven events each, labelled by what `choose` makes of their events."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(30):
        batch = make_batch([7] * 40, [(i, 7) for i in range(40)], seed=seed)
        ids_N = torch.randint(FIRST_ID, SIZE, (280,), generator=generator)
        label_B = choose(ids_N.view(40, 7), generator)
        yield replace(batch, fields={**batch.fields, "type": ids_N}, labels={"item": label_B})


def fitted(choose: Any) -> Habits:
    task, habits = make_task("next_item", "item"), Habits("type", SIZE, None)
    task.fit_prior(torch.full((1000,), 3), torch.ones(SIZE))
    planted = fit_habits(task, habits, batches(choose))
    assert planted is not None
    habits.plant(*planted)
    return habits.eval()


def probability(habits: Habits, choose: Any) -> Tensor:
    """What the labels are given, on average."""
    found = []
    for batch in batches(choose):
        p_BV = habits.logits(batch)[:, FIRST_ID:].softmax(dim=1)
        found.append(p_BV.gather(1, batch.labels["item"][:, None] - FIRST_ID))
    return torch.cat(found).mean()


def test_who_repeats_the_last_choice_is_told_by_counts_that_fade_fast() -> None:
    def last(ids_BE: Tensor, generator: torch.Generator) -> Tensor:
        return ids_BE[:, -1]

    habits = fitted(last)
    weight_K = habits.weight_K
    assert weight_K.argmax() == 0
    assert probability(habits, last) > 0.25  # .1 by chance; .8 to the power of six later events is still a quarter


def test_who_repeats_any_choice_is_told_by_counts_that_stay() -> None:
    def any_of_them(ids_BE: Tensor, generator: torch.Generator) -> Tensor:
        return ids_BE.gather(1, torch.randint(0, 7, (len(ids_BE), 1), generator=generator))[:, 0]

    weight_K = fitted(any_of_them).weight_K
    assert weight_K[CONSTANT] > 0.8 * weight_K.sum()


def test_who_follows_the_crowd_is_told_by_the_prior() -> None:
    def popular(ids_BE: Tensor, generator: torch.Generator) -> Tensor:
        return torch.full((len(ids_BE),), 3)

    habits = fitted(popular)
    assert habits.prior_V.argmax() == 3
    assert probability(habits, popular) > 0.9


def test_few_labels_are_not_fitted() -> None:
    task, habits = make_task("next_item", "item"), Habits("type", SIZE, None)
    task.fit_prior(torch.full((10,), 3), torch.ones(SIZE))
    batch = next(batches(lambda ids_BE, generator: ids_BE[:, 0]))
    enough = [batch] * -(-MIN_LABELS // batch.num_examples)
    assert fit_habits(task, habits, enough) is not None
    assert fit_habits(task, habits, enough[1:]) is None
    assert fit_habits(SimpleNamespace(name="item"), habits, []) is None
