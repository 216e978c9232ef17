"""Vectors of declared aggregates and bags."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from factories import check_gradients, make_batch, make_schema

from supermoe.config import ModelConfig
from supermoe.data.batch import Jagged
from supermoe.data.schema import Schema
from supermoe.model.feature_encoder import LARGE, MIN_SPREAD, TAIL, Bag, FeatureEncoder, encode_numbers

CONFIG = ModelConfig(dim=8, heads=2, number_bins=4, bag_dim=6)


def test_numbers_are_encoded_as_deviate_bins_and_missing() -> None:
    encoded = encode_numbers(torch.tensor([[0.5, torch.nan], [0.375, 1.0]]), bins=4).view(2, 2, 6)
    torch.testing.assert_close(encoded[0, 0], torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5, 0.0]))
    torch.testing.assert_close(encoded[0, 1], torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(encoded[1, 0, 1:], torch.tensor([0.5, 0.0, -0.5, -0.5, 0.0]))
    # The 99.9 % quantile of the normal distribution, where its infinite tail is cut off.
    torch.testing.assert_close(encoded[1, 1, 0], torch.tensor(3.0902), atol=1e-4, rtol=0)


def test_bag_is_normalised_tf_idf() -> None:
    bag = Bag(4, 3)
    bag.idf_V.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    counts = Jagged(torch.tensor([0, 2, 2]), torch.tensor([2, 3]), torch.tensor([1.0, 3.0]))
    weights = torch.log1p(torch.tensor([1.0, 3.0])) * torch.tensor([2.0, 3.0])
    expected = (weights / weights.norm()) @ bag.table_VD[2:4]
    torch.testing.assert_close(bag(counts), torch.stack([expected, torch.zeros(3)]))


def test_init_bag_sets_table_and_idf_of_one_bag() -> None:
    encoder = FeatureEncoder(make_schema(), CONFIG)
    encoder.init_bag("type_28d", torch.ones(11, 6), torch.full((11,), 2.0))
    bag = encoder.bags["type_28d"]
    assert bag.table_VD.sum(1).tolist() == [6.0] * 11
    assert bag.idf_V.tolist() == [2.0] * 11
    assert not torch.equal(encoder.bags["type_all"].table_VD, bag.table_VD)


def test_every_feature_and_bag_matters_to_its_example_only() -> None:
    encoder, batch = FeatureEncoder(make_schema(), CONFIG).eval(), make_batch()
    f_BD = encoder(batch).vector_BD
    features_BP = batch.features_BP.clone()
    features_BP[1, 0] = 0.77
    changed = encoder(dataclasses.replace(batch, features_BP=features_BP)).vector_BD
    assert (changed != f_BD).any(1).tolist() == [False, True, False, False, False]
    empty = Jagged(torch.zeros(6, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    changed = encoder(dataclasses.replace(batch, bags={**batch.bags, "type_all": empty})).vector_BD
    had_ids = batch.bags["type_all"].offsets.diff() > 0
    assert torch.equal((changed != f_BD).any(1), had_ids)


def test_without_features_the_vector_is_zero_and_there_is_no_network() -> None:
    schema = Schema(fields=make_schema().fields)
    encoder = FeatureEncoder(schema, CONFIG)
    features = encoder(make_batch(schema=schema))
    assert features.vector_BD.tolist() == [[0.0] * 8] * 5
    assert features.hidden_BF.shape == (5, encoder.hidden_dim) == (5, 0)
    assert features.direct_BX.shape == (5, sum(encoder.direct_dims)) == (5, 0)
    assert list(encoder.parameters()) == []


def test_dropout_is_for_training() -> None:
    encoder, batch = FeatureEncoder(make_schema(), CONFIG), make_batch()
    assert not torch.equal(encoder(batch).vector_BD, encoder(batch).vector_BD)
    encoder.eval()
    assert torch.equal(encoder(batch).vector_BD, encoder(batch).vector_BD)


def test_gradients() -> None:
    encoder, batch = FeatureEncoder(make_schema(), CONFIG).eval(), make_batch()
    check_gradients(encoder, lambda: encoder(batch).vector_BD)


def test_direct_inputs_are_numbers_the_longest_bag_of_every_field_and_bins_as_they_are() -> None:
    encoder, batch = FeatureEncoder(make_schema(), CONFIG), make_batch()
    num_features, longest = len(make_schema().features), encoder.bags["type_all"](batch.bags["type_all"])
    direct_BX = encoder(batch).direct_BX  # in training: they are not dropped out
    numbers_BP, bags_BX, bins_BX = direct_BX.split(encoder.direct_dims, dim=1)
    weight = math.log(encoder.bags["type_all"].table_VD.shape[0], LARGE)
    assert torch.equal(bags_BX[:, : longest.shape[1]], weight * longest)
    deviate_BP = torch.special.ndtri(batch.features_BP.nan_to_num(0.5).clamp(TAIL, 1 - TAIL))
    torch.testing.assert_close(numbers_BP, 0.5 * (encoder.bag_dim / num_features) ** 0.5 * deviate_BP)
    encoded_BPI = encode_numbers(batch.features_BP, encoder.bins).unflatten(1, (num_features, -1))
    torch.testing.assert_close(bins_BX, (encoder.bag_dim / num_features) ** 0.5 * encoded_BPI[:, :, 1:-1].flatten(1))
    assert not direct_BX.requires_grad


def test_the_network_reads_each_input_by_its_weight_and_the_heads_do_not() -> None:
    encoder, batch = FeatureEncoder(make_schema(), CONFIG).eval(), make_batch()
    before = encoder(batch)
    encoder.weigh(torch.zeros_like(encoder.weight_J))
    after = encoder(batch)
    assert not torch.equal(before.vector_BD[0], before.vector_BD[1])
    assert torch.equal(after.vector_BD[0], after.vector_BD[1])  # nothing tells users apart any more
    assert torch.equal(after.direct_BX, before.direct_BX)


def test_numbers_are_standardised_by_the_examples_given() -> None:
    encoder = FeatureEncoder(make_schema(), CONFIG)
    shares_BP = torch.rand(500, len(make_schema().features))
    shares_BP[::7, 0] = torch.nan
    encoder.init_numbers(shares_BP)
    encoded_BI = (encode_numbers(shares_BP, encoder.bins) - encoder.center_I) * encoder.scale_I
    torch.testing.assert_close(
        encoded_BI.mean(0), torch.zeros_like(encoder.center_I), atol=1e-5, rtol=0
    )  # fp32 sums of 500
    deviates_BP = encoded_BI.view(500, -1, encoder.bins + 2)[:, :, 0]
    torch.testing.assert_close(deviates_BP.std(0), torch.ones(shares_BP.shape[1]))


def test_a_feature_that_hardly_varies_is_not_blown_up() -> None:
    encoder = FeatureEncoder(make_schema(), CONFIG)
    shares_BP = torch.full((500, len(make_schema().features)), 0.5)
    shares_BP[0] = 0.6
    encoder.init_numbers(shares_BP)
    assert encoder.scale_I.max() == pytest.approx(1 / MIN_SPREAD)
