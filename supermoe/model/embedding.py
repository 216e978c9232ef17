"""From the fields, numbers and time of an event to its vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supermoe import ops
from supermoe.config import ModelConfig
from supermoe.data.batch import Batch, Jagged
from supermoe.data.schema import PADDING, Schema
from supermoe.model.named import ByName
from supermoe.model.packed import index_in_read, read_of_events

DAY = 86400
LONGEST_GAP = 5 * 365 * DAY  # seconds; longer gaps look the same
CALENDAR_KNOTS = (25, 7)  # full hours from 0 to 24, weekdays
INIT_STD = 0.02


def log_gap(seconds: Tensor) -> Tensor:
    """Seconds between two events on a log scale -> float64 in [0, 1], 1 from five years on."""
    return torch.log1p(seconds.clamp(0, LONGEST_GAP).double()) / math.log1p(LONGEST_GAP)


def calendar(time_N: Tensor) -> Tensor:
    """Hour of day and weekday (Monday first) of int64 seconds UTC -> float64 [N, 2] in [0, 1], on `CALENDAR_KNOTS`."""
    hour_N = (time_N % DAY).double() / DAY
    weekday_N = (time_N // DAY + 3) % 7  # 1970-01-01 was a Thursday
    return torch.stack([hour_N, weekday_N.double() / 6], dim=1)


class Table(nn.Embedding):
    """A vocabulary's table, all of it here."""

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix [., D] with the rows of these ids, padding's first, and their places in it, shaped as `ids`."""
        return self.weight, ids


def embedding_table(num_rows: int, dim: int, deferred_rows: int | None = None) -> Table:
    """A vocabulary's table; id 0 contributes zero. `weight.is_table` marks it for the optimiser.

    From `deferred_rows` rows on it is left on the meta device, without memory: see `distributed.table_parallel`.
    """
    deferred = deferred_rows is not None and num_rows >= deferred_rows
    table = Table(num_rows, dim, padding_idx=PADDING, device="meta" if deferred else None)
    with torch.no_grad():
        table.weight.normal_(std=INIT_STD)
        table.weight[PADDING] = 0
    table.weight.is_table = True  # type: ignore[attr-defined]  # told to the optimiser
    return table


def mean_embedding(table: Table, lists: Jagged) -> Tensor:
    """Mean of the embeddings in every list -> [n, D]; padding does not count, an empty list gives zero."""
    weight, place = table.rows(lists.ids)
    return F.embedding_bag(place, weight, lists.offsets, mode="mean", include_last_offset=True, padding_idx=PADDING)


class InterpolatedEmbedding(nn.Module):
    """Sum over columns of an embedding that is linear between the knots of the column; NaN has an embedding of its own.

    Column p has `knots[p]` evenly spaced knots over [0, 1]; values outside are moved to its ends. With i the knot below
    u and w the way to the next, a column adds (1 - w) E_i + w E_{i+1}.
    """

    last_P: Tensor  # last knot of a column, counted from 0
    first_P: Tensor  # row of a column's first knot; its missing value's row follows the last knot's

    def __init__(self, knots: Sequence[int], dim: int, init_std: float = INIT_STD):
        super().__init__()
        last_P = torch.tensor(knots, dtype=torch.int64) - 1
        first_P = (last_P + 2).cumsum(0) - (last_P + 2)
        self.register_buffer("last_P", last_P, persistent=False)
        self.register_buffer("first_P", first_P, persistent=False)
        self.weight = nn.Parameter(torch.randn(sum(knots) + len(knots), dim) * init_std)

    def forward(self, u_NP: Tensor) -> Tensor:
        """Values in [0, 1], NaN missing -> x_ND."""
        missing_NP = u_NP.isnan()
        place_NP = u_NP.nan_to_num(0.0).clamp(0, 1) * self.last_P
        below_NP = torch.minimum(place_NP.long(), self.last_P - 1)
        way_NP = place_NP - below_NP
        rows = [below_NP, below_NP + 1, (self.last_P + 1).expand_as(below_NP)]
        shares = [(1 - way_NP) * ~missing_NP, way_NP * ~missing_NP, missing_NP.to(way_NP.dtype)]
        # A small dense matrix times the table: the gradient is a matrix product too; a gather's is a slow scatter.
        share_NR = self.weight.new_zeros(len(u_NP), len(self.weight))
        share_NR.scatter_(
            1, torch.cat(rows, dim=1) + self.first_P.repeat(3), torch.cat(shares, dim=1).to(share_NR.dtype)
        )
        return share_NR @ self.weight


class EventEmbedding(nn.Module):
    """Sum of the embeddings of an event's fields, numbers and time features, then layer norm.

    Time features are always there: gap to the user's previous event, hour of day, weekday. An event never sees the
    time of the next one, neither here nor in attention: what comes next is predicted without knowing when.

    `deferred_rows`: see `embedding_table`.
    """

    def __init__(self, schema: Schema, config: ModelConfig, deferred_rows: int | None = None):
        super().__init__()
        self.categories = [name for name, field in schema.fields.items() if field.kind == "category"]
        self.lists = [name for name, field in schema.fields.items() if field.kind == "categories"]
        self.numbers = [name for name, field in schema.fields.items() if field.kind == "number"]
        self.tables = ByName()
        for name in self.categories + self.lists:
            self.tables[name] = embedding_table(schema.fields[name].size, config.dim, deferred_rows)
        knots = [config.number_bins] * (len(self.numbers) + 1)  # numbers and the gap
        self.interpolated = InterpolatedEmbedding([*knots, *CALENDAR_KNOTS], config.dim)
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.dropout = config.dropout

    def forward(self, batch: Batch) -> Tensor:
        """Packed events -> x_ND."""
        numbers = [batch.fields[name][:, None] for name in self.numbers]
        u_NP = torch.cat([*numbers, log_gap(gap_to_previous(batch))[:, None], calendar(batch.time_N)], dim=1)
        x_ND = self.interpolated(u_NP)
        for name in self.categories:
            x_ND = x_ND + self.tables[name](batch.fields[name])
        for name in self.lists:
            x_ND = x_ND + mean_embedding(self.tables[name], batch.lists[name])
        return ops.dropout(self.norm(x_ND), self.dropout, self.training)


def gap_to_previous(batch: Batch) -> Tensor:
    """Seconds since the user's previous event, 0 at the first one -> int64 [N]."""
    read_N = read_of_events(batch.offsets_S, batch.num_events)
    first_N = index_in_read(batch.offsets_S, read_N) == 0
    return batch.time_N - torch.where(first_N, batch.previous_S[read_N], batch.time_N.roll(1))
