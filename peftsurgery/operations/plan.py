"""The plan of a merge: which rows of which stored tensor each adapter module changes. Nothing is read for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peftsurgery.adapter import Adapter, members
from peftsurgery.algorithms import Replace, WeightAdapter
from peftsurgery.algorithms.slots import fit_shape
from peftsurgery.checkpoint import LazyTensor
from peftsurgery.codec.bases import BaseWeights, Stored
from peftsurgery.errors import CheckFailed, nearest
from peftsurgery.operations.strengths import Strength, block_name


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


@dataclass
class Target:
    """A stored tensor and everything that changes it, in order."""

    name: str
    tensor: LazyTensor
    shape: tuple[int, ...]  # after the merge; padding and resized vocabularies change it
    edits: list[Edit] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Elements behind one row."""
        count = 1
        for n in self.shape[1:]:
            count *= n
        return count


@dataclass
class MergePlan:
    """Targets by stored name, in the order of the checkpoint, and what every adapter contributes."""

    targets: dict[str, Target]
    modules: int
    prefixes: dict[int, str]  # adapter -> prefix added to its paths to find them in the base

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors that change."""
        return sum(target.tensor.nbytes for target in self.targets.values())


def plan_merge(
    base: BaseWeights, adapters: Sequence[tuple[Adapter, Strength]], names: Sequence[str]
) -> MergePlan:
    """Place every module of every adapter on the base.

    Raises CheckFailed listing the modules without a place or with another shape, nearest names included: a merge lands
    completely or not at all.
    """
    targets: dict[str, Target] = {}
    problems: list[str] = []
    prefixes: dict[int, str] = {}
    count = 0
    for index, (adapter, strength) in enumerate(adapters):
        prefix = _prefix(base, adapter)
        if prefix:
            prefixes[index] = prefix
        for path, module in adapter.modules.items():
            count += 1
            t = strength.of(path, _block(base, path))
            problem = _place(base, targets, index, path, prefix, module, t)
            if problem:
                problems.append(f"{names[index]}: {path}: {problem}")
    if problems:
        shown = "\n  ".join(problems[:8])
        more = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckFailed(
            f"{len(problems)} of {count} modules do not land on the base; nothing was written.\n  {shown}{more}\n"
            "Give the base the adapters were trained on."
        )
    order = {name: i for i, name in enumerate(base.checkpoint)}
    return MergePlan(
        dict(sorted(targets.items(), key=lambda item: order[item[0]])), count, prefixes
    )


def _block(base: BaseWeights, path: str) -> str | None:
    component, _, inner = path.partition(":")
    part = base.architecture.components.get(component)
    if part is None or "ldm" not in part.columns:
        return block_name(component, None)
    site = part.site_of("ldm", members(inner)[0])
    return block_name(component, site.name if site else None)


def _prefix(base: BaseWeights, adapter: Adapter) -> str:
    """What has to stand before an adapter's paths so that they are found, when the model was wrapped differently.

    `model.layers…` against `language_model.model.layers…`: tried only when not a single path is found as it stands.
    """
    paths = [path.partition(":") for path in adapter.modules]
    if base.architecture.name != "llm" or any(
        base.find(f"{c}:{part}") for c, _, p in paths for part in members(p)
    ):
        return ""
    component, _, first = paths[0]
    wanted = members(first)[0]
    for stored in base.stored:
        home = stored.partition(":")[2].removesuffix(".weight")
        if home.endswith("." + wanted):
            prefix = home.removesuffix(wanted)
            if all(base.find(f"{c}:{prefix}{members(p)[0]}") for c, _, p in paths):
                return prefix
        if wanted.endswith("." + home):
            strip = wanted.removesuffix(home)
            if all(base.find(f"{c}:{members(p)[0].removeprefix(strip)}") for c, _, p in paths):
                return "-" + strip
    return ""


def prefixed(prefix: str, path: str) -> str:
    """`path` with the prefix that `_prefix` found; a leading `-` means it is taken away."""
    return path.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + path


def _place(
    base: BaseWeights,
    targets: dict[str, Target],
    index: int,
    path: str,
    prefix: str,
    module: WeightAdapter,
    strength: float,
) -> str | None:
    component, _, inner = path.partition(":")
    parts = [prefixed(prefix, part) for part in members(inner)]
    marked = inner.partition("~")[2]
    row = 0
    share = module.shape[0] // len(parts) if len(parts) > 1 else module.shape[0]
    for part in parts:
        home = f"{component}:{part}"
        weight = base.find(home)
        bias = base.find(home, "bias")
        own = set(module.tensors()) - {"bias"}
        if own and weight is None:
            return _missing(base, f"{home}.weight")
        if weight is not None and len(parts) > 1:
            share = _home_rows(weight)
        rows = share
        if own and weight is not None:
            problem = _add(targets, index, path, module, strength, weight, row, rows, marked)
            if problem:
                return problem
        if module.bias is not None:
            if bias is None:
                if bool((module.bias != 0).any()):
                    return _missing(base, f"{home}.bias")
            else:
                _add_bias(targets, index, path, module, strength, bias, row, rows, marked)
        row += rows
    if row != module.shape[0]:
        return f"the change has {module.shape[0]} rows, the base {row}"
    return None


def _missing(base: BaseWeights, name: str) -> str:
    close = nearest(name, base.stored, n=2)
    hint = f" (closest: {', '.join(map(repr, close))})" if close else ""
    return f"the base has no {name.partition(':')[2]!r}{hint}"


def _home_rows(stored: Stored) -> int:
    if len(stored.site.parts) == 1:
        return stored.tensor.shape[0]
    start, stop = stored.site.row_ranges(stored.tensor.shape[0])[stored.part]
    return stop - start


def _range(stored: Stored) -> tuple[int, int]:
    rows = stored.tensor.shape[0] if stored.tensor.shape else 1
    if len(stored.site.parts) == 1:
        return 0, rows
    return stored.site.row_ranges(rows)[stored.part]


def _add(
    targets: dict[str, Target],
    index: int,
    path: str,
    module: WeightAdapter,
    strength: float,
    stored: Stored,
    row: int,
    rows: int,
    marked: str,
) -> str | None:
    start, stop = _range(stored)
    transposed = stored.site.operator == "transpose"
    shape = tuple(stored.tensor.shape)
    home = shape[::-1] if transposed else shape
    wanted = (rows, *home[1:])
    own = module.shape if rows == module.shape[0] else (rows, *module.shape[1:])
    resized = isinstance(module, Replace) and len(own) == len(home) and own[1:] == home[1:]
    if module.padded_shape is not None:
        grown = module.padded_shape
        if len(grown) != len(home) or any(a < b for a, b in zip(grown, home, strict=True)):
            return f"it widens the weight to {list(grown)}, the base has {list(home)}"
        shape = grown
    elif resized and own[0] != home[0] and (start, stop) == (0, shape[0]):
        shape, stop = tuple(module.shape), module.shape[0]
    elif not fit_shape(own, (stop - start if not transposed else home[0], *home[1:])):
        return f"the change has shape {list(own)}, the base {list(wanted)}"
    swapped = (stored.site.operator == "swap_halves") != (marked == "swap_halves")
    target = targets.setdefault(stored.name, Target(stored.name, stored.tensor, shape))
    if target.shape != shape and tuple(target.tensor.shape) == target.shape:
        target.shape = shape
    offset = row + (rows // 2 if swapped else 0)
    target.edits.append(
        Edit(
            index, path, module, strength, start, stop, offset, module.shape[0], "weight", transposed
        )
    )
    return None


def _add_bias(
    targets: dict[str, Target],
    index: int,
    path: str,
    module: WeightAdapter,
    strength: float,
    stored: Stored,
    row: int,
    rows: int,
    marked: str,
) -> None:
    start, stop = _range(stored)
    swapped = (stored.site.operator == "swap_halves") != (marked == "swap_halves")
    target = targets.setdefault(
        stored.name, Target(stored.name, stored.tensor, tuple(stored.tensor.shape))
    )
    offset = row + (rows // 2 if swapped else 0)
    target.edits.append(
        Edit(index, path, module, strength, start, stop, offset, module.shape[0], "bias")
    )


def adapters_of(target: Target) -> Mapping[int, int]:
    """Adapter index -> number of its edits on a target."""
    counts: dict[int, int] = {}
    for edit in target.edits:
        counts[edit.adapter] = counts.get(edit.adapter, 0) + 1
    return counts
