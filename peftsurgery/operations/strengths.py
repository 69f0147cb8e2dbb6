"""Strengths: one number per adapter, per component, or per block.

    FILE=0.8                        every module
    FILE=unet:0.8,text_encoder:0.5  per component; components not named get 0
    FILE=@MAP.json                  patterns of module paths -> strength, first match wins, "*" the
    rest; or
                                    12, 17, 20 or 26 block weights, as the Kohya block-weight lists

The lists (sd-scripts `networks/svd_merge_lora.py`, after the LoRA Block Weight extension): 17 and
26 numbers name blocks of SD1.x and SD2.x, 12 and 20 blocks of SDXL; the short ones leave out blocks
without attention. BASE is the text encoders. Modules outside the blocks of a list keep the full
strength.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftsurgery.errors import UsageError, nearest

# order of the numbers: BASE (text encoders), IN…, MID, OUT…, as ldm block indices
FAMILIES = {17: ("sd1", "sd2"), 26: ("sd1", "sd2"), 12: ("sdxl",), 20: ("sdxl",)}
SD_ALL = (
    "BASE",
    *(f"IN{i:02}" for i in range(12)),
    "M00",
    *(f"OUT{i:02}" for i in range(12)),
)
SD_ATTENTION = ("IN01", "IN02", "IN04", "IN05", "IN07", "IN08")
BLOCK_LISTS: dict[int, tuple[str, ...]] = {
    17: ("BASE", *SD_ATTENTION, "M00", *(f"OUT{i:02}" for i in range(3, 12))),
    26: SD_ALL,
    12: ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02}" for i in range(6))),
    20: ("BASE", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9))),
}


@dataclass(frozen=True)
class Strength:
    """Strength of one adapter: a number, with exceptions per component, block or module pattern."""

    value: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict)
    patterns: Mapping[str, float] = field(default_factory=dict)
    blocks: Mapping[str, float] = field(default_factory=dict)

    def of(self, path: str, block: str | None) -> float:
        """The strength of one module (`component:path`); `block` is its Kohya block name, if it has
        one.
        """
        component = path.partition(":")[0]
        result = self.value
        if self.components:
            result *= self.components.get(
                component, 0.0
            )  # a name without a strength was left out on purpose
        if self.blocks and block is not None:
            result *= self.blocks.get(block, 1.0)
        for pattern, value in self.patterns.items():
            if path == pattern or fnmatch.fnmatchcase(path, pattern):
                return result * value
        return 0.0 if self.patterns else result

    def __post_init__(self) -> None:
        numbers = {"": self.value, **self.components, **self.patterns, **self.blocks}
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise UsageError(
                    f"strength {number} {name}: expected a finite number.".replace("  ", " ")
                )

    def __str__(self) -> str:
        text = f"{self.value:g}"
        if self.components:
            text = ",".join(f"{c}:{v:g}" for c, v in self.components.items())
        if self.blocks:
            text += f" x {len(self.blocks)} block weights"
        return text + (f" x {len(self.patterns)} patterns" if self.patterns else "")


def check_used(strength: Strength, paths: Iterable[str], family: str, name: str) -> None:
    """Refuse a component, pattern or block list that this adapter has no module for. Raises
    UsageError.
    """
    paths = list(paths)
    present = sorted({path.partition(":")[0] for path in paths})
    for component in strength.components:
        if component not in present:
            raise UsageError(
                f"{name}: has no component {component!r}; it has {', '.join(present)}."
            )
    for pattern in strength.patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) or path == pattern for path in paths):
            close = nearest(pattern.strip("*"), paths, n=2)
            hint = f" (closest: {', '.join(map(repr, close))})" if close else ""
            raise UsageError(f"{name}: no module matches the strength pattern {pattern!r}{hint}.")
    if strength.blocks:
        counts = [n for n, names in BLOCK_LISTS.items() if tuple(strength.blocks) == names]
        known = sorted(n for n, families in FAMILIES.items() if family in families)
        if not known:
            raise UsageError(
                f"{name}: block weights are for SD1.x, SD2.x and SDXL, not for {family}."
            )
        if counts and counts[0] not in known:
            raise UsageError(
                f"{name}: {counts[0]} block weights are not for {family}; expected "
                f"{' or '.join(map(str, known))}."
            )


def parse(text: str) -> tuple[str, Strength]:
    """`FILE[=STRENGTH]` -> (file, strength). A `=` in the file name itself is kept when what
    follows is no strength.
    """
    source, equals, tail = text.rpartition("=")
    if not equals:
        return text, Strength()
    if tail.startswith("@"):
        return source, from_mapping(Path(tail[1:]))
    try:
        return source, _numbers(tail)
    except (ValueError, OverflowError):
        if "/" in tail or "\\" in tail or tail.endswith(".safetensors"):
            return text, Strength()
        raise UsageError(
            f"{text!r}: {tail!r} is no strength. Expected FILE=0.8, FILE=unet:0.8,text_encoder:0.5 "
            "or "
            "FILE=@MAP.json."
        ) from None


def _numbers(text: str) -> Strength:
    if ":" not in text:
        return Strength(float(text))
    pairs = [item.partition(":") for item in text.split(",")]
    return Strength(1.0, {name.strip(): float(value) for name, _, value in pairs})


def from_mapping(path: Path) -> Strength:
    """A JSON file: `{"pattern": strength, …}`, or a list of 12, 17, 20 or 26 block weights."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a strength mapping: {error}") from error
    if isinstance(data, list):
        return Strength(1.0, blocks=block_weights(data, str(path)))
    if isinstance(data, dict) and all(map(_number, data.values())):
        return Strength(1.0, patterns={str(k): float(v) for k, v in data.items()})
    raise UsageError(
        f"{path}: expected a mapping of patterns to numbers, or a list of {_lengths()} numbers."
    )


def block_weights(values: Sequence[object], where: str) -> dict[str, float]:
    """Kohya block weights by block name. Raises UsageError for another length."""
    names = BLOCK_LISTS.get(len(values))
    if names is None:
        raise UsageError(f"{where}: {len(values)} block weights; expected {_lengths()}.")
    numbers = [v for v in values if isinstance(v, int | float) and _number(v)]
    if len(numbers) != len(values):
        raise UsageError(f"{where}: block weights must be numbers.")
    return dict(zip(names, map(float, numbers), strict=True))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lengths() -> str:
    return ", ".join(str(n) for n in sorted(BLOCK_LISTS))


def block_name(component: str, ldm_name: str | None) -> str | None:
    """The Kohya block of a module from its ldm name: IN04, M00, OUT11; BASE for text encoders; None
    for the rest.
    """
    if component.startswith("text_encoder"):
        return "BASE"
    if ldm_name is None:
        return None
    head, _, rest = ldm_name.partition(".")
    number = rest.partition(".")[0]
    prefix = {"input_blocks": "IN", "output_blocks": "OUT"}.get(head)
    if prefix and number.isdigit():
        return f"{prefix}{int(number):02}"
    return "M00" if head == "middle_block" else None
