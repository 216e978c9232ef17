"""The examples of a store: who is asked at which cut, what is known before it, and what happened after it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from supermoe.config import Eligible, FeatureConfig
from supermoe.data.chunks import chunks, is_eligible
from supermoe.data.features import Features
from supermoe.data.labels import Labels
from supermoe.data.schema import BagSchema, LabelSchema
from supermoe.data.splits import SPLITS, Plan
from supermoe.data.staging import Staged
from supermoe.data.store import StoreWriter
from supermoe.data.vocab import Vocabularies
from supermoe.typed_yaml import UserError, format_instant


@dataclass(frozen=True)
class Examples:
    """What was written: the parts of the schema that describe examples, the features' knots, and numbers to print."""

    bags: dict[str, BagSchema]
    labels: dict[str, LabelSchema]
    knots: dict[str, np.ndarray]  # feature -> knots, in the order of the feature columns; saved with the vocabularies
    summary: dict[str, Any]


def write_examples(
    staged: Staged,
    writer: StoreWriter,
    vocabularies: Vocabularies,
    plan: Plan,
    features: Mapping[str, FeatureConfig],
    tasks: Mapping[str, Any],
    knots: dict[str, np.ndarray] | None = None,
    conditions: Mapping[str, Eligible] | None = None,
    copied: Collection[str] = (),
) -> Examples:
    """Write examples/ into a store whose events are written and whose vocabularies are registered on the connection.

    `tasks` maps names to task configs (none in serving). `knots` are a fitted model's (serving), or None to fit them on
    the training examples. Of each of the `conditions` (serving) the column labels/<name>.asked says for whom it holds.
    `copied`: fields that labels are about, see `Features`.
    Raises UserError where a label, feature or condition cannot be computed, or a split has no examples.
    """
    columns = {name: writer.column(f"examples/{name}", dtype) for name, dtype in _COLUMNS.items()}
    feature_columns = Features(staged, writer, vocabularies, features, knots, copied)
    label_columns = Labels(staged, writer, vocabularies, plan, tasks)
    condition_columns = {name: writer.column(f"examples/labels/{name}.asked", np.bool_) for name in conditions or {}}
    number = np.zeros(len(SPLITS), np.int64)
    with tqdm(total=staged.num_users, desc="examples", unit=" users", unit_scale=True, delay=2) as bar:
        for chunk in chunks(staged, plan):
            for name, column in columns.items():
                column.append(getattr(chunk, f"{name}_B").astype(_COLUMNS[name]))
            number += np.bincount(chunk.split_B, minlength=len(SPLITS))
            feature_columns.add(chunk)
            label_columns.add(chunk)
            for name, condition in (conditions or {}).items():
                condition_columns[name].append(is_eligible(staged.con, chunk, condition, f"tasks.{name}.eligible.sql"))
            bar.update(len(chunk.offsets) - 1)
    for column in [*columns.values(), *condition_columns.values()]:
        column.close()
    _check_number(plan, number)
    fitted = feature_columns.finish()
    labels, counts = label_columns.finish()
    summary = {
        "examples": {name: int(number[code]) for name, code in SPLITS.items() if number[code]},
        "cuts": {name: [format_instant(cut) for cut in cuts] for name, cuts in plan.cuts.items()},
        "features": len(fitted),
        "constant_features": len(feature_columns.names) - len(fitted) if knots is None else 0,
        "bags": list(feature_columns.bags),
        "labels": counts,
    }
    return Examples(feature_columns.bags, labels, fitted, summary)


_COLUMNS = {"user": np.int64, "cut": np.int64, "visible": np.int64, "split": np.int8}


def _check_number(plan: Plan, number: np.ndarray) -> None:
    """Refuse a split without examples."""
    for name in plan.cuts or ("train", "valid", "test"):
        if number[SPLITS[name]] == 0:
            cuts = ", ".join(map(format_instant, plan.cuts.get(name, [])))
            raise UserError(
                f"data.splits: no user is eligible for the {name} split, cut {cuts or 'by position'} (condition: "
                f"{plan.eligible.sql}); loosen data.splits.eligible, move the cut, or check that the source holds the "
                f"expected events."
            )
