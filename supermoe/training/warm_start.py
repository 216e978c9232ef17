"""Training starts where a data scientist would: standardised inputs, TF-IDF bags, vectors of neighbouring values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from supermoe.data.batches import gather_lists, ranges
from supermoe.data.schema import FIRST_ID
from supermoe.data.store import SPLITS, IdLists, Store
from supermoe.model.feature_encoder import FeatureEncoder

MAX_EXAMPLES = 50_000  # enough to fix a few hundred directions; keeps the matrix in memory
CHUNK = 4096  # of them at once
MAX_EVENTS = 1_000_000  # likewise, to place the values of the largest vocabularies
MIN_EVENTS, EVENTS_PER_VALUE = 100_000, 100  # to place those of small ones
NEAR = 5  # events between which values count as neighbours
TABLE_STD = 0.1


def warm_start(model: Any, store: Store, seed: int) -> None:
    """Fit the fixed parts of the feature encoder on the training examples, and the event tables' first values.

    Tables whose rows lie on several ranks start at random.
    """
    train = at_most(MAX_EXAMPLES, np.flatnonzero(np.asarray(store.examples.split) == SPLITS["train"]), seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = model.indicators.features
    for name in encoder.bags:
        matrix_VD, idf_V = fit_bag(store.bags[name], train, store.schema.bags[name].size, encoder.bag_dim, generator)
        encoder.init_bag(name, matrix_VD, idf_V)
    encoder.init_numbers(torch.from_numpy(np.asarray(store.features)[train]))
    chunks = np.split(train, range(CHUNK, len(train), CHUNK))
    model.profile.fit((direct_inputs(model, store, chunk) for chunk in chunks), square_norm=encoder.dim)
    rows, read_N = _visible_events(store, seed)
    for name in model.embedding.categories:
        weight_VD = model.embedding.tables[name].weight
        if not hasattr(weight_VD, "shard"):
            enough = max(MIN_EVENTS, EVENTS_PER_VALUE * len(weight_VD))
            ids_N = torch.from_numpy(store.columns[name][rows[:enough]].astype(np.int64))
            weight_VD.data += neighbour_vectors(ids_N, read_N[:enough], tuple(weight_VD.shape), generator)


def at_most(count: int, rows: np.ndarray, seed: int) -> np.ndarray:
    """The rows, or so many of them at random, in their order."""
    return rows if len(rows) <= count else np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def direct_inputs(model: Any, store: Store, examples: np.ndarray) -> Tensor:
    """The features of some examples as heads of static attributes read them."""
    return model.indicators.features.direct(*_inputs(model, store, examples))


def network_inputs(model: Any, store: Store, examples: np.ndarray) -> Tensor:
    """The features of some examples as the feature network reads them, before they are weighed."""
    numbers_BI, bags = _inputs(model, store, examples)
    return torch.cat([numbers_BI, *bags], dim=1)


def _inputs(model: Any, store: Store, examples: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    encoder: FeatureEncoder = model.indicators.features
    bags = {name: gather_lists(store.bags[name], examples) for name in encoder.bags}
    return encoder.inputs(torch.from_numpy(np.asarray(store.features)[examples]), bags)


def _visible_events(store: Store, seed: int) -> tuple[np.ndarray, Tensor]:
    """Rows of the events that a training example may see, user after user in random order, and whose they are."""
    examples = store.examples
    train = np.asarray(examples.split) == SPLITS["train"]
    visible_U = np.zeros(len(store.offsets_U) - 1, np.int64)
    np.maximum.at(visible_U, examples.user[train], examples.visible[train])
    users = np.random.default_rng(seed).permutation(len(visible_U))
    users = users[: np.searchsorted(visible_U[users].cumsum(), MAX_EVENTS) + 1]
    rows, offsets = ranges(store.offsets_U[users], visible_U[users])
    return rows, torch.from_numpy(np.repeat(np.arange(len(users)), np.diff(offsets)))


def neighbour_vectors(ids_N: Tensor, read_N: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Vectors [V, D] whose products approach the positive pointwise mutual information of ids near each other.

    Levy and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization" (2014): what word2vec learns, by one
    symmetric factorisation. A pair d events apart counts 1 / d; pairs that are seldom seen are believed less.
    """
    size, dim = shape
    pairs, counts = [], []
    for distance in range(1, NEAR + 1):
        pair_2N = torch.stack([ids_N[:-distance], ids_N[distance:]])
        pair_2N = pair_2N[:, (read_N[:-distance] == read_N[distance:]) & (pair_2N >= FIRST_ID).all(dim=0)]
        pairs += [pair_2N, pair_2N.flip(0)]
        counts += [torch.full((2 * pair_2N.shape[1],), 1 / distance)]
    both = torch.sparse_coo_tensor(torch.cat(pairs, dim=1), torch.cat(counts), (size, size), check_invariants=True)
    both = both.coalesce()
    (i, j), count = both.indices(), both.values()
    total_V = torch.zeros(size).index_add(0, i, count)
    information = torch.log(count * total_V.sum() / (total_V[i] * total_V[j])).clamp(min=0) * count / (count + 1)
    matrix = torch.sparse_coo_tensor(
        both.indices(), information, (size, size), is_coalesced=True, check_invariants=True
    )
    block = _leading(matrix, min(dim, size), generator)
    strength, directions = torch.linalg.eigh(block.t() @ (matrix @ block))
    vectors = torch.zeros(size, dim)
    vectors[:, : block.shape[1]] = (block @ directions) * strength.clamp(min=0).sqrt()
    vectors[:FIRST_ID] = 0.0  # up to rounding they are
    return TABLE_STD * vectors / vectors.std().clamp(min=1e-12)


def fit_bag(
    bag: IdLists, examples: np.ndarray, size: int, dim: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Truncated SVD of the examples' TF-IDF rows -> table [size, dim] of bag vectors of unit deviation, idf [size]."""
    assert bag.counts is not None, "bags are counted"
    rows, offsets = ranges(bag.offsets[examples], bag.offsets[examples + 1] - bag.offsets[examples])
    ids = torch.from_numpy(bag.ids[rows].astype(np.int64))
    counts = torch.from_numpy(bag.counts[rows].astype(np.float32))
    example = torch.repeat_interleave(torch.arange(len(examples)), torch.from_numpy(np.diff(offsets)))
    idf_V = torch.log((1 + len(examples)) / (1 + torch.bincount(ids, minlength=size).float())) + 1
    idf_V[:FIRST_ID] = 0.0  # neither absent nor unknown values say anything
    weights = torch.log1p(counts) * idf_V[ids]
    norm = torch.zeros(len(examples)).index_add(0, example, weights.square()).sqrt().clamp(min=1e-12)
    matrix = torch.sparse_coo_tensor(
        torch.stack([example, ids]), weights / norm[example], (len(examples), size), check_invariants=True
    )
    return _directions(matrix.coalesce(), dim, generator), idf_V


def _directions(matrix: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Leading right singular vectors, scaled; [V, dim]."""
    block = _leading(matrix, dim, generator)
    # Rotated so that the leading direction comes first.
    projected = matrix @ block
    block = block @ torch.linalg.eigh(projected.t() @ projected).eigenvectors.flip(1)
    # A matrix of lower rank than `dim`, or a single id, leaves fewer columns.
    table = torch.zeros(matrix.shape[1], dim)
    table[:, : block.shape[1]] = block
    scale = (matrix @ table).std().clamp(min=1e-12)
    return table / scale


def _leading(matrix: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """A basis of the leading right singular vectors by block power iteration (Halko et al. 2011, algorithm 4.4)."""
    block = torch.randn(matrix.shape[1], dim, generator=generator)
    for _ in range(4):
        block = torch.linalg.qr(matrix.t() @ (matrix @ block)).Q
    return block
