"""The whole model: what sees what, caching, packing, cold users, size."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from factories import DAY, START, check_gradients, make_batch, make_schema, take_events, take_examples, take_user
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from supermoe.config import ModelConfig
from supermoe.data.batch import Batch, Jagged
from supermoe.model.heads import HeadSpec
from supermoe.model.supermoe import Output, SuperMoE
from supermoe.typed_yaml import UserError

HEADS = {
    "churn": HeadSpec("linear", 1),
    "type": HeadSpec("linear", 11, field="type"),
    "next_type": HeadSpec("field", field="type"),
    "pretrain": HeadSpec("field", field="type", reads="event"),
}
# fp64 sums of tens of terms of size one, taken in another order
EXACT = {"atol": 1e-11, "rtol": 0}


def make_model(heads: dict[str, HeadSpec] = HEADS, **options: Any) -> SuperMoE:
    torch.manual_seed(0)
    config = ModelConfig(**{"dim": 16, "layers": 3, "moe": {"experts": 4}, "number_bins": 4, "bag_dim": 6, **options})
    model = SuperMoE(make_schema(), config, heads).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("heads.") and not parameter.any():  # what starts at zero would hide mistakes
                parameter.normal_(std=0.1)
    return model


def logits(model: SuperMoE, output: Output, batch: Batch) -> dict[str, Tensor]:
    return {task: model.heads[task].logits(x_BX, batch) for task, x_BX in output.task_BX.items()}


def assert_same(ours: Output, theirs: Output, rows: Any = slice(None), events: Any = slice(None)) -> None:
    torch.testing.assert_close(ours.event_ND, theirs.event_ND[events], **EXACT)
    torch.testing.assert_close(ours.user_BD, theirs.user_BD[rows], **EXACT)
    for task, x_BX in ours.task_BX.items():
        torch.testing.assert_close(x_BX, theirs.task_BX[task][rows], **EXACT)


def test_shapes_and_names() -> None:
    model, batch = make_model(), make_batch()
    output = model(batch)
    assert output.event_ND.shape == (16, 16)
    assert output.user_BD.shape == (5, 16)
    assert output.questions == ["user", "churn", "type", "next_type"]
    assert {task: x.shape[1] for task, x in logits(model, output, batch).items()} == {
        "churn": 1,
        "type": 11,
        "next_type": 11,
    }
    entries = [(entry.layer, entry.tokens, len(entry.routing.expert_NK)) for entry in output.routings]
    assert entries == [(1, "history", 16), (2, "history", 16), (1, "indicator", 20), (2, "indicator", 20)]
    assert len(model.routers()) == 2
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)  # a head's tied table is saved once


def test_events_never_change_with_later_events_or_with_examples() -> None:
    model, batch = make_model(), make_batch()
    output = model(batch)
    time_N = batch.time_N.clone()
    time_N[5:7] += 3 * DAY
    later = dataclasses.replace(batch, time_N=time_N, fields={**batch.fields, "type": batch.fields["type"].clone()})
    later.fields["type"][5] = (later.fields["type"][5] + 1) % 11
    changed = model(later)
    assert torch.equal(changed.event_ND[:5], output.event_ND[:5])
    assert (changed.event_ND[5:7] != output.event_ND[5:7]).any(1).all()
    assert torch.equal(changed.user_BD[1], output.user_BD[1])  # its cut lies before the change
    assert not torch.equal(changed.user_BD[0], output.user_BD[0])

    assert torch.equal(model(take_examples(batch, [])).event_ND, output.event_ND)
    asked_later = model(dataclasses.replace(batch, cut_B=batch.cut_B + DAY))
    assert torch.equal(asked_later.event_ND, output.event_ND)
    assert (asked_later.user_BD != output.user_BD).any(1).all()


@pytest.mark.parametrize("readout", ["indicator", "shared_bottom", "mmoe"])
def test_a_task_does_not_change_when_another_is_added(readout: str) -> None:
    batch = make_batch()
    full = make_model(readout=readout)
    few = make_model({name: HEADS[name] for name in ("next_type", "pretrain")}, readout=readout)
    few.load_state_dict({name: full.state_dict()[name] for name in few.state_dict()})
    ours, theirs = few(batch), full(batch)
    assert_same(ours, theirs)
    torch.testing.assert_close(logits(few, ours, batch)["next_type"], logits(full, theirs, batch)["next_type"], **EXACT)


def test_outputs_of_events_are_made_only_for_heads_that_read_them() -> None:
    batch, full = make_batch(), make_model()
    few = make_model({"next_type": HEADS["next_type"]})
    few.load_state_dict({name: full.state_dict()[name] for name in few.state_dict()})
    ours, theirs = few(batch), full(batch)
    assert ours.event_ND is None
    torch.testing.assert_close(ours.task_BX["next_type"], theirs.task_BX["next_type"], **EXACT)


def test_a_users_vector_is_the_answer_and_the_profile_of_the_features() -> None:
    model, batch = make_model(), make_batch()
    answer_BD, profile_BP = model.embed(batch).split([16, model.embedding_dim - 16], dim=1)
    torch.testing.assert_close(answer_BD, model(batch).user_BD, **EXACT)
    torch.testing.assert_close(profile_BP, model.profile(model.indicators.features(batch).direct_BX), **EXACT)
    assert make_model(profile_dim=0).embed(batch).shape == (5, 16)


@pytest.mark.parametrize("known", [[0, 0, 0, 0, 0], [3, 4, 1, 0, 0], [7, 0, 2, 1, 0]])
def test_cached_history_and_new_events_equal_reading_all_at_once(known: list[int]) -> None:
    model, batch = make_model(), make_batch()
    none_S, lengths_S, known_S = torch.zeros(5, dtype=torch.int64), batch.offsets_S.diff(), torch.tensor(known)
    new = take_events(batch, known_S, lengths_S)
    past = model.extend(take_events(batch, none_S, known_S))
    index_N = torch.cat([torch.arange(n) for n in lengths_S.tolist()])
    is_new_N = index_N >= torch.repeat_interleave(known_S, lengths_S)
    assert_same(model.ask(model.extend(new, past), new), model(batch), events=is_new_N)


@pytest.mark.parametrize("read", range(5))
def test_a_packed_batch_equals_each_user_alone(read: int) -> None:
    model, batch = make_model(), make_batch()
    alone, rows = take_user(batch, read)
    start, end = batch.offsets_S[read : read + 2].tolist()
    output, whole = model(alone), model(batch)
    assert_same(output, whole, rows=rows, events=slice(start, end))
    for task, ours in logits(model, output, alone).items():
        torch.testing.assert_close(ours, logits(model, whole, batch)[task][rows], **EXACT)


def test_a_user_without_events_and_features_has_a_vector() -> None:
    model = make_model()
    batch = make_batch([0], [(0, 0)] * 2)
    empty = Jagged(torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    features_BP = torch.full_like(batch.features_BP, torch.nan)
    cold = dataclasses.replace(
        batch, features_BP=features_BP, bags=dict.fromkeys(batch.bags, empty), cut_B=torch.tensor([START, START])
    )
    output = model(cold)
    assert output.user_BD.isfinite().all()
    assert torch.equal(output.user_BD[0], output.user_BD[1])
    assert torch.equal(model(cold).user_BD, output.user_BD)


def test_nothing_at_all_is_fine_in_training_too() -> None:
    model, batch = make_model().train(), make_batch([], [])
    output = model(batch)
    total = output.event_ND.sum() + sum(x.sum() for x in logits(model, output, batch).values())
    (total + sum(entry.aux_loss for entry in output.routings)).backward()
    assert output.user_BD.shape == (0, 16)
    assert not model.encoder.blocks[0].attention.qkv.weight.grad.any()


def test_features_reach_every_question_through_its_gate() -> None:
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        model.indicators.questions["churn"].gate_D.zero_()
    changed = dataclasses.replace(batch, features_BP=(1 - batch.features_BP).nan_to_num(0.3))
    before, after = model(batch), model(changed)
    own = {task: (after.task_BX[task] != before.task_BX[task])[:, 16:32].any(1).all() for task in before.task_BX}
    assert own == {"churn": False, "type": True, "next_type": True}
    assert (after.user_BD != before.user_BD).any(1).all()


@pytest.mark.parametrize("options", [{}, {"readout": "shared_bottom", "dense_layers": 3}])
def test_every_weight_gets_a_gradient(options: dict[str, Any]) -> None:
    model, batch = make_model(**options).train(), make_batch()
    output = model(batch)
    total = sum(x.square().sum() for x in logits(model, output, batch).values())
    total = total + model.heads["pretrain"].query(output.event_ND).square().sum() + model.heads["pretrain"].bias.sum()
    (total + sum(entry.aux_loss for entry in output.routings)).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_gradients() -> None:
    heads = {name: HEADS[name] for name in ("churn", "next_type", "pretrain")}
    model = make_model(heads, dim=8, layers=2, number_bins=2, task_gradient=1.0)
    batch = make_batch([3, 2], [(0, 3), (0, 1), (1, 2)])
    fields = {**batch.fields, "type": batch.fields["type"].clamp(min=1), "store": batch.fields["store"].clamp(min=1)}
    known = dataclasses.replace(batch, fields=fields)  # the padding row has a value but no gradient

    def outputs() -> Tensor:
        output = model(known)
        return torch.cat([output.event_ND.flatten(), *(x.flatten() for x in logits(model, output, known).values())])

    with torch.no_grad():
        model.embedding.tables["type"].weight[0] = 0.1  # the head's softmax does not know padding
    check_gradients(model, outputs)


def test_bf16_autocast_stays_close() -> None:
    model, batch = make_model().float(), make_batch()
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch)
        sum(x.float().sum() for x in logits(model, rough, batch).values()).backward()
    assert all(entry.routing.probs_NE.dtype == torch.float32 for entry in rough.routings)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # bf16 keeps 3 digits; outputs have size 1 and a few layers behind them, and a rare token may change its expert
    assert (rough.user_BD - exact.user_BD).abs().median() < 0.02


def test_num_parameters() -> None:
    model = make_model()
    experts = sum(p.numel() for block in model.encoder.blocks[1:] for p in block.feed_forward.experts.parameters())
    tables = sum(p.numel() for p in model.parameters() if getattr(p, "is_table", False))
    assert tables == (11 + 5 + 7) * 16 + 2 * 11  # with the biases of the heads tied to one; the bags' are not learnt
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(active=True) == model.num_parameters() - tables - experts // 2


def test_a_task_may_not_be_called_user() -> None:
    with pytest.raises(UserError, match=r"tasks\.user"):
        make_model({"user": HeadSpec("linear", 1)})


class CountOps(TorchDispatchMode):
    """Counts calls of operators."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_heads_of_users_and_of_events_have_dropout_of_their_own() -> None:
    heads = {**HEADS, "item": HeadSpec("field", field="type", reads="both")}
    model = make_model(heads, dropout=0.1, head_dropout=0.4)
    of_users = {name: model.heads[name].dropout for name in ("churn", "type", "next_type")}
    assert set(of_users.values()) == {0.4}
    assert model.heads["pretrain"].dropout == model.heads["item"].dropout == 0.1
    assert model.heads["item"].correction.dropout == 0.4


def test_no_python_loop_over_users_or_events() -> None:
    model = make_model()

    def calls(users: int, events: int) -> int:
        batch = make_batch([events] * users, [(read, events - 1) for read in range(users)])
        with CountOps() as counted:
            model(batch)
        return counted.calls

    few = calls(users=16, events=6)  # enough for every expert to have rows
    assert calls(users=32, events=6) == few
    assert calls(users=16, events=48) == few
