from __future__ import annotations

import torch
from factories import make_schema
from test_artifact import HEADS, make_config

from supermoe.model.supermoe import SuperMoE
from supermoe.serving.card import CardFacts, render


def test_the_card_tells_what_is_known_and_nothing_else() -> None:
    config = make_config()
    torch.manual_seed(0)
    model = SuperMoE(make_schema(), config.model, HEADS)
    known = render(
        "0123", model, config, make_schema(), CardFacts({"churn": {"auc": 0.5, "ece": 0.125}}, "valid", 0, 86400, 7)
    )
    assert known.startswith("# User model 0123\n")
    assert f"{model.num_parameters():,} parameters, {model.num_parameters(active=True):,} active" in known
    assert "measured on the valid split" in known
    assert "| churn | auc 0.5000, ece 0.1250 |" in known
    assert "| next_type | not measured |" in known
    assert "from 1970-01-01 to 1970-01-02" in known
    assert "type (category)" in known
    unknown = render("0123", model, config, make_schema(), CardFacts())
    assert "1970" not in unknown
    assert "users\n" not in unknown
