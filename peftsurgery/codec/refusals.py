"""What makes a refused conversion possible: the options, in the words of the error messages."""

from __future__ import annotations

from collections.abc import Collection

from peftsurgery.algorithms import WeightAdapter
from peftsurgery.errors import UnsupportedError

LORA_ONLY = "--algorithm lora --rank RULE rewrites it as a LoRA and states the loss"
BAKED = (
    "--base CHECKPOINT --algorithm lora --rank RULE (or --algorithm full) bakes it into the change"
)
DIFFERENCE = "--base CHECKPOINT writes it as the difference from the base"
LEFT_OUT = "--drop PATTERN leaves it out on request"


class Refused(UnsupportedError):
    """One module that a layout cannot hold, and what would make it possible."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def way_out(modules: Collection[WeightAdapter]) -> str:
    """The option that makes modules splittable or joinable."""
    kinds = {m.algorithm for m in modules}
    if "set" in kinds:
        return "--base CHECKPOINT --algorithm full writes the difference from the base"
    return LORA_ONLY if all(m.additive for m in modules) else BAKED
