"""Names that stored runs have for what is called otherwise now."""

from typing import Any

RENAMED: dict[str, str] = {"decay": "ema_decay", "samples": "rows_per_dim"}
FIELDS: dict[str, dict[str, str]] = {"KFac": RENAMED, "Nlcg": RENAMED, "SpNgd": RENAMED}
"""New names of fields by the old ones, by the kind of the settings that have them."""


def renewed(stored: Any) -> Any:
    """A recipe or a part of one, as it was written down, with the names of today."""
    if not isinstance(stored, dict):
        return stored
    kind = stored.get("kind")
    names = FIELDS.get(kind, {}) if isinstance(kind, str) else {}
    return {names.get(name, name): renewed(value) for name, value in stored.items()}
