"""Teachers: what is learnt from another model's answers, and that they are those of the same examples."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_run import make_labels, make_run_batch, make_task, make_tasks

from supermoe.config import load_run
from supermoe.data.merged import MergedStore
from supermoe.data.store import Store
from supermoe.objectives.task import asked
from supermoe.training.build import build_run, build_tasks
from supermoe.training.evaluation import evaluate
from supermoe.training.predictions import write_predictions
from supermoe.training.teachers import read_answers, teach
from supermoe.typed_yaml import UserError


@pytest.mark.parametrize("name", ["churn", "spend", "age", "income", "topics"])
def test_a_teacher_who_answers_the_labels_themselves_adds_nothing(name: str) -> None:
    task, labels = make_tasks()[name], make_labels(50, seed=1)[name]
    logits_BC = torch.randn(50, task.head_spec().size, generator=torch.Generator().manual_seed(2))
    if name == "topics":
        answer = task.multi_hot(labels)
    else:
        answer = torch.eye(3)[labels.clamp(min=0)] if labels.dtype == torch.int64 else labels.nan_to_num()
    known_B = asked(labels)
    torch.testing.assert_close(task.soft_losses(logits_BC, answer)[known_B], task.losses(logits_BC, labels)[known_B])


def test_a_share_of_the_answer_is_a_label_that_is_mixed() -> None:
    """The gradient of the loss on (1 - share) label + share answer, for a distribution and for a square."""
    for name, kind in (("churn", "binary"), ("spend", "regression")):
        task = make_task(kind, name)
        labels, answer = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.8, 0.3, 0.1])
        logits_BC = torch.tensor([[0.5], [-1.0], [2.0]], requires_grad=True)
        task.teach(answer, 0.25)
        (taught,) = torch.autograd.grad(
            task._taught(task.losses(logits_BC, labels), logits_BC, torch.arange(3)).sum(), logits_BC
        )
        (mixed,) = torch.autograd.grad(task.losses(logits_BC, 0.75 * labels + 0.25 * answer).sum(), logits_BC)
        torch.testing.assert_close(taught, mixed)


def test_answers_belong_to_examples_and_without_one_the_label_counts_alone() -> None:
    task, batch = make_tasks()["churn"], make_run_batch(seed=1)
    head, output = _Constant(), SimpleNamespace(task_BX={"churn": None})
    alone = task.loss(head, output, batch)
    answers = torch.full((int(batch.example_B.max()) + 1,), math.nan)
    task.teach(answers, 0.5)
    assert task.loss(head, output, batch) == alone
    answers[batch.example_B[2]] = 0.9
    label = batch.labels["churn"][2]
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    logit = torch.tensor(0.3)
    difference = 0.5 * (bce(logit, torch.tensor(0.9)) - bce(logit, label))
    torch.testing.assert_close(task.loss(head, output, batch)[0], alone[0] + difference)


class _Constant:
    """Stands for head and output: every logit is 0.3."""

    def logits(self, x_BX: torch.Tensor, batch: object) -> torch.Tensor:
        return torch.full((len(batch.example_B), 1), 0.3)  # type: ignore[attr-defined]


def test_what_a_twin_wrote_is_read_for_the_same_examples(trained_run: Path, tmp_path: Path) -> None:
    config = load_run(trained_run / "config.yaml")
    store = Store.open(config.store)
    run = build_run(config, store, folder=tmp_path)
    found = evaluate(run.model, run.tasks, run.trainer.train, "train")
    write_predictions(tmp_path, store, run.tasks, found).rename(tmp_path / "seed7")
    tasks = build_tasks(config, store)
    untaught = ["next_type", "segment", "item"]  # rankings, and what never changes about a user
    assert teach(tasks, store, tmp_path, 7, 0.5) == untaught
    again = build_tasks(config, store)
    teach(again, MergedStore(store, []), tmp_path, 7, 0.5)  # a refit, which has more to train on
    assert torch.equal(again["churn"].teacher.nan_to_num(), tasks["churn"].teacher.nan_to_num())
    rows = store.rows_of("train")
    assert all(tasks[name].teacher is None for name in untaught)
    for name in ("churn", "types"):
        answers = tasks[name].teacher
        assert answers is not None
        known = asked(found.labels[name])
        torch.testing.assert_close(answers[rows][known], torch.from_numpy(found.scores[name]["score"])[known])
        outside = torch.ones(len(answers), dtype=torch.bool)
        outside[rows[known.numpy()]] = False
        assert answers[outside].isnan().all()
    with pytest.raises(
        UserError, match=r"seed8/churn\.parquet: it is missing; train them with python -m supermoe\.seesaw"
    ):
        teach(tasks, store, tmp_path, 8, 0.5)
    (tmp_path / "seed7" / "churn.parquet").replace(tmp_path / "seed7" / "spend.parquet")
    with pytest.raises(UserError, match=r"spend\.parquet answers other examples than those of this store"):
        read_answers(tmp_path / "seed7" / "spend.parquet", store, tasks["spend"])
