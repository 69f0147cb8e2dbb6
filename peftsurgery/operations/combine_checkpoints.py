"""combine on whole checkpoints: fine-tunes as changes of a base, streamed into its own files.

    W = W_base + method(W_1 - W_base … W_n - W_base)

Tensors meet under their stored names. Memory is a few row tiles; element-wise methods that need a
threshold read a tensor before they write it. Methods on singular vectors hold the changes of two
tensors whole, in fp64, and take their SVDs: minutes for each GB of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from peftsurgery import __version__
from peftsurgery.checkpoint import (
    Checkpoint,
    Deferred,
    LazyTensor,
    open_checkpoint,
    save,
    serialized_header,
)
from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.codec.files import publish
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError, nearest
from peftsurgery.merge_methods import Chosen, Method, Spectral
from peftsurgery.merge_methods.base import TileFunction
from peftsurgery.operations.combine_tensors import Job, rows_of
from peftsurgery.operations.inputs import DENSE
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.lineage import Hashing
from peftsurgery.operations.merge import check_output
from peftsurgery.operations.packed_sides import format_of, same_stored
from peftsurgery.operations.rounding import Survival
from peftsurgery.operations.side_files import copy_side_files
from peftsurgery.operations.staging import staged_beside, workers
from peftsurgery.operations.strengths import Strength, check_used
from peftsurgery.quantizers import logical
from peftsurgery.reports import Progress, Report

DTYPES = {"keep": None, "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
AHEAD = 4  # tiles, and prepared tensors, under way
ReportType = TypeVar("ReportType", bound=Report)


def combine_checkpoints(
    report: ReportType,
    tuned: Sequence[Checkpoint],
    strengths: Sequence[Strength],
    dst: Path,
    *,
    base: str | Path | None,
    method: Method,
    options: Chosen,
    seed: int,
    dtype: str,
    overwrite: bool,
    dry_run: bool,
    allow_pickle: bool,
    progress: Progress | None,
) -> ReportType:
    """Combine fine-tunes of `base` into a checkpoint with the base's files, names and side files.

    UsageError when a tensor is missing, unknown or of another shape somewhere; UnsupportedError for
    quantized tensors; CheckFailed when what was written is not what was
    computed. Nothing is left at `dst` then.
    """
    if base is None:
        raise UsageError(
            f"{tuned[0].source}: is a whole checkpoint. Pass --base BASE, the checkpoint it was "
            "tuned from."
        )
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: checkpoints are written as {', '.join(DTYPES)}.")
    origin = open_checkpoint(base, allow_pickle=allow_pickle)
    refuse_pending(origin)
    check_output(origin, dst, overwrite)
    _refuse_packed(origin, tuned)
    for checkpoint, strength in zip(tuned, strengths, strict=True):
        if dst.resolve() in {p.resolve() for p in (*checkpoint.files, checkpoint.path)}:
            raise UsageError(f"{dst}: is an input. Give another output path.")
        _check_same(origin, checkpoint)
        check_used(strength, list(origin), "", checkpoint.source)
    job = Job(origin, tuned, strengths, method, options, seed, DTYPES[dtype])
    floats = [name for name in origin if origin[name].dtype in DENSE]
    report.summary.update(
        {
            "base": origin.source,
            "checkpoints": " ".join(
                f"{Path(c.source).name}={s}" for c, s in zip(tuned, strengths, strict=True)
            ),
            "method": method.name,
            **{f"option {name}": value for name, value in options.values.items()},
            **({"seed": seed} if method.random else {}),
            "tensors": len(origin),
            "bytes": origin.nbytes,
        }
    )
    if dry_run:
        report.summary["tensors combined"] = len(floats)
        report.summary["written"] = "nothing (--dry-run)"
        return report
    hashes = [Hashing(checkpoint, enabled=True) for checkpoint in (origin, *tuned)]
    folder = origin.path.is_dir() or origin.kind == "sharded"
    with staged_beside(dst, folder=folder) as staged:
        _write(job, staged, progress)
        problems = _differences(job, staged)
        if problems:
            raise CheckFailed(
                f"the written checkpoint is not what was computed: {len(problems)} tensors differ, "
                f"first {problems[0]!r}. Nothing was kept."
            )
        report.summary["tensors changed"] = job.touched
        report.summary["survival of the change"] = job.survival.share
        report.summary["check"] = "reopened: one tile of every tensor recomputed, bytes equal"
        report.outputs.extend(str(path) for path in publish(staged, dst, overwrite=overwrite))
    for hashing in hashes:
        report.inputs.update(hashing.result())
    return report


# checks -------------------------------------------------------------------------------------------


def _refuse_packed(base: Checkpoint, tuned: Sequence[Checkpoint]) -> None:
    """UnsupportedError for a packed weight that is not stored alike everywhere."""
    sides = [logical(checkpoint) for checkpoint in (base, *tuned)]
    for side in sides:
        for name, tensor in side.items():
            title = format_of(tensor)
            if title is None:
                continue
            alike = (other.get(name) for other in sides)
            if not all(other is not None and same_stored(tensor, other) for other in alike):
                raise UnsupportedError(
                    f"{side.source}: {name!r} is packed ({title}) and not the same everywhere; "
                    "checkpoints are combined unpacked. Run peftsurgery dequantize on every packed "
                    "one first, and peftsurgery quantize on the result."
                )


def _check_same(base: Checkpoint, tuned: Checkpoint) -> None:
    """UsageError unless both hold the same tensors; integers must be equal."""
    for one, other in ((base, tuned), (tuned, base)):
        missing = [name for name in one if name not in other]
        if missing:
            close = nearest(missing[0], other, n=1)
            hint = f" (closest: {close[0]!r})" if close else ""
            raise UsageError(
                f"{other.source}: has no tensor {missing[0]!r}{hint}, and {one.source} has "
                f"({len(missing)} such tensors). Both must be of one model in one naming; convert "
                "one of them first."
            )
    for name, tensor in base.items():
        found = tuned[name]
        if tuple(found.shape) != tuple(tensor.shape):
            raise UsageError(
                f"{tuned.source}: {name!r} has shape {list(found.shape)}, the base "
                f"{list(tensor.shape)}; they have no difference."
            )
        if tensor.dtype in DENSE and found.dtype in DENSE:
            continue
        if found.dtype != tensor.dtype or not np.array_equal(_bytes(found), _bytes(tensor)):
            raise UnsupportedError(
                f"{tuned.source}: {name!r} is {found.dtype} and differs from the base's "
                f"({tensor.dtype}); only fp64, fp32, fp16 and bf16 tensors can be combined."
            )


# writing ------------------------------------------------------------------------------------------


class Feed:
    """The tensors of one file in the order `save` asks for them: each is prepared while earlier
    ones are written, and its tiles are computed a few ahead.
    """

    def __init__(self, job: Job, order: Sequence[str], pool: ThreadPoolExecutor) -> None:
        self.job = job
        self.pool = pool
        self._ahead = 2 if isinstance(job.method, Spectral) else AHEAD
        self._waiting = deque(order)
        self._prepared: deque[tuple[str, Future[TileFunction]]] = deque()

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Rows of one tensor of the result, in order."""
        while self._waiting and len(self._prepared) < self._ahead:
            following = self._waiting.popleft()
            self._prepared.append((following, self.pool.submit(self.job.prepare, following)))
        asked, prepared = self._prepared.popleft()
        if asked != name:
            raise RuntimeError(f"{name!r} was asked for where {asked!r} was expected")
        tile = prepared.result()
        self.job.ready[name] = tile
        changed = Survival()
        running: deque[Future[tuple[Tensor, Survival]]] = deque()
        spans = list(self.job.stack(name).spans())
        for index, (start, stop) in enumerate(spans):
            running.append(self.pool.submit(self._rows, name, tile, start, stop))
            while running and (len(running) >= AHEAD or index == len(spans) - 1):
                written, survival = running.popleft().result()
                changed.add(survival)
                yield written
        self.job.settle(name)
        self.job.touched += changed.total > 0
        self.job.survival.add(changed)

    def _rows(
        self, name: str, tile: TileFunction, start: int, stop: int
    ) -> tuple[Tensor, Survival]:
        return self.job.written(name, tile(start, stop), start, stop)


def _write(job: Job, staged: Path, progress: Progress | None) -> None:
    base = job.base
    root = base.path if base.path.is_dir() else base.path.parent
    files: dict[Path, list[str]] = {path: [] for path in base.files}
    for name in base:
        files[base[name].path].append(name)
    done = 0

    def pulled(feed: Feed, name: str) -> Iterator[Tensor]:
        nonlocal done
        yield from feed.chunks(name)
        done += base[name].nbytes
        for checkpoint in (base, *job.tuned):
            checkpoint.release()
        if progress is not None:
            progress(done, base.nbytes, name)

    with workers() as pool:
        for path, names in files.items():
            place = staged / path.relative_to(root) if staged.is_dir() else staged
            place.parent.mkdir(parents=True, exist_ok=True)
            outlines = {base[name].name: _outline(job, base[name]) for name in names}
            by_stored = {base[name].name: name for name in names}
            order = [by_stored[stored] for stored in serialized_header(outlines)[1]]
            floats = [name for name in order if base[name].dtype in DENSE]
            feed = Feed(job, floats, pool)
            tensors: dict[str, LazyTensor | Deferred] = {}
            for name in names:
                tensor = base[name]
                tensors[tensor.name] = tensor
                if tensor.dtype in DENSE:
                    outline = _outline(job, tensor)
                    pull = partial(pulled, feed, name)
                    tensors[tensor.name] = Deferred(
                        outline.dtype, outline.shape, pull, (tensor.path,)
                    )
            save(place, tensors, _metadata(job))
    if staged.is_dir():
        copy_side_files(base, staged, dtype=job.dtype)


def _outline(job: Job, tensor: LazyTensor) -> Deferred:
    return Deferred(job.output_dtype(tensor), tuple(tensor.shape), lambda: iter(()))


def _metadata(job: Job) -> dict[str, str]:
    base = job.base
    known = dict(base.metadata) if len(base.files) == 1 else {"format": "pt"}
    options: Mapping[str, object] = {
        "method": job.method.name,
        **job.options.values,
        **({"seed": job.seed} if job.method.random else {}),
    }
    known["peftsurgery.operation"] = "combine"
    known["peftsurgery.version"] = __version__
    known["peftsurgery.checkpoints"] = " ".join(
        f"{Path(c.source).name}={s}" for c, s in zip(job.tuned, job.strengths, strict=True)
    )
    known["peftsurgery.options"] = " ".join(f"{k}={v}" for k, v in options.items())
    return known


# the proof ----------------------------------------------------------------------------------------


def _differences(job: Job, staged: Path) -> list[str]:
    """Tensors of what was written that are not what was computed: the middle tile of each."""
    entry = staged / job.base.path.name if staged.is_dir() and job.base.path.is_file() else staged
    again = open_checkpoint(entry)

    def wrong(name: str) -> bool:
        tensor, found = job.base[name], again[name]
        if tensor.dtype not in DENSE:
            return not np.array_equal(_bytes(tensor), _bytes(found))
        if (found.dtype, tuple(found.shape)) != (job.output_dtype(tensor), tuple(tensor.shape)):
            return True
        start, stop = job.middle(name)
        expected, _ = job.written(name, job.ready[name](start, stop), start, stop)
        got = rows_of(found, start, stop)
        return not np.array_equal(
            np.frombuffer(as_bytes(expected), np.uint8),
            np.frombuffer(as_bytes(got.contiguous()), np.uint8),
        )

    names = sorted(set(job.base) | set(again))
    if set(job.base) != set(again):
        return sorted(set(job.base) ^ set(again))
    with workers() as pool:
        return [n for n, bad in zip(names, pool.map(wrong, names), strict=True) if bad]


def _bytes(tensor: LazyTensor) -> np.ndarray:
    return np.frombuffer(tensor.read(), np.uint8)
