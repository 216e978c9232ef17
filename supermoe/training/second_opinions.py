"""Second opinions, fitted and given shares: trees beside heads of numbers and classes, habits beside rankings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from supermoe.data.batches import label_rows
from supermoe.model.habits import Habits
from supermoe.model.second_opinion import SecondOpinion
from supermoe.model.trees import BoostedTrees
from supermoe.training.boosting import best_share, fit_trees
from supermoe.training.build import Run, batches
from supermoe.training.evaluation import Evaluation
from supermoe.training.habits import ask_last, fit_habits
from supermoe.training.warm_start import CHUNK

HABIT_SHARES = (0.25, 0.5, 0.75, 0.9)  # never all: habits know nothing new


def add_second_opinions(run: Run, shares: Mapping[str, float] | None = None) -> None:
    """Fit second opinions to the best weights' heads that have room for one, and let them count.

    Each task's share is chosen on validation, unless `shares` gives it: a refit takes over what was chosen before.
    Weights that hold some already stay as they are.
    """
    run.trainer.load_best()
    opinions = run.second_opinions()
    if not opinions or any(run.opinion_shares().values()):
        return
    if shares is not None:
        planted = _plant(run, {name: opinion for name, opinion in opinions.items() if shares[name]})
        chosen = {name: shares[name] for name in planted}
    elif run.trainer.valid is not None:
        planted = _plant(run, opinions)
        chosen = _choose(run, planted)
    else:
        return
    for name, share in chosen.items():
        planted[name].share.fill_(share)
    run.trainer.save_best()


def _plant(run: Run, opinions: dict[str, SecondOpinion]) -> dict[str, SecondOpinion]:
    """Fit on the first rank and plant on all -> those that had labels enough."""
    planted, world = {}, run.trainer.world
    for name, opinion in tqdm(opinions.items(), desc="second opinions", leave=False, disable=not world.is_first):
        fitted = world.gather(_fit(run, name, opinion) if world.is_first else None)[0]
        if fitted is not None:
            opinion.plant(*fitted)
            planted[name] = opinion
    return planted


def _fit(run: Run, name: str, opinion: SecondOpinion) -> Any:
    task, store = run.tasks[name], run.store
    if isinstance(opinion, BoostedTrees):
        return fit_trees(task, store, opinion.rounds, run.config.seed)
    assert isinstance(opinion, Habits)
    without_labels = task.undefined(label_rows(store.labels[name], store.rows_of("train")))
    if without_labels and not run.heads[name].reads_events:
        return None
    histories = batches(run.config, store, "train").epoch(0)
    if without_labels:  # as under leave-one-out
        histories = (ask_last(batch, name, opinion) for batch in histories)
    return fit_habits(task, opinion, histories)


def _choose(run: Run, opinions: dict[str, SecondOpinion]) -> dict[str, float]:
    """The share of each on validation: of trees that of least loss, of habits the best of a few."""
    if not opinions:
        return {}
    alone, chosen = run.measure("valid"), dict.fromkeys(opinions, 0.0)
    for name, opinion in opinions.items():
        if isinstance(opinion, BoostedTrees):
            chosen[name] = _share_of_trees(run, name, opinion, alone)
    rankings = {name: opinion for name, opinion in opinions.items() if isinstance(opinion, Habits)}
    best = {name: alone.gains[name] for name in rankings}
    for share in HABIT_SHARES if rankings else ():
        for opinion in rankings.values():
            opinion.share.fill_(share)
        for name, gain in run.measure("valid", list(rankings)).gains.items():
            if gain > best[name]:
                best[name], chosen[name] = gain, share
    return chosen


def _share_of_trees(run: Run, name: str, trees: BoostedTrees, validation: Evaluation) -> float:
    parts = np.split(validation.example_n, range(CHUNK, len(validation.example_n), CHUNK))
    features = (torch.from_numpy(run.store.features[part]).to(trees.start_C.device) for part in parts)
    trees_nC = torch.cat([trees(features_BP).cpu() for features_BP in features])
    scores_n = torch.from_numpy(validation.scores[name]["score"])
    return best_share(run.tasks[name], scores_n, trees_nC, validation.labels[name])
