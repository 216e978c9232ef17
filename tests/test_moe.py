"""The feed-forward of a block: dense and experts."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from factories import check_gradients
from torch import Tensor

from supermoe import ops
from supermoe.config import ModelConfig, MoEConfig
from supermoe.model.moe import FeedForward, MoE, limit_capacity

ACTIVATIONS = get_args(ModelConfig.model_fields["activation"].annotation)


def make_moe(activation: str = "gelu", **options: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig(**{"experts": 4, "hidden": 6, **options}), 8, activation)


def make_tokens(num_tokens: int = 20) -> Tensor:
    return torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(1))


def routing_of(expert_NK: list[list[int]], num_experts: int) -> ops.Routing:
    chosen = torch.tensor(expert_NK)
    counts_E = torch.bincount(chosen.flatten(), minlength=num_experts)
    return ops.Routing(chosen, torch.full(chosen.shape, 0.5), counts_E, torch.rand(len(chosen), num_experts))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_expert_is_a_dense_feed_forward_times_its_weight(activation: str) -> None:
    moe, x_ND = make_moe(activation, experts=1, top_k=1), make_tokens()
    dense = FeedForward(8, 6, activation)
    with torch.no_grad():
        dense.w_in.weight.copy_(moe.experts.w_in_EDF[0].t())
        dense.w_out.weight.copy_(moe.experts.w_out_EFD[0].t())
    y_ND, routing = moe(x_ND)
    torch.testing.assert_close(y_ND, dense(x_ND))  # one expert: softmax gives it the weight 1
    assert routing.counts_E.tolist() == [20]


def test_default_hidden_gives_the_active_flops_of_the_dense_block() -> None:
    moe = MoE(MoEConfig(experts=4, top_k=2), 8, "gelu")
    assert moe.experts.w_in_EDF.shape == (4, 8, 16)


def test_low_memory_changes_no_value() -> None:
    x_ND, both = make_tokens(), []
    for low_memory in (False, True):
        moe = make_moe(low_memory=low_memory)
        y_ND, _ = moe(x_ND)
        both.append([y_ND, *torch.autograd.grad(y_ND.square().sum(), moe.experts.parameters())])
    torch.testing.assert_close(both[0], both[1])


def test_shared_expert_is_added_to_every_token() -> None:
    moe, x_ND = make_moe(shared_hidden=5), make_tokens()
    y_ND, routing = moe(x_ND)
    torch.testing.assert_close(y_ND, moe.experts(x_ND, routing) + moe.shared(x_ND))
    assert moe.shared(x_ND).abs().amax(1).min() > 0


def test_capacity_drops_in_token_order() -> None:
    routing = limit_capacity(routing_of([[0, 1], [0, 2], [1, 0], [0, 3]], num_experts=4), factor=1.0)
    assert routing.expert_NK.tolist() == [[0, 1], [0, 2], [1, -1], [-1, 3]]  # room for 4 * 2 / 4 = 2 tokens each
    assert routing.counts_E.tolist() == [4, 2, 1, 1]  # what was asked for: balancing must see it


def test_room_is_rounded_up_and_enough_room_drops_nothing() -> None:
    routing = routing_of([[0], [0], [0], [1]], num_experts=3)
    assert limit_capacity(routing, 1.0).expert_NK.flatten().tolist() == [0, 0, -1, 1]  # ceil(4 / 3) = 2
    assert limit_capacity(routing, 3.0).expert_NK.flatten().tolist() == [0, 0, 0, 1]


def test_dropped_tokens_get_nothing_from_the_experts() -> None:
    moe, x_ND = make_moe(capacity_factor=0.5, top_k=1), make_tokens()
    y_ND, routing = moe(x_ND)
    dropped_N = routing.expert_NK[:, 0] < 0
    assert dropped_N.sum() >= 8  # at most 4 experts * ceil(0.5 * 20 / 4) = 12 are carried
    assert torch.equal((y_ND == 0).all(1), dropped_N)


def test_later_tokens_do_not_displace_earlier_ones() -> None:
    moe, x_ND = make_moe(capacity_factor=0.75), make_tokens()
    other = torch.cat([x_ND[:10], make_tokens(10) * 3])
    torch.testing.assert_close(moe(other)[0][:10], moe(x_ND)[0][:10])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str) -> None:
    moe = make_moe(activation, shared_hidden=3, router={"type": "softmax", "balance": "aux"})

    def outputs(x_ND: Tensor) -> Tensor:
        y_ND, routing = moe(x_ND)
        return torch.cat([y_ND.flatten(), routing.aux_loss[None]])

    check_gradients(moe, outputs, make_tokens(6))


def test_gradients_with_dropped_tokens_and_sigmoid_scores() -> None:
    moe = make_moe(capacity_factor=0.5, router="sigmoid")
    check_gradients(moe, lambda x_ND: moe(x_ND)[0], make_tokens(6))
