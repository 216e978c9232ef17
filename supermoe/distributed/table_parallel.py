"""Embedding tables that outgrow one device: their rows lie on all ranks, and a step moves only the rows it needs.

Rank r holds the r-th block of ceil(V / ranks) rows, as DTensor's `Shard(0)` has it. A look-up asks each owner once for
the distinct ids of the batch: counts, ids and rows are exchanged forward, the rows' gradients backward, where owners
get them as sparse gradients. Hashed ids spread evenly over the ranks; a fitted vocabulary is sorted by falling count,
so the first rank answers most requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from supermoe.distributed.row_shard import RowShard, save_whole, sharded_parameter
from supermoe.model.embedding import INIT_STD, Table
from supermoe.model.heads import FieldHead
from supermoe.typed_yaml import UserError

_DRAWN_AT_ONCE = 1 << 14  # rows per seed, so that a table starts alike on any number of ranks


@dataclass(frozen=True)
class Route:
    """Which rows this rank asks of each owner, and which of its own the others want: one exchange of ids."""

    group: dist.ProcessGroup
    asked: list[int]  # rows that this rank asks of each rank
    wanted: list[int]  # rows that each rank wants of this one
    local_R: Tensor  # those, as places in this rank's block

    def send(self, rows_RD: Tensor) -> Tensor:
        """Owners' rows -> the rows asked for, in rising order of ids."""
        return _exchange(rows_RD, self.wanted, self.asked, self.group)

    def send_back(self, grad_UD: Tensor) -> Tensor:
        """Gradients of the rows asked for -> those of the owners' rows, in the order of `local_R`."""
        return _exchange(grad_UD, self.asked, self.wanted, self.group)


def find_route(ids_U: Tensor, shard: RowShard) -> Route:
    """Tell owners which rows are needed here; `ids_U` is distinct and rising. Waits once, for the counts."""
    group, ranks = shard.mesh.get_group(), shard.mesh.size()
    edges_W = torch.arange(1, ranks + 1, device=ids_U.device) * shard.block
    ends_W = torch.searchsorted(ids_U, edges_W)
    asked_W = ends_W.diff(prepend=ends_W.new_zeros(1))
    wanted_W = torch.empty_like(asked_W)
    dist.all_to_all_single(wanted_W, asked_W, group=group)
    asked, wanted = torch.stack([asked_W, wanted_W]).tolist()
    return Route(group, asked, wanted, _exchange(ids_U, asked, wanted, group) - shard.first)


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found


class _Fetch(torch.autograd.Function):
    """The rows of a route; the first is padding's, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, route: Route) -> Tensor:
        ctx.route, ctx.shape = route, local.shape
        return route.send(local.index_select(0, route.local_R))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_U: Tensor) -> tuple[Tensor, None]:
        route: Route = ctx.route
        grad_U = grad_U / len(route.asked)
        grad_U[0] = 0
        grad_R = route.send_back(grad_U)
        return torch.sparse_coo_tensor(route.local_R[None], grad_R, ctx.shape, check_invariants=False), None


class ShardedTable(nn.Module):
    """This rank's rows of a table, used as `Table` is; a table on the meta device is drawn here, block by block."""

    def __init__(self, table: Table, mesh: DeviceMesh):
        super().__init__()
        self.shard = RowShard(mesh, table.num_embeddings)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        if table.weight.is_meta:
            rows_RD = draw_rows(self.shard, table.embedding_dim)
        else:
            rows_RD = table.weight.detach()[self.shard.first : self.shard.last].clone()
        self.weight = _table_rows(rows_RD, self.shard)
        save_whole(self, "weight", self.shard)

    def route(self, ids: Tensor) -> tuple[Route, Tensor]:
        """The exchange that brings the rows of these ids, padding's first, and the ids' places among them."""
        padded = torch.cat([ids.new_zeros(1), ids.flatten()])
        ids_U, place = padded.unique(return_inverse=True)
        return find_route(ids_U, self.shard), place[1:].view_as(ids)

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `Table.rows`; all ranks must call it, however few ids they have."""
        route, place = self.route(ids)
        return _Fetch.apply(self.weight, route), place

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of these ids."""
        weight_UD, place = self.rows(ids)
        return nn.functional.embedding(place, weight_UD)


class ShardedFieldHead(FieldHead):
    """A field head whose table and bias are sharded: it scores given ids, never all of them."""

    def __init__(self, name: str, head: FieldHead, table: ShardedTable):
        nn.Module.__init__(self)
        if head.copy is not None:
            raise UserError(f"tasks.{name}: {_WHOLE}")
        self.name, self.dropout, self.copy = name, head.dropout, None
        self._sharded = (table,)  # in a tuple: it stays the event embedding's
        self.norm, self.project = head.norm, head.project
        shard = table.shard
        if head.bias.is_meta:
            bias_R = torch.zeros(shard.last - shard.first, device=table.weight.device)
        else:
            bias_R = head.bias.detach()[shard.first : shard.last].clone()
        self.bias = _table_rows(bias_R, shard)
        self.shard = shard
        save_whole(self, "bias", self.shard)

    @torch.no_grad()
    def start_at(self, prior_V: Tensor) -> None:
        """See `FieldHead.start_at`."""
        self.bias.copy_(prior_V[self.shard.first : self.shard.last].log())

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `FieldHead.rows`."""
        table = self._sharded[0]
        route, place = table.route(ids)
        return _Fetch.apply(table.weight, route), _Fetch.apply(self.bias, route), place

    def table(self) -> tuple[Tensor, Tensor]:
        """Refused: no rank has the whole table."""
        raise UserError(f"the head '{self.name}': {_WHOLE}")

    def logits(self, x_BX: Tensor, batch: Any) -> Tensor:
        """Refused, as `table` is."""
        raise UserError(f"the head '{self.name}': {_WHOLE}")


_WHOLE = (
    "it scores every id of its field, but the field's table is sharded by rows, of which only given ids can be scored: "
    "learn from sampled softmax (`negatives: auto` or a number), or let tables of this size stay whole on each rank"
)


def shard_tables(model: Any, mesh: DeviceMesh, min_rows: int) -> Any:
    """Shard the rows of every table of at least `min_rows` over the ranks of `mesh` -> the model, changed in place.

    Call it on all ranks, before data parallelism and before the optimisers are built, with a mesh of one dimension over
    all ranks. The model may have been built with `deferred_rows=min_rows`: then no rank ever holds a whole table, and
    what is drawn does not depend on the number of ranks; call this before heads are initialised and the model is moved.

    What others see of a sharded table, and of the bias of heads tied to it (both are in `sharded_parameters`):

    - *Parameter*: a plain tensor of this rank's rows, with `is_table` and `shard` (a `RowShard`). DDP and FSDP2 must
      leave it alone: ranks hold different rows.
    - *Gradient*: sparse, of these rows, summed over all ranks and divided by their number, as DDP averages. It needs no
      reduction.
    - *Clipping*: the squares of its gradient add up over the group; those of replicated weights count once.
    - *Optimiser*: `RowwiseAdagrad`; its state is one number per row, so it lies with the rows.
    - *Average of weights*: local, as the rows are.
    - *Checkpoint, export*: `state_dict()` of the model, and of an optimiser told by `save_state_whole`, hold DTensors
      `Shard(0)` over the same memory, so DCP writes each row once and loads at any number of ranks; `full_tensor()`
      gathers. `load_state_dict` takes DTensors and whole tensors.

    Raises:
        UserError: where a head must score every id of a table that would be sharded.
    """
    tables = model.embedding.tables
    sharded = {id(table): ShardedTable(table, mesh) for table in tables.values() if table.num_embeddings >= min_rows}
    for name, table in tables.items():
        tables[name] = sharded.get(id(table), table)
    for name, head in model.heads.items():
        if isinstance(head, FieldHead) and id(head.tied) in sharded:
            model.heads[name] = ShardedFieldHead(name, head, sharded[id(head.tied)])
    return model


def draw_rows(shard: RowShard, dim: int) -> Tensor:
    """This rank's rows of a new table, normal with `INIT_STD`, padding's zero: the same rows on any number of ranks."""
    seed = int(torch.randint(1 << 62, ()))  # the generators of all ranks agree
    device = torch.device(shard.mesh.device_type)
    rows_RD = torch.empty(shard.last - shard.first, dim, device=device)
    for start in range(shard.first // _DRAWN_AT_ONCE * _DRAWN_AT_ONCE, shard.last, _DRAWN_AT_ONCE):
        generator = torch.Generator(device).manual_seed(seed + start)
        block = torch.randn(_DRAWN_AT_ONCE, dim, generator=generator, device=device) * INIT_STD
        low, high = max(start, shard.first), min(start + _DRAWN_AT_ONCE, shard.last)
        rows_RD[low - shard.first : high - shard.first] = block[low - start : high - start]
    if shard.first == 0:
        rows_RD[:1] = 0
    return rows_RD


def _table_rows(rows: Tensor, shard: RowShard) -> nn.Parameter:
    parameter = sharded_parameter(rows, shard)
    parameter.is_table = True  # type: ignore[attr-defined]  # told to the optimiser
    return parameter
