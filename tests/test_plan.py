"""The plan: memory against measured memory, what is advised, what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from plans import VARIANTS, config_of
from torch.profiler import ProfilerActivity, profile

from supermoe import cli, plan
from supermoe.config import RunConfig
from supermoe.studies import plan_probe
from supermoe.studies.plan import Planner, make_plan
from supermoe.studies.plan_model import blueprint, schema_of
from supermoe.training.optim import average_weights, build_optimizers, clip_gradients
from supermoe.typed_yaml import apply_override, dump, validate

CONFIGS = Path(__file__).parents[1] / "configs" / "plans"


def measure(config: RunConfig) -> dict[str, float]:
    """Bytes of what is kept, and of the allocator's peak over a whole step of training, gradients included."""
    made = blueprint(config, schema_of(config), "cpu")
    model, batch = made.model, plan_probe.made_up_batch(made.schema, plan_probe.shape_of(config))
    objective = plan_probe.objective_of(config, made)
    optimizers = build_optimizers(model, config.training, 10)
    average = average_weights(model, config.training.ema) if config.training.ema else None

    def step() -> None:
        for _ in range(config.training.accumulate or 1):
            plan_probe.micro_batch(config, model, objective, batch).backward()
        clip_gradients(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update_parameters(model)

    step()  # gives the optimisers their state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    now = peak = 0
    memory = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    kept = {
        "parameters": list(model.parameters()),
        "buffers": list(model.buffers()),
        "optimizer": [value for o in optimizers for state in o.state.values() for value in state.values()],
        "average": [] if average is None else [*average.module.parameters(), *average.module.buffers()],
    }
    found = {kind: float(sum(tensor.nbytes for tensor in tensors)) for kind, tensors in kept.items()}
    return {**found, "peak": sum(found.values()) + peak}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_memory_is_what_training_takes(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan runs less than the config in every direction and is off by a tenth at most, kind by kind and in all."""
    monkeypatch.setattr(plan_probe, "MAX_TOKENS", 512)
    monkeypatch.setattr(plan_probe, "MAX_DIM", 32)
    monkeypatch.setattr(plan_probe, "MAX_EXPERTS", 4)
    config = config_of(*overrides)
    planned = Planner(schema_of(config), "h200").plan(config, 1).memory
    for kind, size in measure(config).items():
        assert getattr(planned, kind) == pytest.approx(size, rel=0.1, abs=1000), kind


def test_what_does_not_fit_is_made_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every advised change lowers the peak, the last one enough, and each is an override that can be given."""
    config = config_of("data.fields.item={kind: category, hash_size: 40000000}", "model.moe.experts=4")
    first, advice = make_plan(config, 2, "l4")
    assert not first.fits
    peaks = [first.memory.peak, *(after.memory.peak for _, after in advice)]
    assert peaks == sorted(peaks, reverse=True)
    assert advice[-1][1].fits
    overrides = [text for change, _ in advice for text in change.split() if "=" in text]
    assert "distributed.shard_tables=100000" in overrides
    again, none = make_plan(config_of("data.fields.item={kind: category, hash_size: 40000000}", *overrides), 2, "l4")
    assert again.fits
    assert none == []


def test_ranks_share_experts_and_rows() -> None:
    """On four ranks a quarter of the experts and of the rows; tables are as large as the config says."""
    by_row = ["distributed.shard_tables=1000", "training.table_optimizer=rowwise_adagrad", "training.ema=null"]
    sampled = "loss.pretraining={next: {type: next_event, fields: [item], negatives: 16}}"
    config = config_of("data.fields.item={kind: category, hash_size: 30000}", sampled, *by_row)
    planner = Planner(schema_of(config), "h200")
    one, four = planner.plan(config, 1), planner.plan(config_with(config, "distributed.expert=4"), 4)
    assert one.counts == four.counts
    rows = 30_002 * (48 + 1)
    assert one.memory.parameters - four.memory.parameters == pytest.approx(4 * 0.75 * (rows + one.counts.experts))
    assert one.cost.expert_exchange == 0 < four.cost.expert_exchange


def config_with(config: RunConfig, override: str) -> RunConfig:
    return validate(RunConfig, apply_override(config.model_dump(mode="json"), override), "test")


@pytest.mark.parametrize(
    ("name", "gpus", "total"), [("1b", 8, 1e9), ("10b", 8, 1e10), ("100b", 64, 1e11), ("1t", 512, 1e12)]
)
def test_shipped_plans_have_the_sizes_they_are_named_after(name: str, gpus: int, total: float) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = cli.load_run(path)
    made = blueprint(config, schema_of(config))
    assert made.model.num_parameters() == pytest.approx(total, rel=0.1)
    assert f"--config configs/plans/{name}.yaml --gpus {gpus}" in path.read_text(encoding="utf-8")
    assert not any(p.device.type != "meta" for p in made.model.parameters())


def test_the_command_prints_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(dump(config_of("model.layers=1")), encoding="utf-8")
    plan.main(["--config", str(path), "--gpus", "2", "--gpu", "a100"])
    printed = capsys.readouterr().out
    for word in ("2 GPUs as data 2 x expert 1", "tables", "optimiser", "activations", "peak", "FLOPs", "MFU", "fits"):
        assert word in printed
    assert "make it fit" not in printed
