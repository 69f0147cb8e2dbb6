"""The plan of a merge: which rows of which stored tensor each adapter module changes. Nothing is
read for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from peftsurgery.adapter import Adapter, members
from peftsurgery.algorithms import LoRA, Replace, Tokens, WeightAdapter
from peftsurgery.algorithms.slots import fit_shape
from peftsurgery.checkpoint import LazyTensor
from peftsurgery.codec.bases import BaseWeights, Stored
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError, nearest
from peftsurgery.operations.paths import grown_embeddings, prefix_of, prefixed
from peftsurgery.operations.strengths import Strength, block_name, check_used


@dataclass(frozen=True)
class Edit:
    """One module acting on rows [start, stop) of one stored tensor.

    Row r of the stored tensor is row (r - start + offset) mod modulus of the module.
    """

    adapter: int
    path: str
    module: WeightAdapter
    strength: float
    start: int
    stop: int
    offset: int
    modulus: int
    parameter: str = "weight"  # or "bias"
    transposed: bool = False  # the stored weight is the transpose of the home one
    columns: int | None = None  # only the first ones, when another adapter widens the weight


@dataclass
class Target:
    """A stored tensor and everything that changes it, in order.

    Rows are counted with the first `lead` dimensions taken as one: 2 for stacked experts.
    """

    name: str
    tensor: LazyTensor
    shape: tuple[int, ...]  # after the merge; padding and resized vocabularies change it
    edits: list[Edit] = field(default_factory=list)
    lead: int = 1

    @property
    def columns(self) -> int:
        """Elements behind one row."""
        return math.prod(self.shape[self.lead :])

    @property
    def rows(self) -> int:
        """Number of rows after the merge."""
        return math.prod(self.shape[: self.lead])

    @property
    def numel(self) -> int:
        """Number of elements after the merge."""
        return math.prod(self.shape)

    @property
    def resized(self) -> bool:
        """Whether the merge changes the shape."""
        return self.shape != tuple(self.tensor.shape)

    def flat(self, tensor: LazyTensor) -> LazyTensor:
        """A tensor of this shape, the base's or the result's, with rows as this target counts."""
        return tensor.flattened(self.lead)


@dataclass
class MergePlan:
    """Targets by stored name, in the order of the checkpoint, and what each adapter gives."""

    targets: dict[str, Target]
    modules: int
    prefixes: dict[int, str]  # adapter -> prefix added to its paths to find them in the base
    idle: dict[int, int] = field(default_factory=dict)  # adapter -> modules left out by strength 0

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors that change."""
        return sum(target.tensor.nbytes for target in self.targets.values())


class Misfit(Exception):
    """A module does not land; the message says why. `missing`: the home tensor the base does not
    have.
    """

    def __init__(self, message: str, missing: str | None = None) -> None:
        super().__init__(message)
        self.missing = missing


SHOWN = 8  # problems listed in full, with the nearest names: looking for those is slow
MERGEABLE = ("F32", "F16", "BF16")


def plan_merge(
    base: BaseWeights, adapters: Sequence[tuple[Adapter, Strength]], names: Sequence[str]
) -> MergePlan:
    """Place every module of every adapter on the base. A module of strength 0 is placed too, and
    then left out.

    Raises CheckFailed listing the modules without a place or with another shape, nearest names
    included: a merge lands completely or not at all.
    """
    targets: dict[str, Target] = {}
    problems: list[tuple[str, Misfit]] = []
    plan = MergePlan({}, 0, {})
    for index, (adapter, strength) in enumerate(adapters):
        check_used(strength, adapter.modules, base.architecture.name, names[index])
        prefix = prefix_of(base, adapter)
        if prefix:
            plan.prefixes[index] = prefix
        grown = grown_embeddings(base, adapter, prefix)
        for path, module in adapter.modules.items():
            plan.modules += 1
            t = strength.of(path, _block(base, path))
            if t == 0:
                plan.idle[index] = plan.idle.get(index, 0) + 1
            steps = [(module, t)]
            if path in grown:
                steps.insert(0, (grown[path], float(t != 0)))
            try:
                for step, factor in steps:
                    shape = grown[path].shape if path in grown else None
                    for stored, edit in _edits(base, index, path, prefix, step, factor, shape):
                        _add(targets if t else {}, stored, edit)
            except Misfit as misfit:
                problems.append((f"{names[index]}: {path}", misfit))
    for target in targets.values():
        problems += _settle(target, names)
    if problems:
        raise CheckFailed(
            f"{len(problems)} of {plan.modules} modules do not land on the base; nothing was "
            f"written.\n  {_listed(base, problems)}\nGive the base the adapters were trained on."
        )
    _check_dense(base, targets)
    order = {name: i for i, name in enumerate(base.checkpoint)}
    plan.targets = dict(sorted(targets.items(), key=lambda item: order[item[0]]))
    return plan


def _block(base: BaseWeights, path: str) -> str | None:
    component, _, inner = path.partition(":")
    part = base.architecture.components.get(component)
    if part is None or "ldm" not in part.columns:
        return block_name(component, None)
    site = part.site_of("ldm", members(inner)[0])
    return block_name(component, site.name if site else None)


# placing one module -------------------------------------------------------------------------------


def _edits(
    base: BaseWeights,
    index: int,
    path: str,
    prefix: str,
    module: WeightAdapter,
    strength: float,
    grown: tuple[int, ...] | None,
) -> list[tuple[Stored, Edit]]:
    """The edits of one module on its stored weights and biases. Raises Misfit."""
    component, _, inner = path.partition(":")
    parts = [prefixed(prefix, part) for part in members(inner)]
    marked = inner.partition("~")[2] == "swap_halves"
    changes_weight = bool(set(module.tensors()) - {"bias"})
    found: list[tuple[Stored, Edit]] = []
    module = _fitted(base, component, parts, module)
    row = 0
    for part in parts:
        home = f"{component}:{part}"
        weight = base.find(home)
        if changes_weight and weight is None:
            raise _missing(f"{home}.weight")
        rows = module.shape[0]
        if len(parts) > 1:
            rows = weight.shape[0] if weight is not None else rows // len(parts)
        if changes_weight and weight is not None:
            edit = _on_weight(index, path, module, strength, weight, row, rows, marked, grown)
            found.append((weight, edit))
        if module.bias is not None or module.maps_bias:
            bias = base.find(home, "bias")
            if bias is not None:
                found.append((bias, _on_bias(index, path, module, strength, bias, row, marked)))
            elif module.bias is not None and bool((module.bias != 0).any()):
                raise _missing(f"{home}.bias")
        row += rows
    if row != module.shape[0]:
        raise Misfit(f"the change has {module.shape[0]} rows, the base {row}")
    return found


def _fitted(
    base: BaseWeights, component: str, parts: Sequence[str], module: WeightAdapter
) -> WeightAdapter:
    """The module with the sizes its tensors do not tell, from the weights it lies on."""
    weights = [base.find(f"{component}:{part}") for part in parts]
    shapes = [weight.shape for weight in weights if weight is not None]
    if len(shapes) < len(parts) or len({shape[1:] for shape in shapes}) != 1:
        return module  # refused where it is placed
    try:
        return module.on((sum(shape[0] for shape in shapes if shape), *shapes[0][1:]))
    except UsageError as error:
        raise Misfit(str(error).rstrip(".")) from error


def _missing(name: str) -> Misfit:
    return Misfit(f"the base has no {name.partition(':')[2]!r}", name)


def _listed(base: BaseWeights, problems: Sequence[tuple[str, Misfit]]) -> str:
    lines: list[str] = []
    for where, misfit in problems[:SHOWN]:
        close = nearest(misfit.missing, base.stored, n=2) if misfit.missing else []
        hint = f" (closest: {', '.join(map(repr, close))})" if close else ""
        lines.append(f"{where}: {misfit}{hint}")
    if len(problems) > SHOWN:
        lines.append(f"… and {len(problems) - SHOWN} more")
    return "\n  ".join(lines)


def _check_dense(base: BaseWeights, targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        if target.tensor.dtype not in MERGEABLE:
            raise UnsupportedError(
                f"{base.checkpoint.source}: {name!r} is stored as {target.tensor.dtype}, in no "
                "packed format that is known; fp32, fp16 and bf16 weights were expected beside "
                "those. Merge into the original and quantize the result."
            )


def _on_weight(
    index: int,
    path: str,
    module: WeightAdapter,
    strength: float,
    stored: Stored,
    row: int,
    rows: int,
    marked: bool,
    grown: tuple[int, ...] | None,
) -> Edit:
    start, stop = stored.rows
    home = stored.shape or (1,)
    if grown is not None and not isinstance(module, Replace | Tokens):
        home, stop = grown, grown[0]
    own = module.shape if rows == module.shape[0] else (rows, *module.shape[1:])
    transposed = stored.site.operator == "transpose"
    if module.padded_shape is not None:
        wide = module.padded_shape
        if len(wide) != len(home) or any(a < b for a, b in zip(wide, home, strict=True)):
            raise Misfit(f"it widens the weight to {list(wide)}, the base has {list(home)}")
        stop = wide[0]
    elif (
        isinstance(module, Replace | Tokens)
        and not transposed
        and _whole(stored)
        and own[1:] == home[1:]
    ):
        if own[0] != home[0] and strength not in (0, 1):
            raise Misfit(
                f"it replaces {home[0]} rows by {own[0]}, which has no meaning at strength "
                f"{strength:g}; use 1"
            )
        stop = own[0]
    elif not fit_shape(own, (rows, *home[1:])) or home[0] != rows:
        raise Misfit(f"the change has shape {list(own)}, the base {list(home)}")
    if transposed and isinstance(module, LoRA) and module.additive and module.mid is None:
        up, down = module.up.detach().flatten(1), module.down.detach().flatten(1)
        module = LoRA(down.T, up.T, scale=module.scale)
        transposed = False
    swapped = (stored.site.operator == "swap_halves") != marked
    offset = row + (rows // 2 if swapped else 0)
    modulus = module.shape[0]
    return Edit(index, path, module, strength, start, stop, offset, modulus, "weight", transposed)


def _whole(stored: Stored) -> bool:
    return stored.span is None and len(stored.site.parts) == 1


def _on_bias(
    index: int,
    path: str,
    module: WeightAdapter,
    strength: float,
    stored: Stored,
    row: int,
    marked: bool,
) -> Edit:
    start, stop = stored.rows
    axis = module._bias_axis if module.bias is None else 0
    count = module.shape[axis] if module.bias is None else module.bias.numel()
    if stop - start > count - row or (len(members(path)) == 1 and stop - start != count):
        raise Misfit(f"the change of the bias has {count} values, the base {stop - start}")
    swapped = (stored.site.operator == "swap_halves") != marked
    offset = row + ((stop - start) // 2 if swapped else 0)
    return Edit(index, path, module, strength, start, stop, offset, count, "bias")


# targets ------------------------------------------------------------------------------------------


def _add(targets: dict[str, Target], stored: Stored, edit: Edit) -> None:
    """Put an edit on its target; edits of one module on neighbouring rows become one."""
    shape = tuple(stored.tensor.shape)
    target = targets.get(stored.name)
    if target is None:
        target = targets[stored.name] = Target(stored.name, stored.tensor, shape, lead=stored.lead)
    if target.lead != stored.lead:
        raise UnsupportedError(
            f"{stored.name!r}: changed as a whole by one adapter and expert by expert by another; "
            "merge them one after the "
            "other."
        )
    if edit.parameter == "weight" and edit.module.padded_shape is not None:
        target.shape = tuple(map(max, target.shape, edit.module.padded_shape))
    elif _whole(stored) and edit.parameter == "weight" and edit.stop != shape[0]:
        target.shape = (edit.stop, *target.shape[1:])
    last = target.edits[-1] if target.edits else None
    if (
        last is not None
        and last.module is edit.module
        and (last.adapter, last.path, last.parameter) == (edit.adapter, edit.path, edit.parameter)
        and last.stop == edit.start
        and last.offset + last.stop - last.start == edit.offset
    ):
        target.edits[-1] = replace(last, stop=edit.stop)
    else:
        target.edits.append(edit)


def _settle(target: Target, names: Sequence[str]) -> list[tuple[str, Misfit]]:
    """Edits of adapters that know the weight by a smaller shape than another adapter gives it."""
    problems: list[tuple[str, Misfit]] = []
    if not target.resized:
        return problems
    for place, edit in enumerate(target.edits):
        shape = edit.module.padded_shape or edit.module.shape
        columns = math.prod(shape) // shape[0]
        if edit.parameter == "bias" or columns == target.columns:
            continue
        if edit.module.additive and len(target.shape) == 2:
            target.edits[place] = replace(edit, columns=columns)
        else:
            why = (
                f"looks at a weight of {columns} columns, which another adapter widens to "
                f"{target.columns}"
            )
            problems.append((f"{names[edit.adapter]}: {edit.path}", Misfit(why)))
    return problems
