"""The proof of an extraction: the file is read again, and BASE + adapter held against TUNED."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter, is_group, members
from peftsurgery.algorithms import Replace, WeightAdapter
from peftsurgery.checkpoint import Checkpoint
from peftsurgery.codec import decode, open_adapter
from peftsurgery.errors import CheckFailed
from peftsurgery.linalg.krylov import square
from peftsurgery.operations.changes import Change
from peftsurgery.operations.differences import Difference
from peftsurgery.operations.projecting import Job, Projected
from peftsurgery.operations.staging import workers
from peftsurgery.reports import Progress

SLACK = 1e-3  # by which the measured error may pass the stated one, relatively
SUMS = 1e-6  # of ||TUNED - BASE||²: what the fp32 sums behind the stated error cannot tell
ROUNDINGS = 4.0  # units of roundoff of the written factors that ΔW may move by


@dataclass(frozen=True)
class Fidelity:
    """One module of the written file against TUNED - BASE: weight and bias together."""

    path: str
    norm: float  # ||TUNED - BASE||_F
    error: float  # ||TUNED - BASE - ΔW||_F

    @property
    def loss(self) -> float:
        """error / norm."""
        return self.error / self.norm if self.norm > 0 else 0.0

    @property
    def energy(self) -> float:
        """1 - loss²."""
        return 1 - self.loss**2


def measured(
    staged: Path,
    adapter: Adapter,
    jobs: Sequence[Job],
    projected: Sequence[Projected],
    checkpoints: Sequence[Checkpoint],
    progress: Progress | None,
) -> list[Fidelity]:
    """How far BASE + the adapter in `staged` is from TUNED, module by module, from row tiles.

    CheckFailed naming the modules that are further than the projection said.
    """
    known = {c: [p for p in adapter.of(c) if not is_group(p)] for c in adapter.components}
    written = open_adapter(staged)
    again = decode(written, architecture=adapter.architecture, known=known)

    def one(pair: tuple[Job, Projected]) -> list[Fidelity]:
        job, made = pair
        found = [
            _against(path, again.modules[path], _changes_of(path, job)) for path in made.modules
        ]
        for checkpoint in checkpoints:
            checkpoint.release()
        return found

    result: list[Fidelity] = []
    over: list[str] = []
    with workers(2) as threads:
        pairs = list(zip(jobs, projected, strict=True))
        for done, ((job, made), found) in enumerate(
            zip(pairs, threads.map(one, pairs), strict=True)
        ):
            if progress is not None:
                progress(done, len(jobs), "against TUNED")
            result += found
            over += _worse(job, made, found)
    if over:
        raise CheckFailed(
            f"{len(over)} modules of the written file are further from TUNED than the projection: "
            f"{'; '.join(over[:3])}. Nothing was kept. A wider --dtype (fp32) keeps more."
        )
    return result


def _changes_of(path: str, job: Job) -> list[Change | int]:
    """The changes behind one written module, in row order."""
    if path in (job.path, job.also):
        return list(job.changes)
    component = job.path.partition(":")[0]
    names = [f"{component}:{name}" for name in members(job.path.partition(":")[2])]
    return [job.changes[names.index(path)]]


def _against(path: str, module: WeightAdapter, changes: Sequence[Change | int]) -> Fidelity:
    norm = error = 0.0
    row = 0
    for change in changes:
        if isinstance(change, int):
            gone = module.tile(row, row + change)
            error += float(torch.linalg.vector_norm(gone, dtype=torch.float64)) ** 2
            row += change
            continue
        for parameter, difference in change.differing.items():
            one, two = _gap(module, parameter, difference, row)
            norm, error = norm + one, error + two
        if "weight" in change.known:
            row += change.known["weight"].matrix_shape[0]
    return Fidelity(path, math.sqrt(norm), math.sqrt(error))


def _gap(
    module: WeightAdapter, parameter: str, difference: Difference, row: int
) -> tuple[float, float]:
    """(||TUNED - BASE||², ||TUNED - BASE - ΔW||²) of one parameter."""
    if isinstance(module, Replace):
        value = module.tensors().get(parameter)
        wanted = difference.tuned.load().float()
        gap = wanted if value is None else wanted - value.float().reshape(wanted.shape)
        before = wanted if difference.grown else difference.dense()
        return _square(before), _square(gap)
    if parameter == "bias":
        change = difference.dense().flatten()
        held = module.bias
        gap = change if held is None else change - held.float()[row : row + change.numel()]
        return _square(change), _square(gap)
    norm = error = 0.0
    for start, tile in difference.tiles():
        norm += square(tile)
        if "diff" in module.fields or module.rank is not None or module.algorithm == "lokr":
            first = row + start
            with torch.no_grad():  # into the memory of the tile, which is not read again
                module.accumulate(tile, first, first + tile.shape[0], -1.0)
        error += square(tile)
    return norm, error


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)) ** 2


def _worse(job: Job, made: Projected, found: Sequence[Fidelity]) -> list[str]:
    """What is further from TUNED than stated by more than the rounding of what was written."""
    kinds = {t.dtype for module in made.modules.values() for t in module.tensors().values()}
    unit = max(torch.finfo(kind).eps for kind in kinds)
    stated = 0.0
    if made.total is not None and made.kept is not None:
        stated = math.sqrt(max(made.total - made.kept, 0.0))
    copies = 2 if job.also is not None else 1
    error = math.sqrt(math.fsum(item.error**2 for item in found) / copies)
    norm = math.sqrt(math.fsum(item.norm**2 for item in found) / copies)
    size = norm
    if any(isinstance(module, Replace) for module in made.modules.values()):
        size = math.sqrt(
            math.fsum(_square(t) for m in made.modules.values() for t in m.tensors().values())
        )
    limit = math.hypot(stated * (1 + SLACK), math.sqrt(SUMS) * norm) + ROUNDINGS * unit * size
    if error <= limit:
        return []
    return [f"{job.path} by {error / norm if norm else math.inf:.3g}, {stated:.3g} was stated"]
