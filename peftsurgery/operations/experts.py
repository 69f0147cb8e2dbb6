"""PEFT's target_parameters: one LoRA for all experts of a layer, taken apart into one LoRA per
expert.

A record on the parameter P (E, a, b) holds A [E r, in] and B [out, r E], folded differently:
A.reshape(E, r, in), B.reshape(out, r, E). The change of expert e is s B_e A_e with s = alpha / r,
[out, in] or its transpose (PEFT `tuners/lora/layer.py`, ParamWrapper). Several parameters of one
module are nested wrappers, so their keys differ in the number of `base_layer` only; shapes tell
which is which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import LoRA, WeightAdapter
from peftsurgery.codec.bases import BaseWeights
from peftsurgery.codec.experts import HALVES, TRANSPOSED
from peftsurgery.codec.scales import ConfigScales
from peftsurgery.errors import CheckFailed, UnsupportedError

NESTED = ".base_layer"


@dataclass(frozen=True)
class Stack:
    """Where one targeted parameter lies in the base: E experts of (rows, columns), whole or in
    parts.
    """

    parameter: str  # component:path, without the block index of the expert
    count: int
    rows: int
    columns: int
    parts: tuple[
        tuple[str, int], ...
    ]  # template of the module path of one part ({} = expert), its rows
    live: bool  # stored as the live model has it; otherwise one by one, [out, in]


def unstack(adapter: Adapter, base: BaseWeights, name: str) -> Adapter:
    """The same adapter with every stacked record replaced by LoRAs on single experts of the base.

    Raises CheckFailed when a record fits none of its parameters, UnsupportedError when it fits
    several, or when a square parameter leaves its orientation open.
    """
    targets = adapter.config.get("target_parameters")
    if not isinstance(targets, list) or not targets:
        return adapter
    modules: dict[str, WeightAdapter] = {}
    groups: dict[str, list[str]] = {}
    for path in adapter.modules:
        plain = path
        while plain.endswith(NESTED):
            plain = plain.removesuffix(NESTED)
        if plain != path or base.find(path) is None:
            groups.setdefault(plain, []).append(path)
    scales = ConfigScales(adapter.config, name)
    done: set[str] = set()
    for path, module in adapter.modules.items():
        if path in done:
            continue
        plain = next((p for p, paths in groups.items() if path in paths), None)
        stacks = {} if plain is None else _stacks(base, plain, targets)
        if plain is None or not stacks:
            modules[path] = module
            continue
        done.update(groups[plain])
        records = {p: adapter.modules[p] for p in groups[plain]}
        for stack, record in _matched(stacks, records, name):
            modules.update(_split(stack, record, scales, base.model_type, adapter, name))
    return replace(adapter, modules=modules)


def _stacks(base: BaseWeights, module: str, targets: Sequence[object]) -> dict[str, Stack]:
    """Targeted parameter of a module -> its stack, for those the base has."""
    found: dict[str, Stack] = {}
    for target in targets:
        owner, _, leaf = str(target).rpartition(".")
        if not (f".{module}".endswith(f".{owner}") or module.endswith(f":{owner}") or not owner):
            continue
        stack = _stored(base, module, leaf) or _one_by_one(base, module, leaf)
        if stack is not None:
            found[leaf] = stack
    return found


def _stored(base: BaseWeights, module: str, leaf: str) -> Stack | None:
    path = f"{module}.{leaf}"
    stored = base.find(path)
    shape = () if stored is None else tuple(stored.tensor.shape)
    if len(shape) == 3:
        return Stack(path, shape[0], shape[1], shape[2], ((f"{path}.{{}}", shape[1]),), True)
    if len(shape) == 2:
        return Stack(path, 1, shape[0], shape[1], ((path, shape[0]),), True)
    return None


def _one_by_one(base: BaseWeights, module: str, leaf: str) -> Stack | None:
    leaves = HALVES if leaf == "gate_up_proj" else (leaf,)
    first = [base.find(f"{module}.0.{part}") for part in leaves]
    shapes = [part.shape for part in first if part is not None]
    if len(shapes) < len(leaves) or any(len(s) != 2 or s[1] != shapes[0][1] for s in shapes):
        return None
    count = 1
    while base.find(f"{module}.{count}.{leaves[0]}") is not None:
        count += 1
    parts = tuple((f"{module}.{{}}.{part}", s[0]) for part, s in zip(leaves, shapes, strict=True))
    rows = sum(s[0] for s in shapes)
    return Stack(f"{module}.{leaf}", count, rows, shapes[0][1], parts, False)


def _sides(record: WeightAdapter, count: int) -> tuple[int, int] | None:
    """(out, in) of one expert; None when the record cannot be folded into `count`."""
    if not isinstance(record, LoRA) or record.mid is not None or not record.additive:
        return None
    if record.down.shape[0] % count or record.up.ndim != 2:
        return None
    return record.up.shape[0], record.down.shape[1]


def _fits(stack: Stack, record: WeightAdapter) -> bool:
    sides = _sides(record, stack.count)
    straight = (stack.rows, stack.columns)
    return sides is not None and (sides == straight or (stack.live and sides == straight[::-1]))


def _matched(
    stacks: Mapping[str, Stack], records: Mapping[str, WeightAdapter], name: str
) -> list[tuple[Stack, LoRA]]:
    """Each record with the one parameter it fits."""
    result: list[tuple[Stack, LoRA]] = []
    taken: set[str] = set()
    for path, record in records.items():
        fitting = [leaf for leaf, stack in stacks.items() if _fits(stack, record)]
        shapes = ", ".join(f"{n} {s.count} x [{s.rows}, {s.columns}]" for n, s in stacks.items())
        if not fitting:
            raise CheckFailed(
                f"{name}: {path}: a change of shape {list(record.shape)} and rank {record.rank} "
                "fits none of the stacked "
                f"parameters ({shapes}). Give the base the adapter was trained on."
            )
        if len(fitting) > 1 or fitting[0] in taken or not isinstance(record, LoRA):
            raise UnsupportedError(
                f"{name}: {path}: fits more than one of {shapes}, and the file does not say which. "
                "Save the adapter with "
                "one target_parameters entry per module."
            )
        taken.add(fitting[0])
        result.append((stacks[fitting[0]], record))
    return result


def _turned(stack: Stack, sides: tuple[int, int], model_type: str | None, version: str) -> bool:
    """Whether the slices are [in, out]: from the shapes, of square ones from what PEFT does for
    this model.

    Since 0.19 PEFT takes dimension 1 as the outputs unless the live module says `is_transposed`.
    """
    if stack.rows != stack.columns:
        return sides != (stack.rows, stack.columns)
    known = TRANSPOSED.get(model_type or "")
    digits = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    if known is None or digits < [0, 19]:
        raise UnsupportedError(
            f"{stack.parameter}: its experts are square ({stack.rows} x {stack.columns}), so the "
            "factors do not tell "
            f"whether they are [out, in] or [in, out]; model_type {model_type!r} with peft_version "
            f"{version or 'unknown'} "
            "does not either. Save the adapter again with PEFT 0.19 or later, and give the base "
            "its config.json."
        )
    return known


def _split(
    stack: Stack,
    record: LoRA,
    scales: ConfigScales,
    model_type: str | None,
    adapter: Adapter,
    name: str,
) -> dict[str, WeightAdapter]:
    sides = _sides(record, stack.count)
    assert sides is not None
    rank = record.rank // stack.count
    version = str(adapter.config.get("peft_version") or "")
    turned = _turned(stack, sides, model_type, version)
    if turned and not stack.live:
        raise UnsupportedError(
            f"{name}: {stack.parameter}: the adapter holds [in, out] slices, the base stores its "
            "experts one by one."
        )
    scale = scales.scale(stack.parameter.partition(":")[2], rank)
    inner = record.down.detach().reshape(stack.count, rank, sides[1])
    outer = record.up.detach().reshape(sides[0], rank, stack.count)
    found: dict[str, WeightAdapter] = {}
    for index in range(stack.count):
        up, down = outer[:, :, index], inner[index]
        if turned:
            up, down = down.T, up.T
        start = 0
        for template, rows in stack.parts:
            found[template.format(index)] = LoRA(up[start : start + rows], down, scale=scale)
            start += rows
    return found
