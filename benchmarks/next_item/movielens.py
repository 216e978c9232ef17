"""MovieLens-1M as the other contenders read it: the same users, items and order as the store of the first one."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

MAX_LENGTH = 200
MIN_ITEM_COUNT = 5


def read_training(folder: Path) -> pd.DataFrame:
    """Columns user, item (from 1) and time, in order, without each user's last two ratings: 6,040 users."""
    ratings = pd.read_csv(
        folder / "ratings.dat", sep="::", engine="python", header=None, names=["user", "item", "rating", "time"]
    )
    ratings = ratings[ratings.groupby("item")["item"].transform("size") >= MIN_ITEM_COUNT]
    ratings["item"] = ratings["item"].rank(method="dense").astype(int)
    ratings = ratings.sort_values(["user", "time"], kind="stable")
    return ratings[ratings.groupby("user").cumcount(ascending=False) >= 2].reset_index(drop=True)
