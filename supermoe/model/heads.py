"""Heads: from what a task reads to its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supermoe import ops
from supermoe.data.batch import Batch
from supermoe.data.schema import FIRST_ID
from supermoe.model.embedding import Table
from supermoe.model.packed import read_of_events
from supermoe.model.second_opinion import SecondOpinion

DIRECT_PRIOR = 400.0  # users' worth of evidence that a weight must overcome to leave zero
READ_PRIOR = 10_000.0  # labelled users that make what was learnt as trustworthy as the fixed direct inputs
NEARNESS = 0.5  # scale of an event's query at the start
PRIOR_COUNTS = 60.0  # counts that a field head's prior is worth beside a user's own


@dataclass(frozen=True)
class HeadSpec:
    """What a task or a pre-training objective needs.

    `linear`: `size` logits; with `field` the classes are that event field's ids, or those in `ids`, and counts of them
    are copied; `direct`: the head also reads the leading directions of the bags, for static attributes of few users;
    `boosted`: boosted trees on the derived features may answer beside it.
    `field`: one logit per id of the field, from its embeddings. `reads`: an example's read-out, an event's output, or
    both.
    """

    kind: Literal["linear", "field"]
    size: int = 0
    field: str | None = None
    reads: Literal["example", "event", "both"] = "example"
    ids: Sequence[int] = ()
    direct: bool = False
    boosted: bool = False

    @property
    def reads_examples(self) -> bool:
        """Does it ask a question about users at their cuts?"""
        return self.reads != "event"

    @property
    def reads_events(self) -> bool:
        """Does it learn from every event?"""
        return self.reads != "example"


class CopyTerm(nn.Module):
    """What a user did before, scored by its counts, window by window.

    logit_v = sum over the field's bags w of (a_w + b_w(x) + c_wv) log(1 + rate_v count_v): from the ids in the bags
    alone. The a_w start at `start` in all, the rest at zero, and the rates, which are not learnt, at one. With `ids`
    only those ids are scored, in their order.
    """

    rate_V: Tensor
    class_V: Tensor | None

    def __init__(self, width: int, size: int, bags: list[str], start: float, ids: Sequence[int] = ()):
        super().__init__()
        self.bags = bags
        self.register_buffer("rate_V", torch.ones(size))
        self.register_buffer("class_V", class_of_ids(ids) if ids else None, persistent=False)
        self.window = nn.Linear(width, len(bags))
        self.class_VW = nn.Parameter(torch.zeros(size, len(bags)))
        nn.init.zeros_(self.window.weight)
        nn.init.constant_(self.window.bias, start / len(bags))

    def forward(self, x_BX: Tensor, batch: Batch) -> Tensor:
        """Read-outs and the bags of the same examples -> logits_BV."""
        size, weight_BW = len(self.class_VW), self.window(x_BX)
        cells, values = [], []
        for w, name in enumerate(self.bags):
            bag = batch.bags[name]
            assert bag.weights is not None, "bags are counted"
            example_R, id_R, count_R = read_of_events(bag.offsets, len(bag.ids)), bag.ids, bag.weights
            if self.class_V is not None:
                class_R = F.pad(self.class_V, (0, 1), value=-1)[id_R.clamp(max=len(self.class_V))]
                scored = class_R >= 0
                example_R, id_R, count_R = example_R[scored], class_R[scored], count_R[scored]
            cells.append(example_R * size + id_R)
            weight_R = weight_BW[:, w][example_R] + self.class_VW[:, w][id_R]
            values.append(weight_R * torch.log1p(count_R * self.rate_V[id_R]).to(weight_R.dtype))
        flat = torch.zeros(len(x_BX) * size, dtype=values[0].dtype, device=x_BX.device)
        return flat.index_add(0, torch.cat(cells), torch.cat(values)).view(len(x_BX), size)


def class_of_ids(ids: Sequence[int]) -> Tensor:
    """Class c has the id ids[c] -> the class of every id [max(ids) + 1]; -1 for none, and below `FIRST_ID`."""
    class_V = torch.full((max(ids) + 1,), -1)
    class_V[torch.tensor(ids)] = torch.arange(len(ids))
    class_V[:FIRST_ID] = -1
    return class_V


class LinearHead(nn.Module):
    """logits = W dropout(norm(x)) + b, and copied counts where the classes are ids of a field with `bags`.

    W starts at zero: a head that is given the prior's bias starts as the prior. The last `direct_dim` inputs are added
    as they are, through weights of their own. There may be a `second` opinion beside.
    """

    def __init__(
        self,
        width: int,
        size: int,
        bags: list[str],
        dropout: float,
        ids: Sequence[int] = (),
        direct_dim: int = 0,
        second: SecondOpinion | None = None,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.zeros(size, width))
        self.bias = nn.Parameter(torch.zeros(size))
        self.copy = CopyTerm(width, size, bags, 0.0, ids) if bags else None
        self.direct_CX = nn.Parameter(torch.zeros(size, direct_dim)) if direct_dim else None
        self.second = second
        self.dropout = dropout
        self.direct_prior = DIRECT_PRIOR  # of the direct inputs' weights; `linear_start` chooses it

    def logits(self, x_BX: Tensor, batch: Batch) -> Tensor:
        """Read-outs x_BX of the batch's examples -> logits_BC."""
        x_BX, direct_BX = x_BX.split([self.weight.shape[1], x_BX.shape[1] - self.weight.shape[1]], dim=1)
        x_BX = ops.dropout(self.norm(x_BX), self.dropout, self.training)
        logits_BC = F.linear(x_BX, self.weight, self.bias)
        if self.direct_CX is not None:
            logits_BC = logits_BC + F.linear(direct_BX, self.direct_CX)
        if self.copy is not None:
            logits_BC = logits_BC + self.copy(x_BX, batch)
        return logits_BC if self.second is None else self.second.beside(logits_BC, batch)

    def penalty(self, num_users: int) -> Tensor | float:
        """Gaussian prior on the weights of a head with direct inputs, per labelled user -> scalar; 0 for other heads.

        Read-outs of a network that a few hundred labels trained fit these labels in any case, hence their stronger one.
        """
        if self.direct_CX is None:
            return 0.0
        doubt = 1 + READ_PRIOR / num_users
        of_direct = self.direct_prior * self.direct_CX.square().sum()
        return (of_direct + DIRECT_PRIOR * doubt * self.weight.square().sum()) / num_users


class FieldHead(nn.Module):
    """logits_V = query(x) E^T + b + copied counts, with E the event embedding's own table of the field.

    The query starts at `nearness` times what is read: at zero, but for heads of events, which are held to be near what
    follows until more is learnt. They have no copy term: bags are counted at an example's cut. Copied counts start at
    `copied`. There may be a `second` opinion beside.
    """

    def __init__(
        self,
        width: int,
        table: Table,
        bags: list[str],
        dropout: float,
        copied: float = 1.0,
        nearness: float = 0.0,
        second: SecondOpinion | None = None,
    ):
        super().__init__()
        self._tied = (table,)  # in a tuple, so that the table stays the event embedding's parameter alone
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, table.embedding_dim, bias=False)
        self.project.weight.data.copy_(nearness * torch.eye(table.embedding_dim, width))
        self.bias = nn.Parameter(torch.zeros(table.num_embeddings, device=table.weight.device))
        self.bias.is_table = True  # type: ignore[attr-defined]  # told to the optimiser
        self.copy = CopyTerm(width, table.num_embeddings, bags, copied) if bags else None
        self.second = second
        self.dropout = dropout

    @property
    def tied(self) -> Table:
        """The table whose rows score the ids."""
        return self._tied[0]

    @torch.no_grad()
    def start_at(self, prior_V: Tensor) -> None:
        """Start at the shares `prior_V` (> 0) of the ids, and weigh a user's own counts against them.

        log p_v + log(1 + count_v / (m p_v)) = log(p_v + count_v / m): with one bag the head starts as the mean of a
        Dirichlet posterior whose prior is worth m = `PRIOR_COUNTS`.
        """
        self.bias.copy_(prior_V.log())
        if self.copy is not None:
            self.copy.rate_V.copy_(1 / (PRIOR_COUNTS * prior_V))

    def query(self, x: Tensor) -> Tensor:
        """What is looked for in the table: [., X] -> [., D]."""
        return self.project(self._regularised(x))

    def table(self) -> tuple[Tensor, Tensor]:
        """weight_VD and bias_V over the whole vocabulary, padding and unknown included."""
        return self.tied.weight, self.bias

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A weight [., D] and a bias [.] that hold the rows of these ids, and the ids' places in them."""
        weight, place = self.tied.rows(ids)
        return weight, self.bias, place

    def logits(self, x_BX: Tensor, batch: Batch) -> Tensor:
        """Read-outs x_BX of the batch's examples -> logits_BV."""
        x_BX = self._regularised(x_BX)
        logits_BV = F.linear(self.project(x_BX), *self.table())
        if self.copy is not None:
            logits_BV = logits_BV + self.copy(x_BX, batch)
        return logits_BV if self.second is None else self.second.beside(logits_BV, batch)

    def penalty(self, num_users: int) -> float:
        """See `LinearHead.penalty`."""
        return 0.0

    def _regularised(self, x: Tensor) -> Tensor:
        return ops.dropout(self.norm(x), self.dropout, self.training)


class NextFieldHead(FieldHead):
    """A field head of events that is asked at cuts too, where more is known than what happened last.

    logits_V = (1 + trust(x)) event logits_V + correction_V(x), with trust and correction 0 at the start. After a pause
    people seldom go on where they stopped: what they take then depends on the date, their habits and the pause itself.
    """

    def __init__(
        self,
        event_width: int,
        width: int,
        table: Table,
        bags: list[str],
        event_dropout: float,
        dropout: float,
        second: SecondOpinion | None = None,
    ):
        super().__init__(event_width, table, [], event_dropout, nearness=NEARNESS, second=second)
        self.correction = FieldHead(width, table, bags, dropout, copied=0.0)
        self.trust = nn.Linear(width, 1)
        nn.init.zeros_(self.trust.weight)
        nn.init.zeros_(self.trust.bias)

    def asked_at_cuts(self) -> list[nn.Parameter]:
        """What only the labels at cuts teach."""
        return [*self.correction.parameters(), *self.trust.parameters()]

    def logits_at_cut(self, event_BV: Tensor, x_BX: Tensor, batch: Batch) -> Tensor:
        """Logits of the last visible events and read-outs x_BX of the batch's examples -> logits_BV."""
        trust_B1 = 1 + self.trust(self.correction.norm(x_BX))
        logits_BV = trust_B1 * event_BV + self.correction.logits(x_BX, batch)
        return logits_BV if self.second is None else self.second.beside(logits_BV, batch)
