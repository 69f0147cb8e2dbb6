"""resize-rank: an adapter at other ranks, from its factors, with the error of every module.

encode(fit(delta)), never on a dense ΔW where there are factors
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.codec import decode, encode, open_adapter
from peftsurgery.codec.settling import settle
from peftsurgery.errors import UsageError
from peftsurgery.linalg import RankRule
from peftsurgery.operations.grams import Grams
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.lineage import Hashing
from peftsurgery.operations.proving import BATCH
from peftsurgery.operations.rank_choices import (
    Rules,
    fixed_rule,
    size_without_factors,
    spend,
)
from peftsurgery.operations.regrouping import apart, joined
from peftsurgery.operations.resize_report import (
    ResizeReport,
    details,
    findings_of,
    merged_errors,
    planned,
    summary,
)
from peftsurgery.operations.staging import workers
from peftsurgery.operations.subjects import ALGORITHMS, find_subjects
from peftsurgery.operations.truncating import Subject, resize, spectrum
from peftsurgery.operations.writing_adapter import (
    DTYPES,
    Origin,
    base_weights,
    check_choice,
    check_dtype,
    check_layout,
    check_target,
    collector_paused,
    encode_as,
    summarise,
    write_proved,
)
from peftsurgery.reports import Progress

T = TypeVar("T")


@collector_paused()
def resize_rank(
    src: str | Path,
    dst: str | Path,
    *,
    rank: str | int,
    conv_rank: str | int | None = None,
    to: str | None = None,
    architecture: str | None = None,
    base: str | Path | None = None,
    algorithm: str | None = None,
    gram: str | Path | None = None,
    pad: bool = False,
    kohya_compat: bool = False,
    dtype: str = "keep",
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ResizeReport:
    """Write the adapter `src` at other ranks as `dst`; see `peftsurgery resize-rank --help`.

    rank: a rule for each module (`linalg.RankRule`), or a budget for the file (`linalg.Budget`).
    The scale alpha / rank of every LoRA stays what it was. A DoRA keeps its magnitude, which is
    that of W' whatever the direction; its error in W' is told with `base`. Weights that the layout
    `to` (that of the source when None) stores fused are resized fused.

    Raises UsageError, UnsupportedError or UnsafeInputError before anything is written; CheckFailed
    when a truncation is not as near as its discarded singular values say, or when the file does not
    read back as what was computed.
    """
    rules = Rules.parse(rank, conv_rank, pad=pad, kohya=kohya_compat)
    check_choice(algorithm, (None, *ALGORITHMS), "algorithm")
    check_dtype(dtype)
    _check_device(device)
    if to is not None:
        check_layout(to)
    dst = Path(dst)
    source = open_adapter(src, allow_pickle=allow_pickle)
    refuse_pending(source)
    hashing = Hashing(source, enabled=not dry_run)
    weights, known = base_weights(base, architecture, source)
    adapter = decode(source, architecture=architecture, known=known)
    if weights is not None:
        adapter = settle(adapter, weights.shape_of)
    original, to = adapter.layout, to or adapter.layout
    check_target([source], dst, to=to, overwrite=overwrite)
    grams = None if gram is None else Grams(gram)
    adapter = joined(adapter, to)
    if grams is not None:
        grams.learn(encode(adapter, to).sources)
    width = None if dtype == "keep" else DTYPES[dtype]
    subjects = find_subjects(adapter, weights, algorithm=algorithm, dtype=width, grams=grams)
    if not subjects.resized:
        raise UsageError(f"{source.source}: no module has a rank to change.")
    report = ResizeReport("resize-rank")
    job = _Job(source, subjects.resized, device, progress)
    choices: dict[str, RankRule] = {}
    pads = rules.pads(subjects.resized, {})
    if rules.needs_spectra or dry_run:
        spectra = job.map(lambda subject: spectrum(subject, device))
        sized = dry_run or (rules.budget is not None and rules.budget.kind == "size")
        fixed = size_without_factors(adapter, subjects, to, width) if sized else 0
        ranks = _ranks(rules, subjects.resized, spectra, fixed)
        if dry_run:
            return planned(report, subjects, spectra, ranks, fixed, original, to)
        choices = {path: fixed_rule(chosen) for path, chosen in ranks.items()}
        pads = rules.pads(subjects.resized, ranks)
    found = job.map(
        lambda s: resize(
            s, choices.get(s.path) or rules.chooser(s), pad=pads.get(s.path), device=device
        )
    )
    resized = dict(zip((s.path for s in subjects.resized), found, strict=True))
    merged = merged_errors(resized, adapter.modules, weights)
    for path, result in resized.items():
        adapter.modules[path] = result.module
    adapter.config = {k: v for k, v in adapter.config.items() if k != "use_rslora"}
    encoded = encode_as(adapter, to, dtype=dtype, sources=[source])
    report.findings.extend([*adapter.findings, *encoded.findings])
    report.findings.extend(findings_of(subjects, resized, weights, grams))
    summarise(report, adapter, encoded, to=to, original=original)
    energy = summary(report, resized, source)
    report.inputs.update(hashing.result())
    options = {
        "rank": str(rank),
        "conv-rank": None if conv_rank is None else str(conv_rank),
        "to": to,
        "algorithm": algorithm,
        "gram": None if gram is None else Path(gram).name,
        "pad": "yes" if pad else None,
        "kohya-compat": "yes" if kohya_compat else None,
        "dtype": None if dtype == "keep" else dtype,
    }
    written = apart(adapter)
    write_proved(
        encoded,
        written,
        dst,
        to=to,
        report=report,
        origin=Origin("resize-rank", options, report.inputs),
        overwrite=overwrite,
        details=details(adapter, written, resized, merged, with_gram=grams is not None),
        progress=progress,
    )
    object.__setattr__(report, "energy", energy)
    return report


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
        if kind == "mps":
            raise UsageError("--device mps: it has no fp64, in which the SVDs are done. Use cpu.")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class _Job:
    """Modules worked on by threads, and what they were read from given back now and then."""

    source: Checkpoint
    subjects: Sequence[Subject]
    device: str
    progress: Progress | None

    def map(self, function: Callable[[Subject], T]) -> list[T]:
        """function(subject) for all, in order; the largest first would save little."""
        batches = [self.subjects[n : n + BATCH] for n in range(0, len(self.subjects), BATCH)]

        def work(batch: Sequence[Subject]) -> list[T]:
            done = [function(subject) for subject in batch]
            self.source.release()
            return done

        results: list[T] = []
        with workers(None if self.device == "cpu" else 1) as threads, torch.no_grad():
            for batch, found in zip(batches, threads.map(work, batches), strict=True):
                results += found
                if self.progress is not None:
                    self.progress(len(results), len(self.subjects), batch[-1].path)
        return results


def _ranks(
    rules: Rules, subjects: Sequence[Subject], spectra: Sequence[Tensor], fixed: int
) -> dict[str, int]:
    if rules.budget is not None:
        ranks = spend(rules, rules.budget, subjects, spectra, fixed)
    else:
        ranks = [
            rules.chooser(s).choose(values / (s.gain or 1.0), s.shape)
            for s, values in zip(subjects, spectra, strict=True)
        ]
    return dict(zip((s.path for s in subjects), ranks, strict=True))
