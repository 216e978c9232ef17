"""The encoder: a causal history pass that can be extended, and an indicator pass that asks questions of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from supermoe import ops
from supermoe.config import ModelConfig
from supermoe.model.attention import Attention, EventLayout, IndicatorLayout, KeyValues, Rotary
from supermoe.model.moe import FeedForward, MoE
from supermoe.model.packed import index_in_read, interleave, read_of_events


@dataclass(frozen=True)
class LayerRouting:
    """Where one MoE layer sent the tokens of one pass."""

    layer: int
    tokens: Literal["history", "indicator"]  # events in order; questions in order, each about all examples in order
    routing: ops.Routing

    @property
    def aux_loss(self) -> Tensor | None:
        """The router's own loss, weighted -> scalar."""
        return self.routing.aux_loss


@dataclass(frozen=True)
class History:
    """S reads as the encoder remembers them: what it takes to append events and to ask questions.

    J events are known in all; `event_ND` and `routings` are of the N events read last.
    """

    event_ND: Tensor | None  # None: not wanted
    time_J: Tensor
    offsets_S: Tensor  # [S + 1], of the J events
    layers: list[KeyValues]
    routings: list[LayerRouting]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, on one residual stream; the same weights serve events and indicators."""

    def __init__(self, config: ModelConfig, dense: bool):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, bias=False)
        self.attention = Attention(config.dim, config.heads)
        self.feed_forward_norm = nn.LayerNorm(config.dim, bias=False)
        self.feed_forward: FeedForward | MoE
        if dense:
            self.feed_forward = FeedForward(config.dim, config.hidden or 4 * config.dim, config.activation)
        else:
            self.feed_forward = MoE(config.moe, config.dim, config.activation)
        self.dropout = config.dropout

    def history(
        self, x_ND: Tensor, layout: EventLayout, past: KeyValues | None
    ) -> tuple[Tensor, ops.Routing | None, KeyValues]:
        """New events behind their past; see `Attention.history`."""
        y_ND, known = self.attention.history(self.attention_norm(x_ND), layout, past)
        return *self._feed(x_ND, y_ND), known

    def remember(self, x_ND: Tensor, layout: EventLayout, past: KeyValues | None) -> KeyValues:
        """What `history` remembers, without its outputs."""
        return self.attention.remember(self.attention_norm(x_ND), layout, past)

    def indicators(self, x_MD: Tensor, layout: IndicatorLayout, known: KeyValues) -> tuple[Tensor, ops.Routing | None]:
        """Indicators; see `Attention.indicators`."""
        return self._feed(x_MD, self.attention.indicators(self.attention_norm(x_MD), layout, known))

    def _feed(self, x_ND: Tensor, attended_ND: Tensor) -> tuple[Tensor, ops.Routing | None]:
        x_ND = x_ND + ops.dropout(attended_ND, self.dropout, self.training)
        y_ND, routing = self.feed_forward_norm(x_ND), None
        if isinstance(self.feed_forward, MoE):
            y_ND, routing = self.feed_forward(y_ND)
        else:
            y_ND = self.feed_forward(y_ND)
        return x_ND + ops.dropout(y_ND, self.dropout, self.training), routing


class Encoder(nn.Module):
    """Blocks over packed rows; dense first, then mixtures of experts.

    `extend` encodes events causally: an event sees itself and earlier events of its read, never the time of the event
    after it. `ask` lets an indicator read the events it may see and itself: no event and no other indicator sees it.
    """

    blocks: Sequence[Block]

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rotary = Rotary(config.dim // config.heads)
        blocks = [Block(config, dense=i < config.dense_layers) for i in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]  # annotated as what it holds
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.task_gradient = config.task_gradient

    def extend(
        self, x_ND: Tensor, time_N: Tensor, offsets_S: Tensor, past: History | None = None, outputs: bool = True
    ) -> History:
        """Encode new events x_ND behind the `past` of the same S reads, without encoding that again.

        Without `outputs` the last block only remembers the events, which is all that indicators read of it.
        """
        read_N = read_of_events(offsets_S, len(x_ND))
        index_N = index_in_read(offsets_S, read_N)
        known_offsets_S, merge, time_J = offsets_S, None, time_N
        if past is not None:
            known_offsets_S, merge = interleave(past.offsets_S, offsets_S, len(past.time_J), len(time_N))
            index_N = index_N + past.offsets_S.diff()[read_N]
            time_J = torch.cat([past.time_J, time_N])[merge]
        turn = self.rotary(index_N, time_N - read_starts(time_J, known_offsets_S)[read_N])
        layout = EventLayout(turn, offsets_S, known_offsets_S, merge, ops.pack(offsets_S))
        layers: list[KeyValues] = []
        routings: list[LayerRouting] = []
        for i, block in enumerate(self.blocks):
            past_layer = past.layers[i] if past else None
            if i == len(self.blocks) - 1 and not outputs:
                layers.append(block.remember(x_ND, layout, past_layer))
                break
            x_ND, routing, known = block.history(x_ND, layout, past_layer)
            layers.append(known)
            if routing is not None:
                routings.append(LayerRouting(i, "history", routing))
        return History(self.norm(x_ND) if outputs else None, time_J, known_offsets_S, layers, routings)

    def ask(
        self, history: History, x_MD: Tensor, read_M: Tensor, visible_M: Tensor, cut_M: Tensor
    ) -> tuple[Tensor, list[LayerRouting]]:
        """Answers y_MD to the indicators x_MD, about the first `visible_M` events of a read at `cut_M`."""
        turn = self.rotary(visible_M, cut_M - read_starts(history.time_J, history.offsets_S)[read_M])
        packing = ops.pack_indicators(history.offsets_S, read_M, visible_M)
        layout = IndicatorLayout(turn, history.offsets_S, read_M, visible_M, packing)
        routings = []
        for i, (block, known) in enumerate(zip(self.blocks, history.layers, strict=True)):
            x_MD, routing = block.indicators(x_MD, layout, known.with_gradient(self.task_gradient))
            if routing is not None:
                routings.append(LayerRouting(i, "indicator", routing))
        return self.norm(x_MD), routings


def read_starts(time_J: Tensor, offsets_S: Tensor) -> Tensor:
    """Time of every read's first event -> int64 [S]; 0 for an empty read."""
    first_S = torch.cat([time_J, time_J.new_zeros(1)])[offsets_S[:-1]]
    return first_S.masked_fill(offsets_S.diff() == 0, 0)
