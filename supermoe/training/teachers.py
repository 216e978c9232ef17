"""Teachers: what a model of each task's own answered to the training examples, for a model of all tasks to learn from.

They lie in `<folder>/seed<seed>/<task>.parquet`, in the form of predictions. `python -m supermoe.seesaw` leaves them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from supermoe.data.batches import label_rows
from supermoe.data.disk import read_table
from supermoe.data.store import Store
from supermoe.objectives.task import Task, asked
from supermoe.typed_yaml import UserError

REMEDY = "train them with python -m supermoe.seesaw, which leaves them in its folder, or set loss.teachers=null"


def teach(tasks: dict[str, Task], store: Store, folder: Path, seed: int, share: float) -> list[str]:
    """Give every task the answers of its teacher -> the tasks that have none, see `Task.can_be_taught`.

    Teachers answer the training examples of the store as it was prepared; for any more, labels count alone.

    Raises:
        UserError: where a file is missing, or answers other examples than the store's.
    """
    taught = {name: task for name, task in tasks.items() if task.can_be_taught}
    for name, task in taught.items():
        task.teach(read_answers(folder / f"seed{seed}" / f"{name}.parquet", store.prepared, task), share)
    return [name for name in tasks if name not in taught]


def read_answers(path: Path, store: Store, task: Task) -> Tensor:
    """The scores of a file of predictions for the store's labelled training examples -> fp32 [n] or [n, C]; else NaN.

    Raises:
        UserError: see `teach`.
    """
    table = read_table(path, REMEDY)
    train = store.rows_of("train")
    rows = train[asked(label_rows(store.labels[task.name], train)).numpy()]
    if not table.select(["user_id", "cut"]).equals(store.who_and_when(rows)):
        raise UserError(f"loss.teachers: {path} answers other examples than those of this store; {REMEDY}")
    score = table["score"].combine_chunks()
    several = pa.types.is_list(score.type)
    score_n = (pc.list_flatten(score) if several else score).to_numpy().astype(np.float32)
    answers_nC = torch.full((len(store.examples.user), len(score_n) // len(rows)), torch.nan)
    answers_nC[rows] = torch.from_numpy(score_n).view(len(rows), -1)
    return answers_nC if several else answers_nC[:, 0]
