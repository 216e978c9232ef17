"""What published folders are described by: JSON files that appear whole, and hashes of what lies beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from supermoe.data.disk import publish_text

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Publish a small JSON file."""
    publish_text(path, json.dumps(content, indent=2) + "\n")
