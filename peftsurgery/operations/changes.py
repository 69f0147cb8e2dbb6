"""What a fine-tune changed: modules of TUNED that differ from BASE, and an account of the rest."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from peftsurgery import architectures
from peftsurgery.checkpoint import Checkpoint
from peftsurgery.codec import BaseWeights
from peftsurgery.codec.bases import Stored
from peftsurgery.errors import Finding, UnsupportedError, UsageError
from peftsurgery.operations.differences import FLOATS, Difference, paired
from peftsurgery.operations.inputs import OPEN
from peftsurgery.operations.packed_sides import StoredAlike, same_stored
from peftsurgery.operations.staging import workers
from peftsurgery.operations.tying import tied_pair
from peftsurgery.quantizers import is_marker
from peftsurgery.reports import Progress

LISTED = 8  # names shown in one message
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


@dataclass
class Change:
    """One module (`component:path`): what differs of it, and its unchanged parameters beside."""

    path: str
    differing: dict[str, Difference] = field(default_factory=dict)  # "weight", "bias"
    unchanged: dict[str, Difference] = field(default_factory=dict)

    @property
    def known(self) -> Mapping[str, Difference]:
        """Every parameter, changed or not."""
        return {**self.unchanged, **self.differing}


@dataclass
class Changes:
    """The modules that differ, and how every other tensor of both checkpoints is accounted for."""

    modules: dict[str, Change] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # embedding -> head that shares its tensor
    unchanged: int = 0
    compared: int = 0
    left_out: list[str] = field(default_factory=list)  # on request
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Selection:
    """`--only`, `--targets`, `--exclude`: patterns match a whole path, with or without component,
    or its last names (`q_proj`, `attn.to_q`)."""

    only: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, module: str) -> bool:
        """Whether a module (`component:path`) is to be extracted."""
        if self.only and module.partition(":")[0] not in self.only:
            return False
        if any(_matches(module, pattern) for pattern in self.exclude):
            return False
        return not self.targets or any(_matches(module, pattern) for pattern in self.targets)

    def check(self, modules: Iterable[str]) -> None:
        """UsageError naming a component or a pattern that nothing answers to."""
        known = list(modules)
        components = list(dict.fromkeys(name.partition(":")[0] for name in known))
        components = [component for component in components if component]
        for component in self.only:
            if component not in components:
                raise UsageError(
                    f"--only {component}: there is no such component; there are "
                    f"{', '.join(components)}."
                )
        for option, patterns in (("--targets", self.targets), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not any(_matches(name, pattern) for name in known):
                    raise UsageError(f"{option} {pattern!r} matches no module. Check the pattern.")


def _matches(module: str, pattern: str) -> bool:
    inner = module.partition(":")[2]
    names = (module, inner, f"{inner}.weight")
    if any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names):
        return True
    return fnmatch.fnmatchcase(inner, f"*.{pattern}")


def family_of_both(tuned: Checkpoint, base: Checkpoint) -> str:
    """The architecture whose table knows most of both; one that takes any name only when no other
    knows a good part of them (a VAE, which no table has, may be as large as the rest).

    Of several that place every tensor alike, the one whose pinned shapes fit. UsageError when they
    place them differently.
    """
    fitting: list[tuple[int, int, BaseWeights]] = []
    for name in architectures.ARCHITECTURES:
        if name in OPEN:
            continue
        family = architectures.get(name)
        try:
            sides = [BaseWeights(side, family) for side in (tuned, base)]
        except UsageError:
            continue
        found = [len({stored.name for stored in side.stored.values()}) for side in sides]
        if all(6 * n >= len(side.checkpoint) for n, side in zip(found, sides, strict=True)):
            fitting.append((-min(found), _misfits(sides[1]), sides[1]))
    if not fitting:
        return OPEN[0]
    best = min(item[:2] for item in fitting)
    alike = [weights for *score, weights in fitting if tuple(score) == best]
    places = [{p: (s.name, s.part) for p, s in w.stored.items()} for w in alike]
    if all(place == places[0] for place in places):
        return alike[0].architecture.name
    names = ", ".join(weights.architecture.name for weights in alike)
    raise UsageError(
        f"{base.source}: {names} explain both checkpoints alike, and place their tensors "
        "differently. Pass --architecture."
    )


def _misfits(weights: BaseWeights) -> int:
    """How many weights have shapes the family does not have."""
    count = 0
    for name, stored in weights.stored.items():
        component, _, inner = name.partition(":")
        shape = stored.shape
        if inner.endswith(".weight") and len(shape) > 1:
            module = inner.removesuffix(".weight")
            fit = weights.architecture.misfit(component, module, shape[0], shape[1])
            count += fit is not None
    return count


def changes_between(
    tuned: BaseWeights,
    base: BaseWeights,
    selection: Selection,
    *,
    compare: bool = True,
    progress: Progress | None = None,
) -> Changes:
    """Every module of TUNED that differs from BASE.

    compare: False takes every pair as differing, from the headers alone.

    UnsupportedError naming the tensors that differ and that no adapter could hold (quantized,
    integer, parameters outside modules, only on one side), unless `selection` leaves them out.
    """
    result = Changes()
    problems: list[tuple[str, str]] = []
    differences: list[Difference] = []
    pairs = _with_tying(tuned, base, result)
    tabled = {stored.name for stored in tuned.stored.values()}
    bare = [f":{name}" for name in tuned.checkpoint if name not in tabled]
    selection.check([*(name.rpartition(".")[0] or name for name, _, _ in pairs), *bare])
    components = {name.partition(":")[0] for name in base.stored}
    seen: set[str] = set()
    absent: set[str] = set()
    for name, mine, other in pairs:
        if is_marker(mine.name):
            continue
        module, _, parameter = name.rpartition(".")
        if not selection.takes(module or name):
            result.left_out.append(name)
            seen.update((mine.name, *([other.name] if other else ())))
            continue
        if other is None:
            if name.partition(":")[0] not in components:
                absent.add(name.partition(":")[0])
            elif mine.tensor.dtype not in INTEGERS:
                problems.append((name, "BASE has no such tensor"))
            continue
        seen.update((mine.name, other.name))
        result.compared += 1
        kinds = {mine.tensor.dtype, other.tensor.dtype}
        if kinds - FLOATS.keys():
            if not compare or same_stored(mine.tensor, other.tensor):
                result.unchanged += 1
            else:
                problems.append((name, f"stored as {' and '.join(sorted(kinds))}"))
            continue
        differences.append(Difference(name, mine, other))
    _untabled(tuned, base, selection, seen, problems, result)
    for component in sorted(absent):
        note = f"BASE has no {component}: what TUNED has of it is not looked at"
        result.findings.append(Finding("info", "only-in-tuned", note, component))
    same = _compared(differences, (tuned.checkpoint, base.checkpoint), compare, progress)
    for difference, equal in zip(differences, same, strict=True):
        module, _, parameter = difference.name.rpartition(".")
        if parameter not in ("weight", "bias"):
            if not equal and compare:
                problems.append((difference.name, "a parameter outside any layer"))
            result.unchanged += equal
            continue
        change = result.modules.setdefault(module, Change(module))
        (change.unchanged if equal else change.differing)[parameter] = difference
        result.unchanged += equal
    result.modules = {p: c for p, c in result.modules.items() if c.differing}
    if problems:
        shown = "\n  ".join(f"{name}: {why}" for name, why in problems[:LISTED])
        more = f"\n  … and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise UnsupportedError(
            f"{len(problems)} tensors differ and have no place in an adapter:\n  {shown}{more}\n"
            "--exclude PATTERN leaves them out on request."
        )
    return result


def _with_tying(
    tuned: BaseWeights, base: BaseWeights, result: Changes
) -> list[tuple[str, Stored, Stored | None]]:
    """The pairs, with a head that is the embedding on either side looked up there."""
    pairs = list(paired(tuned, base))
    if tuned.checkpoint.kind == "pipeline" or tuned.architecture.name not in OPEN:
        return pairs
    mine, other = tied_pair(tuned.checkpoint), tied_pair(base.checkpoint)
    if mine is None and other is None:
        return pairs
    pair = mine or other
    assert pair is not None
    component = next(iter(tuned.stored)).partition(":")[0]
    embedding, head = (f"{component}:{name}" for name in (pair.embedding, pair.head))
    rest = [item for item in pairs if item[0] != f"{head}.weight"]
    if mine is not None and other is not None:
        result.tied[embedding] = head
        return rest
    tuned_head = tuned.find(embedding if mine is not None else head)
    base_head = base.find(embedding if other is not None else head)
    if tuned_head is not None:
        rest.append((f"{head}.weight", tuned_head, base_head))
    return rest


def _compared(
    differences: Sequence[Difference],
    checkpoints: Sequence[Checkpoint],
    compare: bool,
    progress: Progress | None,
) -> list[bool]:
    if not compare:
        return [False] * len(differences)

    alike = StoredAlike()

    def same(difference: Difference) -> bool:
        equal = not difference.grown and (_stored_alike(difference, alike) or difference.same())
        for checkpoint in checkpoints:
            checkpoint.release()
        return equal

    found: list[bool] = []
    with workers(2) as threads:
        for equal in threads.map(same, differences):
            if progress is not None:
                progress(len(found), len(differences), "comparing")
            found.append(equal)
    return found


def _stored_alike(difference: Difference, alike: StoredAlike) -> bool:
    """Whether the two are the same rows of packed weights with the same bytes."""
    tuned, base = difference.tuned, difference.base
    if (tuned.site.operator, tuned.lead, tuned.rows) != (base.site.operator, base.lead, base.rows):
        return False
    return alike((tuned.name, base.name), tuned.tensor, base.tensor)


def _untabled(
    tuned: BaseWeights,
    base: BaseWeights,
    selection: Selection,
    seen: set[str],
    problems: list[tuple[str, str]],
    result: Changes,
) -> None:
    """Tensors that no table knows: equal under one name, or not compared, or a problem."""
    known = {stored.name for stored in tuned.stored.values()}
    unseen = 0
    for name, tensor in tuned.checkpoint.items():
        if name in known:
            continue
        other = base.checkpoint.get(name)
        if other is None or selection.only:
            unseen += 1
        elif same_stored(tensor, other):
            result.unchanged += 1
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in selection.exclude):
            result.left_out.append(name)
        else:
            problems.append((name, f"{tuned.architecture.title} has no module of that name"))
    if unseen:
        note = f"{unseen} tensors of TUNED have names no table knows and no namesake in BASE"
        result.findings.append(Finding("info", "not-compared", note))
    homes = {name.partition(":")[0] for name in tuned.stored}
    wanted = set(result.tied.values())
    missing = [
        home
        for home, stored in base.stored.items()
        if stored.name not in seen
        and not is_marker(stored.name)
        and home.partition(":")[0] in homes
        and stored.tensor.dtype in FLOATS
        and home.removesuffix(".weight") not in wanted
        and selection.takes(home.rpartition(".")[0])
    ]
    if missing:
        message = f"{len(missing)} tensors of BASE are not in TUNED; an adapter leaves them be"
        result.findings.append(Finding("warning", "only-in-base", message, missing[0]))
