"""The model: history in, one vector per user and one read-out per task out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supermoe.config import ModelConfig
from supermoe.data.batch import Batch
from supermoe.data.schema import Schema
from supermoe.model.embedding import EventEmbedding
from supermoe.model.encoder import Encoder, History, LayerRouting
from supermoe.model.feature_encoder import Features
from supermoe.model.habits import Habits
from supermoe.model.heads import NEARNESS, FieldHead, HeadSpec, LinearHead, NextFieldHead
from supermoe.model.indicators import USER, Indicators
from supermoe.model.moe import Experts, MoE
from supermoe.model.named import ByName
from supermoe.model.profile import Profile
from supermoe.model.trees import BoostedTrees
from supermoe.typed_yaml import ALL_TIME, UserError, build


@dataclass(frozen=True)
class Output:
    """What a forward pass gives: rows of events, of users at their cuts, and of tasks."""

    event_ND: Tensor | None  # None where no head reads events
    user_BD: Tensor
    task_BX: dict[str, Tensor]
    routings: list[LayerRouting]  # of every MoE layer, for the history and for the indicators
    questions: list[str]  # the order of the indicators, `user` first


class SuperMoE(nn.Module):
    """Event embedding, encoder with indicators, read-out, and a head per task or pre-training objective (by its name).

    Heads that read examples are tasks: each asks a question of its own where the read-out wants it. `deferred_rows`:
    see `embedding_table`.
    """

    def __init__(
        self, schema: Schema, config: ModelConfig, heads: dict[str, HeadSpec], deferred_rows: int | None = None
    ):
        super().__init__()
        self.config = config
        tasks = [name for name, spec in heads.items() if spec.reads_examples]
        self.reads_events = any(spec.reads_events for spec in heads.values())
        self.embedding = EventEmbedding(schema, config, deferred_rows)
        self.encoder = Encoder(config)
        self.direct = [name for name in tasks if heads[name].direct]
        self.readout = build("supermoe.model.readouts", config.readout, dim=config.dim, tasks=tasks)
        if USER in self.readout.questions:
            raise UserError(f"tasks.{USER}: this name belongs to the user's own indicator; give the task another one.")
        self.indicators = Indicators(schema, config, [USER, *self.readout.questions])
        self.profile = Profile(self.indicators.features.direct_dims[:2], config.profile_dim)
        self.heads = ByName({name: self._head(spec, schema) for name, spec in heads.items()})

    def forward(self, batch: Batch) -> Output:
        """Read the histories and ask every question about every example."""
        return self.ask(self.extend(batch), batch)

    @property
    def embedding_dim(self) -> int:
        """Numbers in a user's vector."""
        return self.config.dim + sum(self.profile.widths)

    def embed(self, batch: Batch) -> Tensor:
        """The vectors of users at their cuts -> [B, embedding_dim]; no task is asked.

        The answer to `user`, as `forward` gives it, holds what the tasks need; behind it the profile of the features
        serves what no task has asked.
        """
        answer_QBD, features, _ = self._answers(self.extend(batch, outputs=False), batch, [USER])
        return torch.cat([answer_QBD.squeeze(0), self.profile(features.direct_BX)], dim=1)

    def extend(self, batch: Batch, past: History | None = None, outputs: bool | None = None) -> History:
        """Read a batch's events, behind the `past` of the same reads where there is one.

        `extend(new, extend(old))` remembers what `extend(old and new)` does, and encodes only the new events. Outputs
        of the events are made where a head reads them, unless `outputs` says otherwise.
        """
        wanted = self.reads_events if outputs is None else outputs
        return self.encoder.extend(self.embedding(batch), batch.time_N, batch.offsets_S, past, wanted)

    def ask(self, history: History, batch: Batch) -> Output:
        """Ask every question about the batch's examples, of which `visible_B` counts the events known to `history`."""
        answer_QBD, features, routings = self._answers(history, batch)
        user_BD, *own = answer_QBD.unbind(0)
        task_BX = self.readout(user_BD, dict(zip(self.readout.questions, own, strict=True)))
        for name, read_BX in task_BX.items():
            beside_BX = features.direct_BX if name in self.direct else features.hidden_BF
            task_BX[name] = torch.cat([read_BX, beside_BX], dim=1)
        return Output(history.event_ND, user_BD, task_BX, history.routings + routings, list(self.indicators.questions))

    def _answers(
        self, history: History, batch: Batch, questions: list[str] | None = None
    ) -> tuple[Tensor, Features, list[LayerRouting]]:
        """Answers to all `questions`, `user` first -> answer_QBD, and what else was made on the way."""
        end_B = history.offsets_S[batch.read_B] + batch.visible_B
        last_B = torch.cat([history.time_J.new_zeros(1), history.time_J])[end_B]
        x_QBD, features = self.indicators(batch, last_B, batch.visible_B > 0, questions)
        where = [per_B.repeat(len(x_QBD)) for per_B in (batch.read_B, batch.visible_B, batch.cut_B)]
        answer_MD, routings = self.encoder.ask(history, x_QBD.flatten(0, 1), *where)
        return answer_MD.view_as(x_QBD), features, routings

    def num_parameters(self, active: bool = False) -> int:
        """Number of weights; `active`: those that one token passes, `top_k` of the experts and no vocabulary tables."""
        total = sum(p.numel() for p in self.parameters())
        if not active:
            return total
        tables = sum(p.numel() for p in self.parameters() if getattr(p, "is_table", False))
        experts = sum(p.numel() for m in self.modules() if isinstance(m, Experts) for p in m.parameters())
        used = experts * self.config.moe.top_k // self.config.moe.experts
        return total - tables - experts + used

    def routers(self) -> list[nn.Module]:
        """Routers of the MoE layers, in order of the layers: `update` them once per optimiser step."""
        return [module.router for module in self.modules() if isinstance(module, MoE)]

    def _head(self, spec: HeadSpec, schema: Schema) -> nn.Module:
        features, dropout = self.indicators.features, self.config.head_dropout
        width = self.readout.width + (0 if spec.direct else features.hidden_dim)
        bags = [name for name, bag in schema.bags.items() if bag.field == spec.field]
        if spec.kind == "linear":
            direct_dim = sum(features.direct_dims) if spec.direct else 0
            rounds = self.config.tree_rounds if spec.boosted and schema.features else 0
            trees = BoostedTrees(rounds, spec.size) if rounds else None
            return LinearHead(width, spec.size, bags, dropout, spec.ids, direct_dim, trees)
        assert spec.field is not None, "a head of kind 'field' names its field"
        table = self.embedding.tables[spec.field]
        if spec.reads == "event":
            return FieldHead(self.config.dim, table, [], self.config.dropout, nearness=NEARNESS)
        lifetime = next((name for name in bags if schema.bags[name].window == ALL_TIME), None)
        habits = Habits(spec.field, table.num_embeddings, lifetime) if self.config.habits else None
        if spec.reads == "both":
            return NextFieldHead(self.config.dim, width, table, bags, self.config.dropout, dropout, habits)
        return FieldHead(width, table, bags, dropout, second=habits)
