from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from supermoe.data.schema import FIRST_ID
from supermoe.data.store import SPLITS, IdLists, Store
from supermoe.training.warm_start import NEAR, TABLE_STD, _visible_events, fit_bag, neighbour_vectors

SIZE, EXAMPLES = 12, np.arange(0, 60, 2)


@pytest.fixture(scope="module")
def bag() -> IdLists:
    """Sixty examples with up to five of ten ids, two of which go together."""
    rng = np.random.default_rng(0)
    ids = [np.sort(rng.choice(10, rng.integers(0, 6), replace=False)) + FIRST_ID for _ in range(60)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    flat = np.concatenate(ids).astype(np.int32)
    return IdLists(offsets, flat, rng.integers(1, 9, len(flat)).astype(np.float32))


def tfidf(bag: IdLists, idf: np.ndarray) -> np.ndarray:
    """The examples' L2-normalised rows, the long way."""
    rows = np.zeros((len(EXAMPLES), SIZE))
    for n, i in enumerate(EXAMPLES):
        part = slice(bag.offsets[i], bag.offsets[i + 1])
        rows[n, bag.ids[part]] = np.log1p(bag.counts[part]) * idf[bag.ids[part]]
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def fit(bag: IdLists, dim: int) -> tuple[np.ndarray, np.ndarray]:
    table, idf = fit_bag(bag, EXAMPLES, SIZE, dim, torch.Generator().manual_seed(0))
    return table.double().numpy(), idf.double().numpy()


def test_inverse_document_frequencies_of_the_given_examples(bag: IdLists) -> None:
    _, idf = fit(bag, 3)
    held = [set(bag.ids[bag.offsets[i] : bag.offsets[i + 1]].tolist()) for i in EXAMPLES]
    for v in range(FIRST_ID, SIZE):
        assert idf[v] == pytest.approx(np.log(31 / (1 + sum(v in ids for ids in held))) + 1, rel=1e-6)
    assert idf[:FIRST_ID].tolist() == [0.0, 0.0]


def test_the_table_spans_the_leading_singular_vectors_best_first(bag: IdLists) -> None:
    table, idf = fit(bag, 3)
    matrix = tfidf(bag, idf)
    strength = np.linalg.norm(matrix @ table, axis=0)
    assert (strength[:-1] >= strength[1:]).all()
    assert (matrix @ table).std() == pytest.approx(1.0, rel=0.02)  # n - 1 in place of n in 90 values
    leading = np.linalg.svd(matrix)[1][:3]
    found = np.linalg.norm(matrix @ (table / np.linalg.norm(table, axis=0)), axis=0)
    assert found[0] == pytest.approx(leading[0], rel=1e-3)
    assert (found[1:] > 0.85 * leading[1:]).all()  # four power iterations on the flat rest of a random spectrum


def test_a_table_wider_than_the_vocabulary_ends_in_zeros(bag: IdLists) -> None:
    table, _ = fit(bag, 20)
    assert table.shape == (SIZE, 20)
    assert (table[:, SIZE:] == 0).all()
    assert np.isfinite(table).all()


def test_examples_with_nothing_in_the_bag(bag: IdLists) -> None:
    empty = IdLists(np.zeros(61, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    table, _ = fit(empty, 3)
    assert np.isfinite(table).all()


def test_products_of_neighbours_vectors_are_their_information() -> None:
    rng = np.random.default_rng(0)
    size = FIRST_ID + 6
    reads = [rng.integers(FIRST_ID - 1, size, length) for length in (40, 1, 60)]  # some ids name nothing
    count = np.zeros((size, size))
    for ids in reads:
        for i, j in ((i, j) for i in range(len(ids)) for j in range(len(ids)) if 0 < abs(i - j) <= NEAR):
            if min(ids[i], ids[j]) >= FIRST_ID:
                count[ids[i], ids[j]] += 1 / abs(i - j)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(count * count.sum() / np.outer(count.sum(0), count.sum(1)))
    information = np.where(count > 0, np.maximum(information, 0) * count / (count + 1), 0)
    strength, directions = np.linalg.eigh(information)
    expected = (directions * np.maximum(strength, 0)) @ directions.T  # no vectors have negative squares
    read_N = torch.from_numpy(np.repeat(np.arange(3), [len(ids) for ids in reads]))
    found = neighbour_vectors(torch.from_numpy(np.concatenate(reads)), read_N, (size, 10), torch.Generator()).double()
    assert found.shape == (size, 10)
    assert (found[:FIRST_ID] == 0).all()
    assert found.std().item() == pytest.approx(TABLE_STD)
    products = (found @ found.T).numpy()
    assert np.allclose(products / products.max(), expected / expected.max(), atol=1e-4)  # fp32 sums


def test_without_neighbours_there_are_no_vectors() -> None:
    alone = neighbour_vectors(torch.tensor([2, 3, 4]), torch.arange(3), (5, 4), torch.Generator())
    assert (alone == 0).all()


def test_tables_start_from_what_training_examples_see(trained_run: Path) -> None:
    store = Store.open(trained_run / "store")
    rows, read_N = _visible_events(store, seed=0)
    examples = store.examples
    seen = set()
    for user, visible, split in zip(examples.user, examples.visible, examples.split, strict=True):
        if split == SPLITS["train"]:
            seen |= set(range(store.offsets_U[user], store.offsets_U[user] + visible))
    assert sorted(rows.tolist()) == sorted(seen)
    assert len(seen) < len(store.time)
    user = np.searchsorted(store.offsets_U, rows, side="right")
    assert len(np.unique(np.stack([user, read_N.numpy()]), axis=1).T) == len(np.unique(user))
