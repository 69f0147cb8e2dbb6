"""ΔW of the modules of a LoRA file, read without the package: raw keys, raw formula."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.codec.build import RANK_FIRST, RANK_LAST, read

Products = dict[str, np.ndarray]


def products(path: Path, *, sample: int | None = None) -> Products:
    """Module as named in the file -> alpha / rank * up @ down, and every other tensor as it is.

    sample: only so many random columns of each product, for files at real sizes. Of a PEFT folder,
    alpha and rank come from adapter_config.json without patterns.
    """
    tensors = read(path)
    config = path / "adapter_config.json"
    stated = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    ups: Products = {}
    downs: Products = {}
    result: Products = {}
    for key, value in tensors.items():
        last = next((s for s in RANK_LAST if key.endswith(s)), None)
        first = next((s for s in RANK_FIRST if key.endswith(s)), None)
        if last is not None:
            ups[_module(key, last)] = value.reshape(value.shape[0], -1)
        elif first is not None:
            downs[_module(key, first)] = value.reshape(value.shape[0], -1)
        elif not key.endswith(".alpha"):
            result[key] = value
    assert ups.keys() == downs.keys()
    generator = np.random.default_rng(11)
    for module, up in ups.items():
        down, rank = downs[module], up.shape[1]
        alpha = tensors.get(f"{module}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / rank
        if stated:
            assert not stated["rank_pattern"]
            scale = stated["lora_alpha"] / stated["r"]
        if sample is not None:
            down = down @ generator.standard_normal((down.shape[1], sample))
        result[module] = scale * (up @ down)
    return result


def _module(key: str, suffix: str) -> str:
    return key.removesuffix(suffix).removesuffix(".")
