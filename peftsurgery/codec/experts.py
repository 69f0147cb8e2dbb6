"""Experts of a mixture, stored one by one or stacked, and the two spellings they have.

transformers 5 keeps the experts of a layer in memory as two parameters, `experts.gate_up_proj` (E,
2 I, H), gate rows above up rows, and `experts.down_proj` (E, H, I), and writes most families back
one by one, in the names of the original release (`conversion_mapping.py`, `core_model_loading.py`):
`block_sparse_moe.experts.3.w1` (gate), `w3` (up), `w2` (down), or `mlp.experts.3.gate_proj` and so
on. A few families store [in, out] instead, (E, H, 2 I).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from peftsurgery.errors import UnsupportedError

if TYPE_CHECKING:
    from peftsurgery.codec.bases import Stored

HALVES = ("gate_proj", "up_proj")  # the rows of gate_up_proj, in order
LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_SPELLED = {**LEAVES, **{new: old for old, new in LEAVES.items()}}
_BLOCK = re.compile(r"\.(mlp|block_sparse_moe)(?=\.(?:experts|gate)(?:\.|$))")
_ONE = re.compile(r"(?P<experts>.+)\.(?P<index>\d+)\.(?P<leaf>[^.]+)")
_SLICE = re.compile(r"(?P<parameter>.+)\.(?P<index>\d+)")

# `model_type` -> whether the live module is marked `is_transposed` ([in, out]); looked up in
# transformers 5.23
TRANSPOSED = {
    **dict.fromkeys(("gpt_oss", "aria", "aria_text"), True),
    **dict.fromkeys(
        (
            "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "llama4",
            "llama4_text",
        ),
        False,
    ),
}  # fmt: skip


def find(
    stored: Mapping[str, Stored], path: str, parameter: str, model_type: str | None = None
) -> Stored | None:
    """The tensor of a home module under another spelling, or a slice of the stack it is in; None
    when there is none.

    `….experts.3.w1` is also looked up as `gate_proj`, below `mlp` and below `block_sparse_moe`, and
    as rows of the stacked `gate_up_proj`. `….experts.gate_up_proj.3` is slice 3 of the stack as it
    is stored. Raises UnsupportedError when a square stack does not tell whether its slices are
    [out, in], and `model_type` does not either.
    """
    for spelling in spellings(path):
        if found := stored.get(f"{spelling}.{parameter}"):
            return found
    if parameter != "weight":
        return None
    for spelling in (path, *spellings(path)):
        if found := stored.get(spelling):  # a parameter of its own name, without .weight
            return found
        if (match := _SLICE.fullmatch(spelling)) and (stack := stored.get(match["parameter"])):
            return expert(stack, int(match["index"]), 0, 1)
        if match := _ONE.fullmatch(spelling):
            found = _in_stack(stored, match["experts"], int(match["index"]), match["leaf"])
            if found is not None:
                _check_orientation(found, path, model_type)
                return found
    return None


def spellings(path: str) -> Iterator[str]:
    """The other names of a module of a mixture: other block name, other leaf, both."""
    turned = _BLOCK.sub(
        lambda m: ".mlp" if m[1] == "block_sparse_moe" else ".block_sparse_moe", path
    )
    match = _ONE.fullmatch(path)
    for name in dict.fromkeys((path, turned)):
        if name != path:
            yield name
        if match and match["experts"].endswith(".experts") and match["leaf"] in _SPELLED:
            yield name.removesuffix(match["leaf"]) + _SPELLED[match["leaf"]]


def expert(stack: Stored, index: int, part: int, parts: int) -> Stored | None:
    """Rows of one expert of a stacked tensor: part `part` of `parts` equal ones; None when there is
    no such expert.
    """
    shape = stack.tensor.shape
    if len(shape) != 3 or index >= shape[0] or shape[1] % parts:
        return None
    rows = shape[1] // parts
    start = index * shape[1] + part * rows
    return replace(stack, lead=2, span=(start, start + rows))


def _in_stack(stored: Mapping[str, Stored], experts: str, index: int, leaf: str) -> Stored | None:
    leaf = LEAVES.get(leaf, leaf)
    if leaf in HALVES and (stack := stored.get(f"{experts}.gate_up_proj")):
        return expert(stack, index, HALVES.index(leaf), 2)
    stack = stored.get(f"{experts}.{leaf}") if leaf == "down_proj" else None
    return None if stack is None else expert(stack, index, 0, 1)


def _check_orientation(found: Stored, path: str, model_type: str | None) -> None:
    """Only slices [out, in] can be addressed expert by expert; a wrong one shows in its shape
    unless it is square.
    """
    _, rows, columns = found.tensor.shape
    if rows == columns and TRANSPOSED.get(model_type or "") is not False:
        raise UnsupportedError(
            f"{found.name!r}: its slices are square ({rows} x {columns}), so nothing tells whether "
            "they are [out, in] or "
            f"[in, out], and {path!r} needs to know. Expected a config.json with a known "
            f"model_type, not {model_type!r}."
        )
