"""What config.json says about packed weights."""

from __future__ import annotations

from peftsurgery.checkpoint import Checkpoint


def quantization_config(checkpoint: Checkpoint, name: str = "") -> dict[str, object]:
    """`quantization_config` (or `compression_config`) of the config.json that belongs to a tensor;
    empty when there is none.
    """
    component = name.partition(":")[0] if ":" in name else ""
    config = checkpoint.configs.get(component) if component else checkpoint.config
    inner = (config or {}).get("text_config")
    for place in (config or {}, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if isinstance(found, dict):
                return found
    return {}
