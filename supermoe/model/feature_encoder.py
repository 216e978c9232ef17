"""Hand-made features of an example: declared aggregates and bags of counts, as one vector."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supermoe import ops
from supermoe.config import ModelConfig
from supermoe.data.batch import Batch, Jagged
from supermoe.data.schema import Schema
from supermoe.model.named import ByName
from supermoe.model.packed import read_of_events

INPUT_SHARE = 0.25  # of the network's dropout, on its inputs: a task may hang on a single one of them
LARGE = 1000  # values of a field whose bag counts once in what the heads of static attributes read
MIN_SPREAD = 0.3  # of a feature's deviates: rare values of an almost constant feature must not become huge
TAIL = 1e-3  # shares nearer to 0 and 1 than this are moved here before they are turned into normal deviates


@dataclass(frozen=True)
class Features:
    """What is made of an example's features: for its indicators, for the heads, for the heads of static attributes."""

    vector_BD: Tensor  # zero where no features are declared
    hidden_BF: Tensor  # the network's last layer but one
    direct_BX: Tensor  # numbers, every field's bag over the longest window, and the numbers' bins, as they are


def encode_numbers(features_BP: Tensor, bins: int) -> Tensor:
    """Shares in [0, 1], NaN missing -> [B, P * (bins + 2)]: normal deviate, piecewise-linear bins, is it missing.

    Bin k of a feature is 0 below the bin, 1 above it and linear inside (arXiv 2203.05556), less a half, so that a
    missing value, all of whose other entries are 0, lies in the middle.
    """
    missing_BP = features_BP.isnan()
    share_BP = features_BP.nan_to_num(0.5)
    deviate_BP = torch.special.ndtri(share_BP.clamp(TAIL, 1 - TAIL))
    bin_K = torch.arange(bins, device=features_BP.device)
    bins_BPK = (share_BP[:, :, None] * bins - bin_K).clamp(0, 1) - 0.5
    known_BPK = torch.cat([deviate_BP[:, :, None], bins_BPK], dim=2).masked_fill(missing_BP[:, :, None], 0)
    return torch.cat([known_BPK, missing_BP[:, :, None].to(known_BPK.dtype)], dim=2).flatten(1)


class Bag(nn.Module):
    """A bag of counts as L2-normalised TF-IDF through a table: sum_v w_v E_v / |w|, w_v = log(1 + count_v) idf_v.

    The table holds singular vectors, leading ones first (`FeatureEncoder.init_bag`), and is not learnt: what an id
    means to the tasks is learnt by the event embedding; here a small data set would only be memorised.
    """

    table_VD: Tensor
    idf_V: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("table_VD", torch.randn(size, dim))
        self.register_buffer("idf_V", torch.ones(size))

    def forward(self, counts: Jagged) -> Tensor:
        """Ids with counts as weights, one list per example -> f_BD; an empty bag gives zero."""
        assert counts.weights is not None, "bags are counted"
        example_R = read_of_events(counts.offsets, len(counts.ids))
        weight_R = torch.log1p(counts.weights) * self.idf_V[counts.ids]
        square_B = weight_R.new_zeros(len(counts.offsets) - 1).index_add(0, example_R, weight_R.square())
        weight_R = weight_R / square_B.clamp(min=1e-12).sqrt()[example_R]
        return F.embedding_bag(
            counts.ids,
            self.table_VD,
            counts.offsets,
            mode="sum",
            per_sample_weights=weight_R.to(self.table_VD.dtype),
            include_last_offset=True,
        )


class ResidualBlock(nn.Module):
    """x + W_out dropout(gelu(W_in norm(x))); starts as the identity."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.w_in = nn.Linear(width, 2 * width)
        self.w_out = nn.Linear(2 * width, width)
        nn.init.zeros_(self.w_out.weight)
        self.dropout = dropout

    def forward(self, x_BF: Tensor) -> Tensor:
        """x_BF -> x_BF."""
        hidden = F.gelu(self.w_in(self.norm(x_BF)))
        return x_BF + self.w_out(ops.dropout(hidden, self.dropout, self.training))


class FeatureEncoder(nn.Module):
    """Encoded aggregates and bags, laid side by side, through a residual network."""

    center_I: Tensor
    scale_I: Tensor
    weight_J: Tensor

    def __init__(self, schema: Schema, config: ModelConfig):
        super().__init__()
        self.dim, self.bag_dim, self.bins = config.dim, config.bag_dim, config.number_bins
        self.dropout = config.feature_dropout
        inputs = {name: bag for name, bag in schema.bags.items() if bag.input}
        self.bags = ByName({name: Bag(bag.size, config.bag_dim) for name, bag in inputs.items()})
        longest = {bag.field: name for name, bag in sorted(inputs.items(), key=lambda item: item[1].window)}
        self.lifetime = [(list(inputs).index(name), math.log(inputs[name].size, LARGE)) for name in longest.values()]
        num_encoded = len(schema.features) * (self.bins + 2)
        self.register_buffer("center_I", torch.zeros(num_encoded))
        self.register_buffer("scale_I", torch.ones(num_encoded))
        num_inputs = num_encoded + len(inputs) * self.bag_dim
        self.register_buffer("weight_J", torch.ones(num_inputs))
        self.hidden_dim = 4 * config.dim if num_inputs else 0
        self.direct_dims = [len(schema.features), len(self.lifetime) * self.bag_dim, len(schema.features) * self.bins]
        self.network = self._network(num_inputs, config.feature_layers) if num_inputs else None
        self.project = nn.Linear(self.hidden_dim, config.dim) if num_inputs else None

    def forward(self, batch: Batch) -> Features:
        """Features and bags of a batch's examples."""
        if self.network is None or self.project is None:
            nothing = torch.zeros(batch.num_examples, self.dim, device=batch.read_B.device)
            return Features(nothing, nothing[:, :0], nothing[:, :0])
        numbers_BI, bags = self.inputs(batch.features_BP, batch.bags)
        input_BJ = torch.cat([numbers_BI, *bags], dim=1) * self.weight_J
        hidden_BF = self.network(ops.dropout(input_BJ, INPUT_SHARE * self.dropout, self.training))
        return Features(self.project(hidden_BF), hidden_BF, self.direct(numbers_BI, bags))

    def inputs(self, features_BP: Tensor, bags: dict[str, Jagged]) -> tuple[Tensor, list[Tensor]]:
        """Numbers, encoded and standardised, and each bag's vectors."""
        numbers_BI = encode_numbers(features_BP.to(self.center_I.dtype), self.bins)
        return (numbers_BI - self.center_I) * self.scale_I, [bag(bags[name]) for name, bag in self.bags.items()]

    def direct(self, numbers_BI: Tensor, bags: list[Tensor]) -> Tensor:
        """Scaled for a linear head under one penalty: a bag counts by the log of its vocabulary, for fields with few
        values tell few users apart; the deviates of all numbers together count as half a bag, and so, twofold, do
        their bins, which tell the middle of a number from both of its ends."""
        deviates_BP1, bins_BPK, _ = numbers_BI.unflatten(1, (-1, self.bins + 2)).split([1, self.bins, 1], dim=2)
        scale = 0.5 * math.sqrt(self.bag_dim / max(1, deviates_BP1.shape[1]))
        weighted = [weight * bags[i] for i, weight in self.lifetime]
        return torch.cat([scale * deviates_BP1.flatten(1), *weighted, 2 * scale * bins_BPK.flatten(1)], dim=1)

    @torch.no_grad()
    def init_numbers(self, features_BP: Tensor) -> None:
        """Standardise the encoded numbers by the examples given."""
        if not features_BP.shape[1]:
            return
        encoded_BI = encode_numbers(features_BP.float(), self.bins)
        self.center_I.copy_(encoded_BI.mean(0))
        spread_PI = encoded_BI.std(0).view(-1, self.bins + 2)
        scale_PI = torch.ones_like(spread_PI)
        scale_PI[:, 0] = 1 / spread_PI[:, 0].clamp(min=MIN_SPREAD)
        self.scale_I.copy_(scale_PI.flatten())

    @torch.no_grad()
    def weigh(self, weight_J: Tensor) -> None:
        """How large each input of the network is, numbers and then bags; ones at first."""
        self.weight_J.copy_(weight_J)

    @torch.no_grad()
    def init_bag(self, name: str, matrix_VD: Tensor, idf_V: Tensor) -> None:
        """Start the bag `name` from the right singular vectors of its TF-IDF matrix, and weigh ids by `idf_V`."""
        bag = self.bags[name]
        bag.idf_V.copy_(idf_V)
        bag.table_VD.copy_(matrix_VD)

    def _network(self, num_inputs: int, num_blocks: int) -> nn.Sequential:
        blocks = [ResidualBlock(self.hidden_dim, self.dropout) for _ in range(num_blocks)]
        return nn.Sequential(nn.Linear(num_inputs, self.hidden_dim), *blocks, nn.LayerNorm(self.hidden_dim, bias=False))
