"""Which published model weights descend from, and under which licence: what the hub's model cards have keys for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpae_jax.types import UserError
from vpae_jax.weights.filenames import read_bytes
from vpae_jax.weights.locate import HUB_ID

CARD_FILE = "README.md"
# Licences of everything that an owner has published under a name that begins like this.
_LICENCES = {"Wan-AI/Wan2.": "apache-2.0"}
_LINE = re.compile(r"(license|base_model):\s*(.+?)\s*")


@dataclass(frozen=True)
class Origin:
    """A published model.

    Attributes:
      model: its id on the hub; "" where it is not known.
      licence: its licence, as the hub abbreviates it; "" where it is not known.
    """

    model: str = ""
    licence: str = ""

    def header(self) -> dict[str, Any]:
        """The keys of a model card's header that say this."""
        return {key: value for key, value in (("license", self.licence), ("base_model", self.model)) if value}


def origin_of(name: str, folder: Path | None = None) -> Origin:
    """The published model that a name stands for, or that a folder's own card names.

    Args:
      name: what a user calls the model. A path is preferred to an id of the hub, as by `locate`.
      folder: where the model is, if it is a folder; its card is read.
    """
    match = HUB_ID.fullmatch(name)
    if match is not None and not Path(name).exists():
        licence = next((licence for start, licence in _LICENCES.items() if match[1].startswith(start)), "")
        return Origin(match[1], licence)
    return _told(folder / CARD_FILE) if folder is not None and (folder / CARD_FILE).is_file() else Origin()


def _told(card: Path) -> Origin:
    """What a card's header says; nothing where it cannot be read."""
    try:
        lines = read_bytes(card).decode("utf-8", "replace").splitlines()
    except UserError:
        return Origin()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return Origin()
    header = lines[1 : lines.index("---", 1)]
    found = {match[1]: _scalar(match[2]) for line in header if (match := _LINE.fullmatch(line)) is not None}
    return Origin(found.get("base_model", ""), found.get("license", ""))


def _scalar(text: str) -> str:
    """A YAML scalar, plain or quoted; "" for anything else."""
    if text.startswith('"'):
        try:
            value = json.loads(text)
        except ValueError:
            return ""
        return value if isinstance(value, str) else ""
    return "" if text[0] in "[{&*!|>%@`'#-" else text
