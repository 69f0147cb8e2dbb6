"""What a merge starts from: the base and the adapters opened, decoded, brought into one shape and
placed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftsurgery import architectures
from peftsurgery.adapter import Adapter
from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.codec import BaseWeights, decode, open_adapter
from peftsurgery.codec.explaining import explain_checkpoint
from peftsurgery.codec.settling import settle
from peftsurgery.errors import Finding, UnsupportedError, UsageError
from peftsurgery.operations.experts import unstack
from peftsurgery.operations.journal import refuse_pending
from peftsurgery.operations.plan import MergePlan, plan_merge
from peftsurgery.operations.strengths import Strength
from peftsurgery.operations.structure import Structure, replicated
from peftsurgery.operations.tying import TIED, embedding_rows, tied, with_vocabulary
from peftsurgery.quantizers import Format, PackedCheckpoint, logical
from peftsurgery.quantizers.packable import packable
from peftsurgery.quantizers.rounded import rounded

OPEN = ("llm", "generic")  # tables that take any dotted name
DENSE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Inputs:
    """A base and the adapters to fold into it, opened and placed."""

    base: BaseWeights
    adapters: list[tuple[Adapter, Strength]]
    names: list[str]
    plan: MergePlan
    config: dict[str, object] | None = None  # config.json as the merge changes it; None: as it is
    findings: tuple[Finding, ...] = ()
    restructured: bool = False  # the base is seen with other tensors than its files hold


def open_inputs(
    base: str | Path,
    adapters: Sequence[tuple[str | Path | Adapter, float | Strength]],
    *,
    architecture: str | None = None,
    tied_weights: str = "error",
    residual_base: bool = False,
    allow_pickle: bool = False,
    unfinished: bool = False,
    trained_on: Format | None = None,
) -> Inputs:
    """Open and decode everything and place every module on the base; see `plan_merge` for what it
    refuses.

    tied_weights: see `tying.tied`. residual_base: the base is the residual one that PiSSA, OLoRA
    and their like leave, so their adapters belong to it. unfinished: accept a base whose merge in
    place was interrupted; otherwise it is refused.
    """
    if not adapters:
        raise UsageError("no adapter given. Pass at least one with -a ADAPTER[=STRENGTH].")
    if tied_weights not in TIED:
        raise UsageError(f"tied {tied_weights!r} is not known. Expected one of: {', '.join(TIED)}.")
    checkpoint = logical(open_checkpoint(base, allow_pickle=allow_pickle))
    if trained_on is not None:
        checkpoint = as_trained_on(checkpoint, trained_on)
    if not unfinished:
        refuse_pending(checkpoint)
    opened: list[tuple[str, Adapter | Checkpoint]] = []
    for source, _ in adapters:
        if isinstance(source, Adapter):
            opened.append((source.layout or "adapter", source))
        else:
            opened.append((str(source), open_adapter(source, allow_pickle=allow_pickle)))
    names = [name for name, _ in opened]
    family = architecture or family_of([found for _, found in opened], checkpoint)
    weights = BaseWeights(checkpoint, architectures.get(family))
    known = weights.modules()
    decoded = [
        found if isinstance(found, Adapter) else decode(found, architecture=family, known=known)
        for _, found in opened
    ]
    decoded = [settle(adapter, weights.shape_of) for adapter in decoded]
    for adapter, name in zip(decoded, names, strict=True):
        _check_residual(adapter, name, residual_base)
    structure = _restructured(checkpoint, decoded, names, tied_weights)
    if structure.checkpoint is not checkpoint:
        weights = BaseWeights(structure.checkpoint, architectures.get(family))
    stacked = [unstack(a, weights, n) for a, n in zip(structure.adapters, names, strict=True)]
    strengths = [s if isinstance(s, Strength) else Strength(float(s)) for _, s in adapters]
    placed = list(zip(stacked, strengths, strict=True))
    plan = plan_merge(weights, placed, names)
    config = structure.config if structure.config is not None else checkpoint.config
    rows = embedding_rows(weights.checkpoint, plan.targets)
    resized = with_vocabulary(config, rows)
    findings = list(structure.findings)
    if resized is None and any(before != after for before, after in rows.values()):
        size = max(after for _, after in rows.values())
        remedy = f"set vocab_size to {size} in the config.json used with the file"
        message = f"the vocabulary has {size} entries now"
        findings.append(Finding("warning", "vocabulary", message, None, remedy))
    return Inputs(
        weights,
        placed,
        names,
        plan,
        None if resized is checkpoint.config else resized,
        tuple(findings),
        structure.checkpoint is not checkpoint,
    )


def as_trained_on(checkpoint: Checkpoint, format: Format) -> Checkpoint:
    """A plain base as `format` would round its matrices; embeddings and head stay as they are.
    UsageError for a base that is packed itself.
    """
    if isinstance(checkpoint, PackedCheckpoint):
        raise UsageError(
            f"{checkpoint.source}: is packed, and says in which format; --qlora-base packed:FORMAT "
            "is for a plain base. Give --qlora-base packed."
        )
    return rounded(checkpoint, packable(checkpoint), format)


def _restructured(
    base: Checkpoint, adapters: Sequence[Adapter], names: Sequence[str], policy: str
) -> Structure:
    if base.kind == "pipeline":
        return Structure(base, list(adapters), None)
    first = replicated(base, adapters, names)
    second = tied(first.checkpoint, first.adapters, names, policy=policy, config=first.config)
    return replace(second, findings=(*first.findings, *second.findings))


def family_of(found: Sequence[Adapter | Checkpoint], base: Checkpoint) -> str:
    """The architecture whose table explains every adapter and most of the base.

    A family of its own goes before the tables that take any name. Raises UsageError when several
    explain the base equally and place its tensors differently, or when none explains the adapters.
    """
    fitting: list[BaseWeights] = []
    for name in architectures.ARCHITECTURES:
        try:
            weights = BaseWeights(base, architectures.get(name))
            if all(_explains(weights, item) for item in found):
                fitting.append(weights)
        except UsageError:
            continue
    named = [weights for weights in fitting if weights.architecture.name not in OPEN]
    if not named:
        return fitting[0].architecture.name if fitting else _own_family(found[0])
    most = max(len(weights.stored) for weights in named)
    best = [weights for weights in named if len(weights.stored) == most]
    if all(_places(weights) == _places(best[0]) for weights in best):
        return best[0].architecture.name
    raise UsageError(
        f"{base.source}: {', '.join(w.architecture.name for w in best)} explain the base and the "
        "adapters alike, and place "
        "them differently. Pass --architecture."
    )


def _explains(weights: BaseWeights, item: Adapter | Checkpoint) -> bool:
    if isinstance(item, Adapter):
        return item.architecture == weights.architecture.name
    explain_checkpoint(item, architecture=weights.architecture.name, known=weights.modules())
    return True


def _own_family(item: Adapter | Checkpoint) -> str:
    """What the adapter is by itself; its explanation, or that of the base, says what is wrong."""
    if isinstance(item, Adapter):
        return item.architecture
    return explain_checkpoint(item).architecture.name


def _places(weights: BaseWeights) -> dict[str, tuple[str, int]]:
    return {path: (stored.name, stored.part) for path, stored in weights.stored.items()}


def _check_residual(adapter: Adapter, name: str, residual_base: bool) -> None:
    for finding in adapter.findings:
        if finding.code == "residual-base" and not residual_base:
            raise UnsupportedError(
                f"{name}: {finding.message}. Merging it into the pristine base would count what "
                "was taken out of the base "
                "twice. Pass --residual-base if BASE is that residual model (PEFT: "
                "base.save_pretrained after the "
                f"initialisation), or {finding.remedy}."
            )
