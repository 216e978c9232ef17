"""Our layer of experts beside an independent second one: fairscale's MOELayer and Top2Gate (GShard, arXiv 2006.16668).

Both take the softmax of a linear map, two experts per token, and weights that sum to one. Theirs differs in three ways:
the second expert is drawn (Gumbel noise on the logits, in evaluation too); an expert has room for 2 N / E rows, first
choices before second ones, while ours drops in token order and only where a config says so; and what is left of a token
after dropping is normalised again, while ours keeps the weights of before.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from supermoe import ops
from supermoe.config import MoEConfig
from supermoe.model.moe import MoE
from supermoe.ops import reference

moe = pytest.importorskip("fairscale.nn.moe", reason="fairscale is not installed: pip install 'supermoe[fairscale]'")
top2gate = pytest.importorskip("fairscale.nn.moe.top2gate")

DIM, HIDDEN, EXPERTS, TOKENS = 8, 12, 4, 40
ROUNDING = 1e-5  # fp32 sums over at most 40 rows of products of order 1


@pytest.fixture(scope="module", autouse=True)
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Their layer exchanges rows over a process group even when it is alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[None]:
    yield
    ops.use(None)


@pytest.fixture
def ours() -> MoE:
    """Each expert's router row is an axis of its own, so that tokens can be made to choose."""
    torch.manual_seed(0)
    layer = MoE(MoEConfig(experts=EXPERTS, top_k=2, hidden=HIDDEN), DIM, "gelu")
    layer.router.weight.data = torch.eye(EXPERTS, DIM)
    return layer


@pytest.fixture
def theirs(ours: MoE) -> nn.Module:
    """Their layer with our weights."""
    experts = nn.ModuleList()
    for w_in_DF, w_out_FD in zip(ours.experts.w_in_EDF.detach(), ours.experts.w_out_EFD.detach(), strict=True):
        w_in, w_out = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(HIDDEN, DIM, bias=False)
        w_in.weight.data, w_out.weight.data = w_in_DF.t().clone(), w_out_FD.t().clone()
        experts.append(nn.Sequential(w_in, nn.GELU(), w_out))
    layer = moe.MOELayer(moe.Top2Gate(DIM, EXPERTS), experts)
    layer.gate.wg.weight.data = ours.router.weight.detach().clone()
    return layer


def tokens(first_N: Tensor, second_N: Tensor) -> Tensor:
    """Tokens whose best experts are these."""
    x_ND = torch.randn(len(first_N), DIM, generator=torch.Generator().manual_seed(1))
    x_ND[:, :EXPERTS] = 0.1 * x_ND[:, :EXPERTS].clamp(-1, 1)
    rows = torch.arange(len(first_N))
    x_ND[rows, first_N], x_ND[rows, second_N] = 1.5, 1.0
    return x_ND.requires_grad_()


def in_turn(shift: int) -> Tensor:
    return (torch.arange(TOKENS) + shift) % EXPERTS


def run(layer: nn.Module, x_ND: Tensor) -> Tensor:
    return layer(x_ND[:, None])[:, 0]


def gradients_of_theirs(layer: nn.Module, y_ND: Tensor, x_ND: Tensor) -> list[Tensor]:
    """With respect to x, router and both stacks, in our layout."""
    weights = [layer.gate.wg.weight, *(w for expert in layer.experts for w in (expert[0].weight, expert[2].weight))]
    grad_ND, router_ED, *stacks = torch.autograd.grad(y_ND.square().sum(), [x_ND, *weights])
    return [grad_ND, router_ED, torch.stack(stacks[::2]).mT, torch.stack(stacks[1::2]).mT]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("backend", ["reference", None])
def test_the_whole_layer_agrees_where_nothing_is_drawn_or_dropped(
    ours: MoE, theirs: nn.Module, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: torch.zeros(shape, device=device))
    x_ND = tokens(in_turn(0), in_turn(1))  # every expert has exactly the 2 N / E rows that there is room for
    ops.use(backend)
    y_ND, routing = ours(x_ND)
    assert routing.counts_E.tolist() == [2 * TOKENS // EXPERTS] * EXPERTS
    leaves = [x_ND, ours.router.weight, ours.experts.w_in_EDF, ours.experts.w_out_EFD]
    grads = list(torch.autograd.grad(y_ND.square().sum(), leaves))
    their_y_ND = run(theirs, x_ND)
    assert_same([y_ND, *grads], [their_y_ND, *gradients_of_theirs(theirs, their_y_ND, x_ND)])


def test_the_experts_agree_under_their_draw_and_their_drops(ours: MoE, theirs: nn.Module) -> None:
    x_ND = tokens(torch.zeros(TOKENS, dtype=torch.int64), in_turn(1) % 3 + 1)  # all want expert 0 first
    torch.manual_seed(0)
    their_y_ND = run(theirs, x_ND)
    torch.manual_seed(0)
    kept_NE = theirs.gate(x_ND)[1].detach().sum(dim=2) > 0  # the draw of the same seed
    assert kept_NE[:, 0].sum() == 2 * TOKENS // EXPERTS
    assert (kept_NE.sum(dim=1) == 1).any()
    kept_NK, expert_NK = kept_NE.float().topk(2)
    score_NE = torch.nn.functional.linear(x_ND, ours.router.weight).softmax(dim=1) * kept_NE
    share_NE = score_NE / score_NE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    stacks = ours.experts.w_in_EDF, ours.experts.w_out_EFD
    y_ND = reference.expert_ffn(
        x_ND, expert_NK.masked_fill(kept_NK == 0, -1), share_NE.gather(1, expert_NK), *stacks, "gelu"
    )
    grads = list(torch.autograd.grad(y_ND.square().sum(), [x_ND, ours.router.weight, *stacks]))
    assert_same([y_ND, *grads], [their_y_ND, *gradients_of_theirs(theirs, their_y_ND, x_ND)])


def test_they_normalise_after_dropping_and_we_before(
    ours: MoE, theirs: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: torch.zeros(shape, device=device))
    ours.capacity_factor = 1.0  # the same room, ceil(2 N / E)
    x_ND = tokens(torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS, dtype=torch.int64))
    (y_ND, routing), their_y_ND = ours(x_ND), run(theirs, x_ND)
    room = 2 * TOKENS // EXPERTS
    # Both fill experts 0 and 1 with the first tokens and drop the others entirely.
    assert (routing.expert_NK[room:] < 0).all()
    assert not y_ND[room:].any()
    assert not their_y_ND[room:].any()
    assert_same([y_ND[:room]], [their_y_ND[:room]])
    x_ND = tokens(torch.zeros(TOKENS, dtype=torch.int64), in_turn(1) % 3 + 1)
    (y_ND, routing), their_y_ND = ours(x_ND), run(theirs, x_ND)
    alone = (routing.expert_NK < 0).sum(dim=1) == 1  # tokens that lost expert 0 and keep the second
    assert alone.sum() == TOKENS - room
    assert_same([y_ND[alone] / routing.weight_NK[alone, 1:]], [their_y_ND[alone]])
