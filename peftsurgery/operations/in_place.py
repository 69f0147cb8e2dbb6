"""merge --in-place: overwrite the touched tensors of the base itself, under a journal.

Every result is computed from the originals in the journal, never from what stands in the base, so
that a merge killed at any moment is finished by the same command, and rolled back by `unmerge
--in-place`. Header and metadata stay as they are.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.checkpoint.pickles import is_pickle_name
from peftsurgery.checkpoint.writing import as_bytes, sync_folder
from peftsurgery.errors import CheckFailed, Finding, UnsupportedError, UsageError
from peftsurgery.operations.apply import Settings, Survival, alternatives
from peftsurgery.operations.inputs import DENSE, Inputs
from peftsurgery.operations.journal import (
    check_untouched,
    copy_durably,
    journal_path,
    locked,
    overwrite,
    pending,
    ranges_of,
    remove,
    roll_back,
    sweep,
    unfinished,
)
from peftsurgery.operations.merge import merge_words
from peftsurgery.operations.merge_proof import tile_that_differs
from peftsurgery.operations.merge_report import (
    MergeReport,
    describe,
    plan_rows,
    report_survival,
)
from peftsurgery.operations.pipeline import Pipeline
from peftsurgery.operations.plan import Target
from peftsurgery.operations.undo import Merge, Undo, digest_of, read_undo, root_of
from peftsurgery.operations.undo_writing import record_merged, write_undo
from peftsurgery.reports import Progress


def merge_in_place(
    report: MergeReport,
    inputs: Inputs,
    settings: Settings,
    *,
    undo: Path | None,
    replace_undo: bool,
    min_survival: float | None,
    full: bool,
    dry_run: bool,
    progress: Progress | None,
) -> MergeReport:
    """Overwrite the touched tensors of the base; `undo` becomes the journal's name at the end, else
    it is removed.

    A journal that is already there is resumed when it is of this very merge. On any error, and on
    Ctrl-C, the originals are put back before the error is raised. Raises UnsupportedError for a
    merge that changes shapes or number types, and for files that are links; UsageError for a
    journal of another merge.
    """
    base = inputs.base.checkpoint
    check_possible(inputs, settings)
    words = merge_words(inputs, settings, in_place=True)
    describe(report, inputs, settings)
    report.findings.append(
        Finding(
            "info",
            "in-place",
            "header and metadata of the base stay as they are: nothing in the files names the "
            "merge",
        )
    )
    journal = pending(base)
    if journal is not None and not read_undo(journal).merge.same_as(words):
        raise UsageError(
            f"this is another merge ({words.adapters}, {words.options}) than the one begun. "
            + unfinished(base.source, read_undo(journal))
        )
    if journal is None and undo is not None and _is_done(undo, base, words):
        report.summary["written"] = f"nothing: {undo} says that this merge is already complete"
        return report
    if undo is not None and undo.exists() and not (replace_undo or _is_copy(undo, journal)):
        raise UsageError(f"--undo {undo}: exists. Pass --overwrite to replace it.")
    if dry_run:
        report.summary["written"] = "nothing (--dry-run)"
        report.tables["plan"] = plan_rows(inputs.plan, settings)
        return report
    resumed = journal is not None
    if journal is None:
        journal = journal_path(base)
        write_undo(journal, base, inputs.plan.targets, words)
    with locked(journal):
        record = read_undo(journal)
        root = root_of(base)
        paths = [root / file.path for file in record.files]
        sweep(journal)
        for index, path in enumerate(paths):
            check_untouched(record, index, path)
        try:
            survival = _overwrite(inputs, settings, record, progress)
            kept = _from_originals(inputs, record).values()
            report_survival(report, survival, min_survival, partial(alternatives, kept, settings))
            digests = _prove(inputs, settings, record, full=full)
        except BaseException:
            for index, path in enumerate(paths):
                roll_back(record, index, path)
            remove(journal)
            raise
        record_merged(journal, record, digests)
        _close(journal, undo)
    report.summary["in place"] = "resumed and finished" if resumed else "done"
    report.summary["check"] = (
        f"reopened: {len(survival)} touched tensors recomputed ({'full' if full else 'sample'}), "
        "the bytes of all others "
        "unchanged by SHA-256"
    )
    report.outputs.extend(str(root / file.path) for file in record.files)
    if undo is not None:
        report.outputs.append(str(undo))
    return report


def check_possible(inputs: Inputs, settings: Settings) -> None:
    """Raise UnsupportedError, naming the tensor or the file, for what cannot be done in place."""
    base = inputs.base.checkpoint
    if inputs.restructured:
        raise UnsupportedError(
            f"{base.source}: the result has other tensors than the base "
            f"({inputs.findings[0].message}), which cannot be done "
            "in place; use -o."
        )
    for name, tensor in base.items():
        if is_pickle_name(tensor.path.name):
            raise UnsupportedError(f"{tensor.path}: a pickle cannot be merged in place; use -o.")
        if settings.dtype and tensor.dtype in DENSE and tensor.dtype != settings.dtype:
            raise UnsupportedError(
                f"{name!r}: is {tensor.dtype}; --dtype to {settings.dtype} changes the size of "
                "the file, which cannot be done "
                "in place; use -o."
            )
    for name, target in inputs.plan.targets.items():
        before = tuple(base[name].shape) if name in base else None
        if before != target.shape:
            raise UnsupportedError(
                f"{name!r}: the merge makes {list(target.shape)} of {list(before or ())}, which "
                "cannot be done in place; "
                "use -o."
            )
    for file in base.files:
        if file.is_symlink() or file.stat().st_nlink > 1:
            raise UnsupportedError(
                f"{file}: is a link; overwriting it would change the file under its other names "
                "too (a download cache, for "
                "one). Copy it first, or use -o."
            )


def _is_done(undo: Path, base: Checkpoint, words: Merge) -> bool:
    """Whether an undo file of that name is of this merge, and the base holds its result."""
    if not undo.is_file():
        return False
    record = read_undo(undo)
    if not record.merge.same_as(words) or len(record.files) != len(base.files):
        return False
    root = root_of(base)
    return all(
        (root / file.path).is_file() and digest_of(root / file.path)[0] == record.merged(index)
        for index, file in enumerate(record.files)
    )


def _is_copy(undo: Path, journal: Path | None) -> bool:
    """Whether `undo` is the copy that an interrupted run made of the journal on another file
    system.
    """
    return journal is not None and read_undo(undo).same_as(read_undo(journal))


def _from_originals(inputs: Inputs, record: Undo) -> dict[str, Target]:
    """The targets of the plan, reading the journal in place of the base."""
    number = {file.path: index for index, file in enumerate(record.files)}
    root = root_of(inputs.base.checkpoint)
    targets: dict[str, Target] = {}
    for name, target in inputs.plan.targets.items():
        tensor = inputs.base.checkpoint[name]
        index = number[tensor.path.relative_to(root).as_posix()]
        original = record.original(index, tensor.name)
        if original is None:
            raise CheckFailed(f"{record.path}: does not hold the original of {name!r}.")
        targets[name] = replace(target, tensor=original)
    return targets


def _overwrite(
    inputs: Inputs, settings: Settings, record: Undo, progress: Progress | None
) -> dict[str, Survival]:
    base = inputs.base.checkpoint
    targets = _from_originals(inputs, record)
    by_file: dict[Path, list[tuple[int, str]]] = {}
    for name in targets:
        span = base[name].file_range()
        assert span is not None
        by_file.setdefault(base[name].path, []).append((span[0], name))
    sequence = [name for names in by_file.values() for _, name in sorted(names)]
    total = sum(base[name].nbytes for name in sequence)
    done = 0

    def advance(target: Target) -> None:
        nonlocal done
        done += target.tensor.nbytes
        if progress is not None:
            progress(done, total, target.name)

    with Pipeline([targets[name] for name in sequence], settings, advance) as pipeline:
        for path, names in by_file.items():
            overwrite(path, _pieces(pipeline, sorted(names), base))
        return dict(pipeline.survival)


def _pieces(
    pipeline: Pipeline, names: Sequence[tuple[int, str]], base: Checkpoint
) -> Iterator[tuple[int, memoryview]]:
    for start, name in names:
        offset = start
        for chunk in pipeline.chunks(name):
            data = as_bytes(chunk)
            yield offset, data
            offset += data.nbytes
        if offset - start != base[name].nbytes:
            raise CheckFailed(
                f"{name!r}: {offset - start} bytes where {base[name].nbytes} were expected"
            )


def _prove(inputs: Inputs, settings: Settings, record: Undo, *, full: bool) -> list[str]:
    """Recompute the touched tensors from what the files now hold, and digest the rest; returns
    the files' digests.
    """
    base = inputs.base.checkpoint
    written = open_checkpoint(base.path)
    for name, target in _from_originals(inputs, record).items():
        rows = tile_that_differs(target, settings, written[name], full=full)
        if rows is not None:
            raise CheckFailed(f"{name!r}: rows {rows} of the base are not what was planned.")
    digests: list[str] = []
    for index, file in enumerate(record.files):
        path = root_of(base) / file.path
        whole, rest = digest_of(path, ranges_of(record, index))
        if rest != file.rest:
            raise CheckFailed(
                f"{path}: tensors that the merge leaves alone have changed meanwhile."
            )
        digests.append(whole)
    return digests


def _close(journal: Path, undo: Path | None) -> None:
    """The last step: the journal goes, or becomes the undo file."""
    if undo is None:
        remove(journal)
        return
    try:
        os.replace(journal, undo)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_durably(journal, undo)  # another file system
        remove(journal)
    sync_folder(undo.parent)
    sync_folder(journal.parent)
