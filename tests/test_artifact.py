from __future__ import annotations

import errno
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from factories import make_batch, make_schema
from safetensors.torch import load_file, save_file

from supermoe.config import RunConfig
from supermoe.model.heads import HeadSpec
from supermoe.model.supermoe import SuperMoE
from supermoe.serving import artifact
from supermoe.serving.artifact import Artifact
from supermoe.serving.card import CardFacts
from supermoe.serving.parity import TOLERANCE
from supermoe.typed_yaml import UserError, validate

HEADS = {"churn": HeadSpec(kind="linear", size=1), "next_type": HeadSpec(kind="field", size=11, field="type")}
STATES: dict[str, dict[str, float]] = {"churn": {}, "next_type": {"mean": 0.25}}


def make_config(**model) -> RunConfig:
    label = {"sql": "count(*) > 0", "window": "28d"}
    raw = {
        "run": "runs/test",
        "data": {"source": {"type": "files", "events": "events.parquet"}, "splits": "time"},
        "tasks": {
            "churn": {"type": "binary", "label": label},
            "next_type": {"type": "retrieval", "label": {**label, "sql": "list(type)", "field": "type"}},
        },
        "model": {"dim": 16, "layers": 2, **model},
    }
    return validate(RunConfig, raw, "test")


def make_model(config: RunConfig, seed: int = 0) -> SuperMoE:
    torch.manual_seed(seed)
    return SuperMoE(make_schema(), config.model, HEADS).eval()


def save(folder: Path, model: SuperMoE, config: RunConfig) -> str:
    vocab = folder.parent / "vocab"
    vocab.mkdir(exist_ok=True)
    pq.write_table(pa.table({"value": ["a", "b"], "count": [2, 1]}), vocab / "type.parquet")
    facts = CardFacts({"churn": {"auc": 0.75}}, "test", 1_500_000_000, 1_600_000_000, 1234)
    return artifact.save(
        folder, model, config=config, schema=make_schema(), heads=HEADS, states=STATES, vocab=vocab, facts=facts
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = make_config()
    save(tmp_path / "model", make_model(config), config)
    return tmp_path / "model"


def test_a_loaded_model_answers_like_the_saved_one(folder: Path) -> None:
    loaded = Artifact.load(folder)
    expected, found = make_model(make_config())(make_batch()), loaded.model(make_batch())
    assert torch.equal(found.user_BD, expected.user_BD)
    assert torch.equal(found.task_BX["churn"], expected.task_BX["churn"])
    assert loaded.heads == HEADS
    assert loaded.states == STATES
    assert loaded.schema == make_schema()
    assert loaded.run_config() == make_config()
    assert not loaded.model.training


def test_the_folder_holds_what_it_should(folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "model.safetensors",
        "config.yaml",
        "schema.json",
        "vocab/type.parquet",
        "card.md",
        "parity.json",
        "manifest.json",
    }
    card = (folder / "card.md").read_text()
    for said in (Artifact.load(folder).model_id, "| churn | auc 0.7500 |", "2017-07-14", "1,234 users", "is_cold"):
        assert said in card


def test_the_id_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    config = make_config()
    first = save(tmp_path / "a", make_model(config), config)
    assert save(tmp_path / "b", make_model(config), config.model_copy(update={"run": Path("elsewhere")})) == first
    assert save(tmp_path / "c", make_model(config, seed=1), config) != first
    deeper = make_config(max_events=99)
    assert save(tmp_path / "d", make_model(deeper), deeper) != first


def test_saving_again_replaces_the_model(folder: Path) -> None:
    config = make_config()
    before = Artifact.load(folder).model_id
    after = save(folder, make_model(config, seed=1), config)
    assert Artifact.load(folder).model_id == after != before
    assert {path.name for path in folder.parent.iterdir()} == {"model", "vocab"}


def test_saving_on_a_full_disk_keeps_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Artifact.load(folder).model_id

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "save_weights", full)
    config = make_config()
    with pytest.raises(UserError, match=r"No space left on device.*free space"):
        save(folder, make_model(config, seed=1), config)
    assert Artifact.load(folder).model_id == before
    assert {path.name for path in folder.parent.iterdir()} == {"model", "vocab"}


def test_parity_holds_and_notices_other_weights(folder: Path) -> None:
    loaded = Artifact.load(folder)
    assert loaded.parity() < TOLERANCE / 100
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    assert loaded.parity() > TOLERANCE


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_version(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99, "supermoe": "9.9"}))


def _without_heads(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"format": artifact.FORMAT, "version": artifact.FORMAT_VERSION}))


def _wider(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("dim: 16", "dim: 32"))


def _unknown_key(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("max_events:", "max_event:"))


def _shorter_history(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("max_events: 256", "max_events: 8"))


def _other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors")


def _other_vocabulary(folder: Path) -> None:
    pq.write_table(pa.table({"value": ["b", "a"], "count": [2, 1]}), folder / "vocab" / "type.parquet")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: it is missing; copy the whole"),
        (lambda f: (f / "config.yaml").unlink(), r"config\.yaml: it is missing; copy the whole"),
        (lambda f: (f / "schema.json").unlink(), r"schema\.json.*copy the whole"),
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json.*copy the whole"),
        (lambda f: (f / "manifest.json").write_text("{}"), "does not describe a supermoe model"),
        (_truncate, r"model\.safetensors is truncated or damaged.*copy the whole"),
        (_other_version, r"format version 99, this supermoe .* reads version 1; install supermoe 9\.9"),
        (_without_heads, r"manifest\.json has no key 'heads'; copy the whole"),
        (lambda f: (f / "config.yaml").write_bytes(b"\xff"), r"config\.yaml: 'utf-8' codec can't.*copy the whole"),
        (lambda f: (f / "schema.json").write_text("{}"), "a file was changed; copy the whole"),
        (_wider, "a file was changed; copy the whole"),
        (_unknown_key, r"config\.yaml: model\.max_event: unknown key, did you mean 'max_events'"),
        (_shorter_history, "a file was changed; copy the whole"),
        (_other_weights, "a file was changed"),
        (_other_vocabulary, "a file was changed"),
    ],
)
def test_a_damaged_folder_is_explained(folder: Path, harm, message: str) -> None:
    harm(folder)
    with pytest.raises(UserError, match=message):
        Artifact.load(folder)


def test_weights_of_another_version_are_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["embedding.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    monkeypatch.setattr(artifact, "model_id", lambda *_: json.loads((folder / "manifest.json").read_text())["model_id"])
    with pytest.raises(UserError, match=r"another version of supermoe: 'embedding\.norm\.weight' is nothing"):
        Artifact.load(folder)


def test_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a model folder: it does not exist"):
        Artifact.load(tmp_path / "nowhere")
