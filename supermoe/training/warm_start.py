"""The feature network starts where a data scientist would: standardised inputs, TF-IDF bags, singular vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from supermoe.data.batches import ranges
from supermoe.data.schema import FIRST_ID
from supermoe.data.store import SPLITS, IdLists, Store

MAX_EXAMPLES = 50_000  # enough to fix a few hundred directions; keeps the matrix in memory


def warm_start(model: Any, store: Store, seed: int) -> None:
    """Fit the fixed parts of the feature encoder on the training examples."""
    train = np.flatnonzero(np.asarray(store.examples.split) == SPLITS["train"])
    if len(train) > MAX_EXAMPLES:
        train = np.sort(np.random.default_rng(seed).choice(train, MAX_EXAMPLES, replace=False))
    generator = torch.Generator().manual_seed(seed)
    encoder = model.indicators.features
    for name in encoder.bags:
        matrix_VD, idf_V = fit_bag(store.bags[name], train, store.schema.bags[name].size, encoder.bag_dim, generator)
        encoder.init_bag(name, matrix_VD, idf_V)
    encoder.init_numbers(torch.from_numpy(np.asarray(store.features)[train]))


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
    """Leading right singular vectors by block power iteration (Halko et al. 2011, algorithm 4.4), scaled; [V, dim]."""
    block = torch.randn(matrix.shape[1], dim, generator=generator)
    for _ in range(4):
        block = torch.linalg.qr(matrix.t() @ (matrix @ block)).Q
    # Rotated so that the leading direction comes first.
    projected = matrix @ block
    block = block @ torch.linalg.eigh(projected.t() @ projected).eigenvectors.flip(1)
    # A matrix of lower rank than `dim`, or a single id, leaves fewer columns.
    table = torch.zeros(matrix.shape[1], dim)
    table[:, : block.shape[1]] = block
    scale = (matrix @ table).std().clamp(min=1e-12)
    return table / scale
