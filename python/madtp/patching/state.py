"""madtp.json: what a saved model holds beside its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

STATE_FILE, WEIGHTS_FILE = "madtp.json", "model.safetensors"
STATE_VERSION = 3


class ModelError(RuntimeError):
    """A saved model is missing, cut short, or of another kind."""


def weights_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
