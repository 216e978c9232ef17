"""A trained model as a folder: weights, resolved config, schema, vocabularies, card and parity probes. No pickle.

`manifest.json` names the format version, the heads and the model id. The model id is a hash of all that decides what
the model answers (weights, schema, vocabularies, and the `model` and `features` sections), not of paths: two equal
trainings have one id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supermoe import __version__
from supermoe.config import RunConfig
from supermoe.data.disk import publishing, read_json
from supermoe.data.schema import Schema
from supermoe.model.heads import HeadSpec
from supermoe.model.supermoe import SuperMoE
from supermoe.model.weights import read_weights, save_weights
from supermoe.serving import parity
from supermoe.serving.card import CardFacts, render
from supermoe.serving.manifest import MANIFEST, sha256, write_json
from supermoe.typed_yaml import UserError, dump, read_yaml, validate

FORMAT, FORMAT_VERSION = "supermoe-model", 1
WEIGHTS, CONFIG, SCHEMA, VOCAB, CARD, PARITY = (
    "model.safetensors",
    "config.yaml",
    "schema.json",
    "vocab",
    "card.md",
    "parity.json",
)
AGAIN = "copy the whole model folder again, or export it again with supermoe.train"


class ServedConfig(RunConfig):
    """A run's config whose objectives stay unread: embedding users needs neither the tasks' classes nor the losses'."""

    tasks: dict[str, Any]
    loss: Any = None


@dataclass(frozen=True)
class Artifact:
    """A loaded model folder; the model is on the CPU, in evaluation mode and without gradients."""

    folder: Path
    model_id: str
    config: ServedConfig
    schema: Schema
    heads: dict[str, HeadSpec]
    states: dict[str, dict[str, float]]  # of the tasks: what decoding their scores needs
    model: SuperMoE

    @property
    def vocab(self) -> Path:
        """Folder of the fitted vocabularies and knots."""
        return self.folder / VOCAB

    def run_config(self) -> RunConfig:
        """The whole config, objectives included."""
        return _read_config(self.folder, RunConfig)

    def parity(self) -> float:
        """Largest deviation of the probe embeddings from those saved with the model, as a share of their norm."""
        expected = read_json(self.folder / PARITY, AGAIN, "embeddings")
        found_BD = parity.probe_embeddings(self.model, self.schema, self.config.model.max_events)
        return parity.deviation(found_BD, torch.tensor(expected["embeddings"]))

    @classmethod
    def load(cls, folder: Path | str) -> Artifact:
        """Read and check a model folder.

        Raises `UserError` naming the file and the remedy for a missing or truncated file, content that was changed
        after the model was saved, and a folder that another version wrote.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder} is not a model folder: it does not exist; give the `model` folder of a run")
        about = folder / MANIFEST
        _check_version(read_json(about, f"a model folder holds {MANIFEST}, {WEIGHTS} and more: {AGAIN}"), about)
        manifest = read_json(about, AGAIN, "heads", "states", "model_id")
        config, schema = _read_config(folder, ServedConfig), read_json(folder / SCHEMA, AGAIN)
        heads = {name: HeadSpec(**spec | {"ids": tuple(spec["ids"])}) for name, spec in manifest["heads"].items()}
        weights = read_weights(folder / WEIGHTS, AGAIN)
        found = model_id(folder, config, heads, manifest["states"])
        if found != manifest["model_id"]:
            raise UserError(
                f"{folder}: the content has the id {found}, {MANIFEST} says {manifest['model_id']}: a file was "
                f"changed; {AGAIN}"
            )
        schema = validate(Schema, schema, str(folder / SCHEMA))
        model = SuperMoE(schema, config.model, heads)
        _load_weights(model, weights, folder / WEIGHTS)
        return cls(folder, found, config, schema, heads, manifest["states"], model.eval().requires_grad_(False))


def save(
    folder: Path,
    model: SuperMoE,
    *,
    config: RunConfig,
    schema: Schema,
    heads: dict[str, HeadSpec],
    states: dict[str, dict[str, float]],
    vocab: Path,
    facts: CardFacts,
) -> str:
    """Write a model folder beside `folder`, rename it into place, and return the model id.

    `heads` are those the model was built with, `states` the tasks' `state()`, `vocab` the store's folder of
    vocabularies, and `facts` what the card tells of the training.
    """
    with publishing(folder) as beside:
        beside.mkdir()
        save_weights(model, beside / WEIGHTS)
        (beside / CONFIG).write_text(dump(config), encoding="utf-8")
        (beside / SCHEMA).write_text(schema.model_dump_json(indent=2) + "\n", encoding="utf-8")
        shutil.copytree(vocab, beside / VOCAB)
        identity = model_id(beside, config, heads, states)
        (beside / CARD).write_text(render(identity, model, config, schema, facts), encoding="utf-8")
        embeddings_BD = parity.probe_embeddings(model, schema, config.model.max_events)
        write_json(beside / PARITY, {"embeddings": embeddings_BD.tolist(), "torch": torch.__version__})
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model_id": identity,
            "supermoe": __version__,
            "heads": {name: dataclasses.asdict(spec) for name, spec in heads.items()},
            "states": states,
        }
        write_json(beside / MANIFEST, manifest)
    return identity


def model_id(folder: Path, config: RunConfig, heads: dict[str, HeadSpec], states: dict[str, dict[str, float]]) -> str:
    """16 hex digits of the hash of everything that decides the model's answers."""
    digest = hashlib.sha256()
    for path in [folder / WEIGHTS, folder / SCHEMA, *sorted((folder / VOCAB).rglob("*.parquet"))]:
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    parts = config.model_dump(mode="json", include={"model", "features"})
    parts |= {"heads": {name: dataclasses.asdict(spec) for name, spec in heads.items()}, "states": states}
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _read_config(folder: Path, model: type[RunConfig]) -> Any:
    path = folder / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"cannot read {path}: it is missing; {AGAIN}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; {AGAIN}") from None
    return validate(model, read_yaml(text, str(path)), str(path))


def _check_version(manifest: Any, path: Path) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a supermoe model; give the `model` folder of a run")
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {manifest.get('version')}, this supermoe ({__version__}) reads version "
            f"{FORMAT_VERSION}; install supermoe {manifest.get('supermoe', 'of that version')} or train the model again"
        )


def _load_weights(model: SuperMoE, weights: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    for name in sorted({*expected, *weights}):
        wanted, given = (list(side[name].shape) if name in side else "nothing" for side in (expected, weights))
        if wanted != given:
            raise UserError(
                f"{path} was written by another version of supermoe: '{name}' is {given}, this one ({__version__}) "
                f"needs {wanted}; install the version that {MANIFEST} names, or train the model again"
            )
    model.load_state_dict(weights)
