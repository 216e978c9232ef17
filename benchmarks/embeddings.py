"""What a user's vector tells about tasks that its model was not trained for.

    python benchmarks/embeddings.py [--seeds 3] [--held-out TASK,TASK ...] [--folder DIR] [a.b=c ...]

For every group of tasks held out, a model learns the others; then a linear model per task, its penalty chosen by
cross-validation over training users, reads the label off each contender: the exported vector, its first part alone
(the answer to `user`), and all derived features with their bags, which are what the model has read. Vectors are made as
`supermoe.export` makes them, from the log before each cut. Labels of static attributes are those of all folds in turn.
Writes benchmarks/results/embeddings.json: the test metric by task and contender, over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from supermoe.config import RunConfig, load_run
from supermoe.data.prepare import prepare
from supermoe.data.store import SPLITS, Store, is_asked
from supermoe.objectives.measures import auc
from supermoe.serving.artifact import Artifact
from supermoe.serving.inference import serving_batches
from supermoe.serving.population import Request, open_source, serving_store

HELD_OUT = ["age,income,household_size,kids", "redeem", "churn", "spend"]
PENALTIES = np.logspace(-4, -1, 7)  # of logistic regression: C on standardised inputs
CONTENDERS = ["vector", "answer", "features"]


def train(config: Path, run: Path, seed: int, held_out: list[str], overrides: list[str]) -> Artifact:
    """A model that has never seen the labels of the tasks held out."""
    settings = [f"run={run}", f"seed={seed}", "report.boosting=false", *(f"tasks.{name}=null" for name in held_out)]
    subprocess.run([sys.executable, "-m", "supermoe.train", "--config", str(config), *settings, *overrides], check=True)
    return Artifact.load(run / "model")


@torch.inference_mode()
def vectors(artifact: Artifact, cut: int) -> dict[str, np.ndarray]:
    """Of every user of the log before a cut, in the order of their ids: each contender's inputs, and who they are."""
    model = artifact.model
    with serving_store(artifact, Request(open_source(artifact), cut), everyone=True) as store:
        users = store.users["user"].to_numpy()
        batches = [
            (
                batch.example_B,
                model.embed(batch),
                model.indicators.features(batch).direct_BX[:, : sum(model.profile.sizes)],
            )
            for batch in serving_batches(artifact, store)
        ]
    example, vector, features = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = example.argsort()
    vector, features = vector[order].numpy(), features[order].numpy()
    return {"user": users, "vector": vector, "answer": vector[:, : model.config.dim], "features": features}


def labelled(store: Store, name: str, splits: list[str], static: bool) -> np.ndarray:
    """Rows of examples of the splits that have a label; of a static one each user's last."""
    split = np.asarray(store.examples.split)
    found = np.flatnonzero(is_asked(store.labels[name]) & np.isin(split, [SPLITS[which] for which in splits]))
    if static:  # examples are sorted by user and cut
        found = found[np.diff(store.examples.user[found], append=-1) != 0]
    return found


def inputs(store: Store, found: np.ndarray, by_cut: dict[int, dict[str, np.ndarray]], contender: str) -> np.ndarray:
    """A contender's inputs at examples."""
    ids = store.users["user"].to_numpy()[store.examples.user[found]]
    cuts = store.examples.cut[found]
    made = np.zeros((len(found), next(iter(by_cut.values()))[contender].shape[1]), np.float32)
    for cut, at in by_cut.items():
        made[cuts == cut] = at[contender][np.searchsorted(at["user"], ids[cuts == cut])]
    return made


def probe(store: Store, name: str, task: Any, by_cut: dict[int, dict[str, np.ndarray]], contender: str) -> float:
    """The test metric (AUC, mean over classes; R2 of numbers) of a linear model on a contender's inputs."""
    label, static = np.asarray(store.labels[name]), task.label.attribute is not None
    learn, test = labelled(store, name, ["train", "valid"], static), labelled(store, name, ["test"], static)
    x_learn, x_test = (inputs(store, found, by_cut, contender) for found in (learn, test))
    users = store.examples.user[learn]
    if task.type == "regression":
        folds = list(GroupKFold(5).split(x_learn, groups=users))
        model = make_pipeline(StandardScaler(), RidgeCV(alphas=1 / PENALTIES, cv=folds))
        error = label[test] - model.fit(x_learn, label[learn]).predict(x_test)
        return 1 - float(np.square(error).mean() / label[test].var())
    folds = list(StratifiedGroupKFold(5).split(x_learn, label[learn], users))
    search = LogisticRegressionCV(
        Cs=PENALTIES, l1_ratios=(0,), cv=folds, scoring="neg_log_loss", max_iter=200, use_legacy_attributes=False
    )
    probability = make_pipeline(StandardScaler(), search).fit(x_learn, label[learn]).predict_proba(x_test)
    classes = search.classes_[1:] if len(search.classes_) == 2 else search.classes_
    of_class = dict(zip(search.classes_, probability.T, strict=True))
    return float(np.nanmean([auc(label[test] == which, of_class[which]) for which in classes]))


def measure(config: RunConfig, artifact: Artifact, held_out: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """Test metrics by task and contender; means over the folds of the users where the labels are static."""
    by_cut: dict[int, dict[str, np.ndarray]] = {}
    static = [name for name in held_out if config.tasks[name].label.attribute is not None]
    values: dict[str, dict[str, list[float]]] = {name: {which: [] for which in CONTENDERS} for name in held_out}
    for fold in range(config.data.splits.users.folds if static else 1):
        users = config.data.splits.users.model_copy(update={"fold": fold})
        splits = config.data.splits.model_copy(update={"users": users})
        data = config.data.model_copy(update={"splits": splits, "store": folder / f"store{fold}"})
        store = prepare(config.model_copy(update={"data": data}))
        for cut in np.unique(store.examples.cut).tolist():
            by_cut[cut] = by_cut.get(cut) or vectors(artifact, cut)
        for name in held_out:
            if fold == 0 or name in static:
                for which in CONTENDERS:
                    values[name][which].append(probe(store, name, config.tasks[name], by_cut, which))
    return {name: {which: statistics.fmean(found) for which, found in of.items()} for name, of in values.items()}


def main() -> None:
    """Measure every group and write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--held-out", nargs="+", default=HELD_OUT, help="groups of tasks; commas join those of a group")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/embeddings"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    found = []
    config = load_run(args.config, [f"run={args.folder}", *args.overrides])
    for group in args.held_out:
        names = group.split(",")
        by_seed = []
        for seed in range(args.seeds):
            artifact = train(
                args.config, args.folder / f"without-{'-'.join(names)}-{seed}", seed, names, args.overrides
            )
            by_seed.append(measure(config, artifact, names, args.folder))
        for name in names:
            values = {which: [of[name][which] for of in by_seed] for which in CONTENDERS}
            found.append({"task": name, "values": values, **{w: statistics.fmean(v) for w, v in values.items()}})
            print(found[-1], flush=True)
    print(harness.write("embeddings", found, config=str(args.config), seeds=args.seeds, overrides=args.overrides))


if __name__ == "__main__":
    main()
