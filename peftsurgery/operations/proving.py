"""The proof of a conversion: the file is opened again, decoded, and every module compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from peftsurgery.adapter import Adapter, is_group
from peftsurgery.algorithms import WeightAdapter, difference
from peftsurgery.codec import decode, open_adapter
from peftsurgery.codec.keys import is_unknown
from peftsurgery.errors import CheckFailed
from peftsurgery.operations.staging import workers
from peftsurgery.reports import Progress, Report
from peftsurgery.reports.base import Row

BATCH = 32  # tensors or modules; then the pages they were read from are given back
BACKWARD_SAFE = (
    4.0  # a product of two rounded factors and a folded scale moves by a few units of roundoff
)


def prove(
    report: Report,
    adapter: Adapter,
    dst: Path,
    details: Mapping[str, Row],
    progress: Progress | None,
    release: Callable[[], None] | None = None,
) -> float:
    """Reopen and decode `dst`, compare every module with `adapter`; returns the largest relative
    error. Rows of the report end with the columns of `details`. release: gives back what was read
    of `adapter`, where it lies in a file.
    """
    known = {c: list(adapter.of(c)) for c in adapter.components}
    written = open_adapter(dst)
    keep = any(is_unknown(key) for key in adapter.extras)
    again = decode(
        written, architecture=adapter.architecture, known=_plain(known), keep_unknown=keep
    )
    worst, worst_path = 0.0, ""
    over: list[str] = []
    modules = list(adapter.modules.items())
    pairs = [(module, again.modules.pop(path, None)) for path, module in modules]
    batches = [pairs[n : n + BATCH] for n in range(0, len(pairs), BATCH)]

    def changes(batch: Sequence[tuple[WeightAdapter, WeightAdapter | None]]) -> list[float]:
        found = _changes(batch)
        written.release()
        if release is not None:
            release()
        return found

    with workers(4) as threads:
        errors = (error for found in threads.map(changes, batches) for error in found)
        for done, ((path, module), (_, back)) in enumerate(zip(modules, pairs, strict=True)):
            if progress is not None:
                progress(done, len(modules), path)
            error = next(errors)
            if not error <= _roundoff(module, back):
                over.append(path)
            if error > worst or error != error:
                worst, worst_path = error, path
            row: Row = {
                "module": path,
                "algorithm": module.algorithm,
                "rank": module.rank,
                "scale": float(module.scale),
                "error": error,
            }
            report.modules.append(row | details.get(path, {}))
    extra = [p for p, m in again.modules.items() if not m.is_zero()]
    missing = [
        key
        for key, tensor in adapter.extras.items()
        if key != "lora_controlnet" and not _carried_alike(tensor, again.extras.get(key))
    ]
    if over or extra or missing:
        raise CheckFailed(_failure(over, extra, missing, worst, worst_path))
    report.summary["check"] = f"reopened, decoded and compared: {len(modules)} modules agree"
    return worst


def _carried_alike(tensor: torch.Tensor, found: torch.Tensor | None) -> bool:
    """Whether a carried tensor has the bytes it had, or those of the dtype it was cast to."""
    if found is None or found.shape != tensor.shape:
        return False
    one, other = (t.contiguous().reshape(-1) for t in (tensor.to(found.dtype), found))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _changes(pairs: Sequence[tuple[WeightAdapter, WeightAdapter | None]]) -> list[float]:
    """The relative change of each module; a module that was not written counts as zero."""
    return [
        difference(module, back)
        if back is not None
        else (0.0 if module.is_zero() else float("inf"))
        for module, back in pairs
    ]


def _plain(known: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {c: [p for p in paths if not is_group(p)] for c, paths in known.items()}


def _roundoff(module: WeightAdapter, back: WeightAdapter | None) -> float:
    """What rounding to the coarser of the two dtypes may move ΔW, relatively."""
    tensors = [*module.tensors().values(), *(back.tensors().values() if back is not None else ())]
    return BACKWARD_SAFE * max(torch.finfo(t.dtype).eps for t in tensors)


def _failure(
    over: Sequence[str],
    extra: Sequence[str],
    missing: Sequence[str],
    worst: float,
    worst_path: str,
) -> str:
    reasons = []
    if over:
        reasons.append(
            f"ΔW of {len(over)} modules moved by more than the dtype's rounding, worst "
            f"{worst_path!r} by {worst:.3g}"
        )
    if extra:
        reasons.append(
            f"{len(extra)} modules appeared that the source does not have, first {extra[0]!r}"
        )
    if missing:
        reasons.append(
            f"{len(missing)} carried tensors are missing or changed, first {missing[0]!r}"
        )
    return (
        f"the written file does not read back as the source: {'; '.join(reasons)}. Nothing was "
        "kept. A wider --dtype (fp32) keeps more."
    )
