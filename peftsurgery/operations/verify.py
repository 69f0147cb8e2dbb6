"""verify: is a merged checkpoint, whoever wrote it, really base + adapters?

    F = round(W + Δ) to a unit in the last place, for every touched tensor
    F = round(W) for all others

where F is packed, to the step of its grid (`comparing_packed`).

The plan and the arithmetic are those of `merge`; only what counts as equal is wider, because other
tools round more often. Tensors are found by their stored name, or through the architecture's table
where the file uses another vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftsurgery.adapter import Adapter
from peftsurgery.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from peftsurgery.errors import Finding, UnsupportedError
from peftsurgery.operations.apply import Renderer, Settings, spans
from peftsurgery.operations.comparing import MANTISSA, Comparison, compare
from peftsurgery.operations.comparing_packed import (
    PackedComparison,
    compare_packed,
    compare_untouched,
)
from peftsurgery.operations.diagnosis import Factors, explain, factors, some, with_adapters
from peftsurgery.operations.facing import Facing, Found, leftovers
from peftsurgery.operations.inputs import Inputs, open_inputs
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.packed_sides import format_of, formats
from peftsurgery.operations.plan import Target
from peftsurgery.operations.strengths import Strength
from peftsurgery.quantizers import logical
from peftsurgery.quantizers.awq import AWQ
from peftsurgery.reports import Progress, Report, Row

NEGLIGIBLE = 0.01  # of ||Δ||²; so much may stay undecided beside a clear yes


@dataclass(frozen=True)
class VerifyReport(Report):
    """Report of a verification. `answer` is "yes", "no" or "undecided"; the exit code 0, 1 or 3.

    strengths: adapter -> the strength its change is found with, over all modules that are not as
    asked.
    """

    answer: str = "undecided"
    strengths: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 yes, 1 no, 3 it cannot be decided."""
        return {"yes": 0, "no": 1}.get(self.answer, 3)


def verify(
    merged: str | Path,
    base: str | Path,
    adapters: Sequence[tuple[str | Path | Adapter, float | Strength]],
    *,
    architecture: str | None = None,
    relative_to: str = "current",
    tied: str = "both",
    residual_base: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Say whether `merged` is `base` with `adapters` (source, strength) merged in that order.

    `merged` may have another number type, sharding or vocabulary than `base`. Every touched tensor
    is computed again and compared to one unit in the last place of its number type, and its
    effective strength is estimated; every other tensor must be the base's, rounded to the number
    type of the file. tied, residual_base: as the merge is said to have been done, see `merge`; what
    loaders do to a tied embedding is "both".

    Packed weights are seen as what they stand for. Where `merged` is packed, a touched weight must
    lie within the steps of its grid, however it was rounded, and have the strength asked for as far
    as that can be measured; one that is not touched must have the base's bytes where both are of
    one format.

    Raises UnsupportedError for a packed format that is not known, and what opening and placing
    raise; a "no" is no error.
    """
    inputs = open_inputs(
        base,
        adapters,
        architecture=architecture,
        tied_weights=tied,
        residual_base=residual_base,
        allow_pickle=allow_pickle,
    )
    checkpoint = logical(open_checkpoint(merged, allow_pickle=allow_pickle))
    refuse_pending(checkpoint)
    _refuse_scaled(checkpoint, inputs.base.checkpoint)
    report = VerifyReport("verify")
    report.findings.extend(inputs.findings)
    for adapter, _ in inputs.adapters:
        report.findings.extend(adapter.findings)
    check = _Check(inputs, relative_to, Facing(inputs.base, checkpoint), report)
    check.run(progress)
    check.conclude()
    return report


def _refuse_scaled(merged: Checkpoint, base: Checkpoint) -> None:
    """UnsupportedError for AWQ on one side only: it multiplies the inputs of the weights by what it
    takes from the layers before them, so that neither is base + adapters by itself.
    """
    if (AWQ.title in formats(merged)) != (AWQ.title in formats(base)):
        raise UnsupportedError(
            f"{merged.source}: only one of it and {base.source} is packed by {AWQ.title}, which "
            "also scales the inputs of its weights; whether it is base + adapters cannot be "
            "decided. Verify the file it was made from."
        )


class _Check:
    """One verification: fills the report tensor by tensor."""

    def __init__(
        self, inputs: Inputs, relative_to: str, facing: Facing, report: VerifyReport
    ) -> None:
        self.inputs = inputs
        self.relative_to = relative_to
        self.facing = facing
        self.report = report
        self.results: dict[str, Comparison] = {}
        self.changed: list[str] = []  # untouched tensors that are not the base's
        self.missing: list[str] = []
        self.wrong_shape: dict[str, str] = {}
        self.undecidable: dict[str, str] = {}  # stored in a type that cannot be compared
        self.untouched = 0

    def run(self, progress: Progress | None) -> None:
        """Compare every tensor of the base."""
        base, done = self.inputs.base.checkpoint, 0
        for name, tensor in base.items():
            target = self.inputs.plan.targets.get(name)
            if target is not None:
                self._touched(target)
            else:
                self._untouched(name)
            done += tensor.nbytes
            if progress is not None:
                progress(done, base.nbytes, name)

    def _touched(self, target: Target) -> None:
        found = self.facing.find(target.name)
        if found is None:
            self.missing.append(target.name)
            return
        if tuple(found.shape) != target.shape and not found.reshapes(target.shape):
            self.wrong_shape[target.name] = f"{list(found.shape)}, expected {list(target.shape)}"
            return
        if found.packed is not None:
            self.results[target.name] = compare_packed(target, found.packed, self.relative_to)
            return
        if found.dtype not in MANTISSA or found.unpacked:
            self.undecidable[target.name] = "packed in parts" if found.unpacked else found.dtype
            return
        settings = Settings(self.relative_to, dtype=found.dtype)
        order = list(dict.fromkeys(edit.adapter for edit in target.edits))
        stages = [
            Renderer(with_adapters(target, order[: count + 1]), settings)
            for count in range(len(order))
        ]
        total = Comparison()
        for start, stop in spans(target):
            results = [stage.exact(start, stop) for stage in stages]
            weights = [results[0][1], *(exact for exact, _ in results)]
            rows = found.rows(start, stop, target.rows)
            total.add(compare(weights, rows, found.dtype))
        self.results[target.name] = total

    def _untouched(self, name: str) -> None:
        tensor = self.inputs.base.checkpoint[name]
        found = self.facing.find(name)
        if found is None:
            self.missing.append(name)
            return
        self.untouched += 1
        if found.holds(tensor):
            return
        if found.unpacked:
            self.undecidable[name] = "packed in parts"
        elif not self._within_steps(found, tensor):
            self.changed.append(name)

    def _within_steps(self, found: Found, base: LazyTensor) -> bool:
        """Whether the base's weight was packed for the file, however it was rounded."""
        if found.packed is None or not found.reshapes(tuple(base.shape)):
            return False
        if format_of(base) == found.packed.format.title:
            return False  # it would have been left as it is
        return compare_untouched(base.torch().float(), found.packed).verdict == "yes"

    # the answer -----------------------------------------------------------------------------------

    def conclude(self) -> None:
        """The rows, the findings and the answer."""
        wanted = {name: self._asked(t) for name, t in self.inputs.plan.targets.items()}
        for name, result in self.results.items():
            self.report.modules.append(self._row(name, result, wanted[name]))
        missing, unseen, extra = leftovers(self.facing, self.missing, set(wanted))
        self._find("missing", missing, "is not in the merged checkpoint")
        self._find("changed", self.changed, "is not touched by the adapters, yet not the base's")
        self._find("shape", list(self.wrong_shape), "has another shape", self.wrong_shape)
        self._find("extra", extra, "is not explained by base and adapters")
        if unseen:
            self._note(
                "not-compared",
                f"{len(unseen)} tensors have no counterpart to compare: {some(unseen)}",
            )
        wrong = [name for name, result in self.results.items() if result.verdict == "no"]
        open_ = [name for name, result in self.results.items() if result.verdict == "undecided"]
        open_ += list(self.undecidable)
        far = self._far(wrong)
        self._find("far", list(far), "is further from base + adapters than any rounding", far)
        self._explain(wrong, wanted)
        if missing or self.changed or self.wrong_shape or extra or wrong:
            answer = "no"
        else:
            answer = self._weigh(open_)
        object.__setattr__(self.report, "answer", answer)
        object.__setattr__(self.report, "ok", answer == "yes")
        self._summarise(answer, wrong, open_)

    def _far(self, wrong: Sequence[str]) -> dict[str, str]:
        """How far wrong packed weights lie off, in words."""
        results = ((name, self.results[name]) for name in wrong)
        return {
            name: f"{result.wrong} of {result.elements} values by more than a step of its grid, up "
            f"to {result.worst:.3g} steps"
            for name, result in results
            if isinstance(result, PackedComparison) and result.far
        }

    def _weigh(self, undecided: list[str]) -> str:
        """Yes when everything is exact, or all but a negligible part of the change is clearly
        there.
        """
        clear = [r for r in self.results.values() if r.verdict == "yes" and r.total > 0]
        vague = [self.results[name] for name in undecided if name in self.results]
        if not self.undecidable and self._together(vague):
            return "yes"
        if not clear:
            left = self._survival(vague)
            self._note(
                "nothing-decides",
                "rounding leaves too little of the change to tell whether it is there" + left,
            )
            return "undecided"
        if self.undecidable:
            self._note(
                "not-comparable",
                f"stored in a type that cannot be compared: {some(list(self.undecidable))}",
            )
            return "undecided"
        if all(result.differing == 0 for result in vague):
            return "yes"
        share = sum(r.total for r in vague) / sum(r.total for r in (*vague, *clear))
        if share <= NEGLIGIBLE:
            return "yes"
        self._note(
            "too-little",
            f"too little is left of the change of {len(undecided)} tensors to tell: "
            f"{some(undecided)}",
        )
        return "undecided"

    def _together(self, vague: Sequence[Comparison]) -> bool:
        """Whether packed weights that are too vague one by one say yes as a whole."""
        total = PackedComparison()
        for result in vague:
            if not isinstance(result, PackedComparison):
                return False
            total.add(result)
        if len(vague) < 2 or total.total == 0 or total.verdict != "yes":
            return False
        found = f"{total.inner / total.total:.3f} ± {total.uncertainty:.2g} of it"
        message = f"{len(vague)} packed weights tell too little each; together they hold {found}"
        self.report.findings.append(Finding("info", "decided-together", message))
        return True

    def _survival(self, vague: Sequence[Comparison]) -> str:
        """How much of the change of packed weights is left, in words."""
        packed = [result for result in vague if isinstance(result, PackedComparison)]
        size = math.fsum(result.total for result in packed)
        if not size:
            return ""
        share = math.fsum(result.inner for result in packed) / size
        nearest = math.fsum(result.kept for result in packed) / size
        return (
            f"; the packed weights hold {share:.1%} of it, and rounding to their nearest values "
            f"leaves {nearest:.1%}"
        )

    def _asked(self, target: Target) -> dict[int, float]:
        """Adapter -> the strength its change of this tensor was asked for with (the first, where
        they differ).
        """
        asked: dict[int, float] = {}
        for edit in target.edits:
            asked.setdefault(edit.adapter, edit.strength)
        return asked

    def _row(self, name: str, result: Comparison, asked: dict[int, float]) -> Row:
        factor = result.strength
        only = next(iter(asked.values())) if len(asked) == 1 else 1.0
        return {
            "tensor": name,
            "verdict": result.verdict,
            "strength": only if len(asked) == 1 else None,
            "estimated strength": factor * only if factor is not None else None,
            "uncertainty": result.uncertainty * abs(only) if result.total > 0 else None,
            "differing elements": result.differing / max(1, result.elements),
            "worst error": result.worst,
            "unexplained": result.unexplained if math.isfinite(result.unexplained) else None,
            "survival of ΔW": result.survival,
        }

    def _explain(self, wrong: list[str], asked: dict[str, dict[int, float]]) -> None:
        readings: dict[str, Factors | None] = {}
        for name in wrong:
            found = self.facing.find(name)
            assert found is not None
            target = self.inputs.plan.targets[name]
            readings[name] = factors(target, self.results[name], found, self.relative_to)
        findings, strengths = explain(readings, asked, self.inputs.names)
        self.report.findings.extend(findings)
        self.report.strengths.update(strengths)

    def _summarise(self, answer: str, wrong: list[str], undecided: list[str]) -> None:
        total = Comparison()
        for result in self.results.values():
            total.add(result)
        words = {"yes": "yes", "no": "no", "undecided": "cannot be decided"}
        self.report.summary.update(
            {
                "merged": self.facing.merged.source,
                "base": self.inputs.base.checkpoint.source,
                "adapters": ", ".join(
                    f"{Path(n).name}={s}"
                    for n, (_, s) in zip(self.inputs.names, self.inputs.adapters, strict=True)
                ),
                "is base + adapters": words[answer],
                "number types": ", ".join(self.facing.dtypes),
                "tensors touched": len(self.inputs.plan.targets),
                "of them wrong": len(wrong) + len(self.wrong_shape),
                "of them undecided": len(undecided),
                "tensors untouched and equal": self.untouched - len(self.changed),
                "elements that differ from the nearest rounding": total.differing
                / max(1, total.elements),
            }
        )

    def _find(
        self, code: str, names: list[str], what: str, details: dict[str, str] | None = None
    ) -> None:
        for name in names[:16]:
            detail = f": {details[name]}" if details else ""
            self.report.findings.append(Finding("error", code, what + detail, name))
        if len(names) > 16:
            self._error(code, f"… and {len(names) - 16} more")

    def _error(self, code: str, message: str) -> None:
        self.report.findings.append(Finding("error", code, message))

    def _note(self, code: str, message: str) -> None:
        self.report.findings.append(Finding("warning", code, message))
