"""The model card: what the model is, what it was trained and measured on, and what it must not be used for."""

from __future__ import annotations

from dataclasses import dataclass, field

from supermoe.config import RunConfig
from supermoe.data.schema import Schema
from supermoe.model.supermoe import SuperMoE
from supermoe.typed_yaml import format_instant


@dataclass(frozen=True)
class CardFacts:
    """What only the training run knows."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # task -> metric -> value
    split: str = "test"  # that the metrics were measured on
    first_event: int | None = None  # seconds UTC
    last_event: int | None = None
    num_users: int | None = None


def render(model_id: str, model: SuperMoE, config: RunConfig, schema: Schema, facts: CardFacts) -> str:
    """The card as Markdown."""
    sections = [
        f"# User model {model_id}",
        f"A mixture-of-experts encoder of user histories: one vector of {model.embedding_dim} numbers per user, and "
        f"answers to {len(config.tasks)} tasks. {model.num_parameters():,} parameters, "
        f"{model.num_parameters(active=True):,} active per token.",
        "## Trained on",
        _data(config, schema, facts),
        f"## Tasks, measured on the {facts.split} split",
        _tasks(config, facts),
        "## Limits",
        "- It reads events before the date asked for; a user without any gets the cold vector, flagged `is_cold`.\n"
        "- Vectors of different model ids live in different spaces and must not be compared or mixed.\n"
        "- Values of a field never seen in training time are one `unknown` value.\n"
        "- Vectors may reveal the attributes and events they were trained on; treat them as personal data.",
    ]
    return "\n\n".join(sections) + "\n"


def _data(config: RunConfig, schema: Schema, facts: CardFacts) -> str:
    lines = [f"- source: {config.data.source.type}"]
    if facts.first_event is not None and facts.last_event is not None:
        lines.append(f"- events from {format_instant(facts.first_event)} to {format_instant(facts.last_event)} (UTC)")
    if facts.num_users is not None:
        lines.append(f"- {facts.num_users:,} users")
    fields = ", ".join(f"{name} ({field.kind})" for name, field in schema.fields.items())
    return "\n".join(
        [*lines, f"- fields: {fields}", f"- declared features: {len(schema.features)}, bags: {len(schema.bags)}"]
    )


def _tasks(config: RunConfig, facts: CardFacts) -> str:
    lines = ["| task | metrics |", "|---|---|"]
    for name in config.tasks:
        metrics = facts.metrics.get(name, {})
        lines.append(
            f"| {name} | {', '.join(f'{key} {value:.4f}' for key, value in metrics.items()) or 'not measured'} |"
        )
    return "\n".join(lines)
