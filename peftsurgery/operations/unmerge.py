"""unmerge: turn a merged checkpoint back into its base, bit for bit, from the undo file of the
merge.

    file_i of the base = header_i, then every tensor by offset: its original where the merge
                         changed it, else as it stands

Before: the checkpoint must be the one the merge wrote, by SHA-256. After: every file must be the
base's, by SHA-256.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from peftsurgery.checkpoint import Checkpoint, open_checkpoint, sha256_of
from peftsurgery.checkpoint.writing import sync_folder
from peftsurgery.codec.files import publish
from peftsurgery.errors import CheckFailed, Finding, UsageError
from peftsurgery.operations.journal import (
    Advance,
    check_untouched,
    copy_durably,
    has_head,
    journal_path,
    locked,
    pending,
    prove_base,
    remove,
    roll_back,
    sweep,
    unfinished,
)
from peftsurgery.operations.merge import check_output
from peftsurgery.operations.restoring import rebuild, replace_file, restore_sides
from peftsurgery.operations.staging import staged_beside
from peftsurgery.operations.undo import Undo, originals, read_undo, root_of
from peftsurgery.reports import Progress, Report


@dataclass(frozen=True)
class UnmergeReport(Report):
    """Report of an unmerge: a row per restored tensor, and the table "files" with what each was."""


def unmerge(
    merged: str | Path,
    undo: str | Path,
    dst: str | Path | None = None,
    *,
    in_place: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Restore the base of `merged` to `dst`, or into the files of `merged` themselves (`in_place`).

    undo: what `merge --undo` wrote, or the journal of an interrupted merge in place. An interrupted
    unmerge in place is finished by the same call.

    Raises CheckFailed, naming the files, when `merged` is not what the merge wrote or the result is
    not the base (then nothing is kept); UsageError for an undo file that is none, or a journal of
    another merge.
    """
    if in_place == (dst is not None):
        raise UsageError(
            "unmerge writes either to an output (-o DST) or --in-place; give one of the two."
        )
    record = read_undo(undo)
    checkpoint = open_checkpoint(merged)
    paths = _paths(record, checkpoint)
    journal = pending(checkpoint)
    if journal is not None and not read_undo(journal).same_as(record):
        raise UsageError(unfinished(checkpoint.source, read_undo(journal)))
    report = UnmergeReport("unmerge")
    states = _states(record, paths, halfway=journal is not None or record.merged(0) is None)
    _describe(report, record, checkpoint, states)
    if dry_run:
        report.summary["written"] = "nothing (--dry-run)"
        return report
    if dst is not None:
        _to(Path(dst), record, checkpoint, paths, overwrite, progress, report)
    elif journal is None and set(states) == {"base"}:
        report.summary["written"] = "nothing: it is the base already"
    else:
        _in_place(record, checkpoint, paths, journal, progress, report)
    return report


def _paths(record: Undo, checkpoint: Checkpoint) -> list[Path]:
    """The file of the merged checkpoint for every file of the base."""
    if not record.folder:
        if len(checkpoint.files) != 1:
            raise CheckFailed(
                f"{checkpoint.source}: has {len(checkpoint.files)} weight files; {record.path} is "
                "about one file, "
                f"{record.base}."
            )
        return list(checkpoint.files)
    root = root_of(checkpoint)
    paths = [root / file.path for file in record.files]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise CheckFailed(
            f"{checkpoint.source}: is not the checkpoint {record.path} is about; it has no "
            f"{', '.join(missing[:4])}."
        )
    return paths


def _states(record: Undo, paths: list[Path], *, halfway: bool) -> list[str]:
    """What every file is: "merged", "base", or "halfway" (some of its touched tensors
    overwritten).
    """
    states: list[str] = []
    wrong: list[str] = []
    for index, path in enumerate(paths):
        digest = sha256_of(path)
        if digest == record.merged(index):
            states.append("merged")
        elif digest == record.files[index].sha256:
            states.append("base")
        elif halfway:
            check_untouched(record, index, path)
            states.append("halfway")
        else:
            wrong.append(f"{path} (SHA-256 {digest[:12]}…, expected {record.merged(index) or '?'})")
    if wrong:
        raise CheckFailed(
            f"{len(wrong)} of {len(paths)} files are not what the merge wrote, so {record.path} "
            "does not belong to them or "
            f"they changed since: {'; '.join(wrong[:4])}."
        )
    return states


# to an output -------------------------------------------------------------------------------------


def _to(
    dst: Path,
    record: Undo,
    checkpoint: Checkpoint,
    paths: list[Path],
    overwrite: bool,
    progress: Progress | None,
    report: UnmergeReport,
) -> None:
    check_output(checkpoint, dst, overwrite)
    if dst.resolve() == record.path.resolve():
        raise UsageError(f"{dst}: is the undo file itself. Give another output path.")
    advance = _counter(progress, sum(file.size for file in record.files))
    with staged_beside(dst, folder=record.folder) as staged:
        for index, path in enumerate(paths):
            place = staged / record.files[index].path if record.folder else staged
            place.parent.mkdir(parents=True, exist_ok=True)
            rebuild(record, index, path, place, advance)
        if record.folder:
            restore_sides(record, root_of(checkpoint), staged, only_kept=False)
        report.outputs.extend(str(path) for path in publish(staged, dst, overwrite=overwrite))
    report.summary["check"] = "every file is the base's by SHA-256"


# in place -----------------------------------------------------------------------------------------


def _in_place(
    record: Undo,
    checkpoint: Checkpoint,
    paths: list[Path],
    journal: Path | None,
    progress: Progress | None,
    report: UnmergeReport,
) -> None:
    for path in paths:
        if path.is_symlink():
            raise UsageError(
                f"{path}: is a symbolic link; give the path of the file itself, or -o."
            )
    if journal is None:
        journal = journal_path(checkpoint)
        try:
            os.link(record.path, journal)
        except OSError:  # no links here, or another file system
            copy_durably(record.path, journal)
        sync_folder(journal.parent)
    total = sum(t.nbytes for index in range(len(paths)) for t in originals(record, index).values())
    advance = _counter(progress, total)
    with locked(journal):
        sides = [root_of(checkpoint) / side.path for side in record.sides]
        sweep(journal, *paths, *sides)
        for index, path in enumerate(paths):
            if has_head(record, index, path):
                roll_back(record, index, path, advance)
            elif sha256_of(path) == record.merged(index):
                replace_file(record, index, path, advance)
        if record.folder:
            root = root_of(checkpoint)
            restore_sides(record, root, root, only_kept=True)
        for index, path in enumerate(paths):
            prove_base(record, index, path)
        remove(journal)
    report.outputs.extend(map(str, paths))
    report.summary["check"] = "every file is the base's by SHA-256"


def _counter(progress: Progress | None, total: int) -> Advance:
    done = 0

    def advance(count: int, name: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total, name)

    return advance


# the report ---------------------------------------------------------------------------------------


def _describe(
    report: UnmergeReport, record: Undo, checkpoint: Checkpoint, states: list[str]
) -> None:
    kept = [originals(record, index) for index in range(len(record.files))]
    report.summary.update(
        {
            "merged": checkpoint.source,
            "base": record.base,
            "undoes": f"{record.merge.adapters} ({record.merge.options})",
            "tensors restored": sum(map(len, kept)),
            "bytes restored": sum(t.nbytes for found in kept for t in found.values()),
        }
    )
    report.tables["files"] = [
        {"file": file.path, "was": state, "restored tensors": len(found), "sha256": file.sha256}
        for file, state, found in zip(record.files, states, kept, strict=True)
    ]
    for file, found in zip(record.files, kept, strict=True):
        for tensor in found.values():
            name = tensor.name.split("/", 2)[2]
            shape = "x".join(map(str, tensor.shape))
            report.modules.append(
                {"tensor": name, "file": file.path, "shape": shape, "dtype": tensor.dtype}
            )
    if record.left_out:
        report.findings.append(
            Finding(
                "info",
                "not-restored",
                f"files the merge did not copy: {', '.join(record.left_out[:8])}",
            )
        )
