"""A store as the last training of a run sees it: validation has done its work, and its examples are for training."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import cached_property

import numpy as np

from supermoe.data.splits import SPLITS
from supermoe.data.store import Examples, IdLists, Store, is_asked


class MergedStore(Store):
    """`store` with its validation examples in the training split; nothing is written.

    `attributes`: tasks whose label belongs to the user, whatever the cut. A validation user's is known at that user's
    training cuts as well, of which it was kept out until now.
    """

    def __init__(self, store: Store, attributes: Collection[str]):
        super().__init__(store.path, store.schema, store.fingerprint, store.summary)
        self._store, self._attributes = store, attributes

    @property
    def prepared(self) -> Store:
        """The store without the merger."""
        return self._store

    @cached_property
    def examples(self) -> Examples:
        """Who is asked, when, and in which split."""
        examples = self._store.examples
        split = np.array(examples.split)
        split[split == SPLITS["valid"]] = SPLITS["train"]
        return replace(examples, split=split)

    @cached_property
    def labels(self) -> dict[str, np.ndarray | IdLists]:
        """As `Store.labels`."""
        return {
            name: label if isinstance(label, IdLists) or name not in self._attributes else self._of_users(label)
            for name, label in self._store.labels.items()
        }

    def _of_users(self, label: np.ndarray) -> np.ndarray:
        """The label of each user, at all of the user's training cuts."""
        user = np.asarray(self.examples.user)
        training = np.asarray(self.examples.split) == SPLITS["train"]
        asked = training & is_asked(label)
        label_U = np.full(len(self.offsets_U) - 1, np.nan if label.dtype.kind == "f" else -1, label.dtype)
        label_U[user[asked]] = label[asked]
        return np.where(training, label_U[user], label)
