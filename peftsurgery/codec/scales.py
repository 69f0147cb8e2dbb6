"""Scales: the file conventions of alpha, rs-LoRA and patterns, resolved on reading and restored on
writing.

ΔW = scale · (product of the factors). Files say alpha and rank: scale = alpha / rank, or alpha /
√rank with rs-LoRA in a PEFT config (arXiv 2312.03732); LyCORIS stores alpha already multiplied by
√rank. A missing alpha means scale 1. LoKr with both factors full has scale 1 in LyCORIS whatever
alpha says, and alpha / r in PEFT.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from peftsurgery.codec.patterns import Patterns
from peftsurgery.errors import Finding, UsageError

PLACEHOLDER = 1e9  # ai-toolkit writes about 1e10 as the alpha of full LoKr factors


def float32(value: float) -> float:
    """`value` rounded to fp32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def scale_of(alpha: float | None, rank: int | None) -> float:
    """alpha / rank in fp32; 1 when there is no alpha or no rank."""
    return 1.0 if alpha is None or rank is None else float32(alpha / rank)


@lru_cache(maxsize=1024)
def alpha_of(scale: float, rank: int, *, rslora: bool = False) -> float:
    """The alpha to write so that reading it back gives exactly `scale` in fp32.

    The roundest decimal that does so is preferred: 16 rather than 16.000001.
    """
    divisor = math.sqrt(rank) if rslora else rank
    exact = scale * divisor
    for digits in range(0, 9):
        candidate = round(exact, digits)
        if float32(candidate / divisor) == float32(scale) and float32(candidate) == candidate:
            return candidate
    for candidate in (float32(exact), exact):
        if float32(float32(candidate) / divisor) == float32(scale):
            return float32(candidate)
    return float32(exact)


def check_alpha(alpha: float, key: str) -> list[Finding]:
    """Findings on a stored alpha that is zero, negative, not finite or a placeholder."""
    if not math.isfinite(alpha):
        raise UsageError(
            f"{key!r}: alpha is {alpha}; expected a finite number. The file is damaged."
        )
    if alpha == 0:
        return [
            Finding(
                "warning",
                "alpha-zero",
                "alpha is 0, taken literally: this module does nothing",
                key,
                "programs that read 0 as 'alpha = rank' will apply it at full strength",
            )
        ]
    if alpha < 0:
        return [
            Finding("warning", "alpha-negative", f"alpha is {alpha:g}, a negative strength", key)
        ]
    if alpha > PLACEHOLDER:
        return [
            Finding(
                "warning", "alpha-huge", f"alpha is {alpha:g}, which looks like a placeholder", key
            )
        ]
    return []


class ConfigScales:
    """Alpha and rank of every module according to a PEFT config (adapter_config.json or diffusers
    metadata).

    Patterns match as PEFT does it: `(.*\\.)?(pattern)$` on the module path, first match wins.
    """

    def __init__(self, config: Mapping[str, object], source: str) -> None:
        self.source = source
        kind = str(config.get("peft_type", "LORA")).upper()
        alpha = config.get("lora_alpha") if kind == "LORA" else config.get("alpha")
        rank = config.get("r")
        if alpha is not None and not isinstance(alpha, int | float):
            raise UsageError(f"{source}: lora_alpha is {alpha!r}; expected a number.")
        if rank is not None and not isinstance(rank, int):
            raise UsageError(f"{source}: r is {rank!r}; expected an integer.")
        self.alpha, self.rank = alpha, rank
        self.rslora = bool(config.get("use_rslora", False))
        self.alpha_pattern = _pattern(config, "alpha_pattern", source)
        flags = kind == "ADALORA"  # its rank_pattern lists which ranks are left
        self.rank_pattern = _pattern({} if flags else config, "rank_pattern", source)

    def scale(self, path: str, rank: int | None) -> float:
        """The scale of one module; `rank` from its tensors, or None when they do not tell."""
        alpha = self.alpha_pattern.find(path, self.alpha)
        rank = rank if rank is not None else int(self.rank_pattern.find(path, self.rank) or 0)
        if alpha is None or not rank:
            return 1.0
        return float32(alpha / math.sqrt(rank)) if self.rslora else float32(alpha / rank)


def _pattern(config: Mapping[str, object], name: str, source: str) -> Patterns:
    value = config.get(name) or {}
    if not isinstance(value, dict) or not all(isinstance(v, int | float) for v in value.values()):
        raise UsageError(f"{source}: {name} is {value!r}; expected a mapping of pattern to number.")
    return Patterns({str(k): v for k, v in value.items()}, source)


def diffusers_configs(metadata: Mapping[str, str], source: str) -> dict[str, dict[str, object]]:
    """`lora_adapter_metadata` unpacked: component -> PEFT config fields (diffusers
    `loaders/lora_base.py`).
    """
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        packed = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{source}: the metadata lora_adapter_metadata is not JSON: {error}"
        ) from error
    configs: dict[str, dict[str, object]] = {}
    for key, value in packed.items():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    return configs


def common(values: list[float]) -> float:
    """The most frequent value, the smallest of equals."""
    counts = Counter(values)
    top = max(counts.values())
    return min(v for v, n in counts.items() if n == top)


def patterns(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Pattern entries for the modules that differ from `default`.

    PEFT matches `(.*\\.)?(pattern)$`, so a name that is also the tail of another module's name is
    anchored with `^`.
    """
    others = {path: value for path, value in values.items() if value != default}
    if not others:
        return {}
    tails = {path[index + 1 :] for path in values for index, char in enumerate(path) if char == "."}
    return {
        ("^" + path if "." not in path or path in tails else path): value
        for path, value in others.items()
    }
