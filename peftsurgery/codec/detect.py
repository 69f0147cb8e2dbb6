"""Detection is explanation: the architecture whose tables account for every module name wins.

Each module name is resolved by container (how the name is prefixed and whether it is flattened),
component and vocabulary. Ties are broken by pinned shapes, then by what the file says of itself in
its metadata, then by asking. Only headers are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from peftsurgery import architectures
from peftsurgery.architectures import Architecture
from peftsurgery.codec.keys import HeaderTensor, Parsed, rank_and_shape
from peftsurgery.codec.repairing import repaired
from peftsurgery.codec.resolving import Placement, Resolver, denoiser
from peftsurgery.errors import UsageError, nearest

SPECIFIC = ("sd1", "sd2", "sdxl", "flux")
STATED = {
    "sd1": ("stable-diffusion-v1", "sd_v1", "sd_1"),
    "sd2": ("stable-diffusion-v2", "sd_v2", "sd_2"),
    "sdxl": ("stable-diffusion-xl", "sdxl"),
    "flux": ("flux-1", "flux.1", "flux1", "flux"),
}


@dataclass
class Explanation:
    """What one architecture makes of a file's module names."""

    architecture: Architecture
    parsed: Parsed
    placements: dict[str, Placement] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    pinned: int = 0
    contradicted: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every module is placed."""
        return not self.unexplained

    @property
    def fit(self) -> tuple[int, int]:
        """How well the pinned shapes agree; larger is better."""
        return -len(self.contradicted), self.pinned


def explain(
    parsed: Parsed,
    tensors: Mapping[str, HeaderTensor],
    architecture: Architecture,
    known: Mapping[str, Iterable[str]] | None = None,
    *,
    whole: bool = True,
) -> Explanation:
    """Place every record of `parsed` in `architecture` and check its pinned shapes.

    whole: go on after the first record that has no place; otherwise that one alone is in
    `unexplained`.
    """
    resolver = Resolver(architecture, known, tensors)
    explanation = Explanation(architecture, parsed)
    control = "lora_controlnet" in parsed.carried or any(
        r.suffixes & {"up", "down"} for r in parsed.records.values()
    )
    for module, record in parsed.records.items():
        placement = resolver.resolve(record, control=control)
        if placement is None:
            explanation.unexplained.append(module)
            if not whole:
                break
            continue
        explanation.placements[module] = placement
        if record.algorithm in ("", "set"):
            rank_and_shape(record, tensors)  # there must be something to apply
            continue
        _, (out, into) = rank_and_shape(record, tensors)
        shares, path = placement.site.proportions, placement.site.parts[0]
        out = out * shares[0] // sum(shares)
        if architecture.misfit(placement.component, path, out or None, into or None) is not None:
            explanation.contradicted.append(module)
        elif architecture.pin(placement.component, path) is not None:
            explanation.pinned += 1
    return explanation


def detect(
    parsed: Parsed,
    tensors: Mapping[str, HeaderTensor],
    *,
    source: str = "",
    architecture: str | None = None,
    known: Mapping[str, Iterable[str]] | None = None,
    metadata: Mapping[str, str] | None = None,
    keep_unknown: bool = False,
) -> Explanation:
    """The explanation that accounts for every module of the file.

    Tried as the file stands, then after removing wrapper segments, then after undoing doubled
    prefixes; each repair is counted in `parsed.repairs`. Families without a table take what none of
    these explains. keep_unknown: of the candidates that explain most, and at least one module; the
    keys of the others are carried.

    Raises UsageError naming the first keys the two best candidates cannot explain, or the
    candidates between which shapes and metadata do not decide.
    """
    names = (architecture,) if architecture else architectures.ARCHITECTURES
    if not parsed.records:
        raise UsageError(
            f"{source}: no adapter tensors found among the keys"
            + (f", first {parsed.unknown[0]!r}" if parsed.unknown else " (the file is empty)")
            + ". Expected LoRA, LoHa, LoKr, full or norm suffixes; a whole checkpoint is not an "
            "adapter."
        )
    tables = [name for name in names if name in SPECIFIC]
    free = [name for name in names if name not in SPECIFIC]  # these accept nearly any dotted name

    def complete(candidate: Parsed, which: list[str]) -> list[Explanation]:
        found = (
            explain(candidate, tensors, architectures.get(name), known, whole=False)
            for name in which
        )
        return [e for e in found if e.complete]

    tried: list[Parsed] = []
    for candidate in _repairs(parsed):
        tried.append(candidate)
        if found := complete(candidate, tables):
            return _decide(found + complete(candidate, free), source, metadata or {})
    if found := complete(tried[-1], free):
        return _decide(found, source, metadata or {})
    attempts = [
        explain(candidate, tensors, architectures.get(name), known)
        for candidate in tried
        for name in names
    ]
    if keep_unknown and any(e.placements for e in attempts):
        fewest = min(len(e.unexplained) for e in attempts)
        best = [e for e in attempts if len(e.unexplained) == fewest]
        stage = [e for e in best if e.parsed is best[0].parsed]  # as little repaired as possible
        return _carried(_decide(stage, source, metadata or {}))
    raise UsageError(_cannot_explain(source, attempts))


def _carried(partial: Explanation) -> Explanation:
    """The explanation of what it explains; the tensors of the other modules are carried."""
    for module in partial.unexplained:
        partial.parsed.carried += partial.parsed.records.pop(module).keys.values()
    partial.unexplained.clear()
    return partial


def _repairs(parsed: Parsed) -> Iterator[Parsed]:
    """The file as it stands, and after each repair that changes a name."""
    yield parsed
    for stage in ("wrappers", "doubled"):
        candidate = repaired(parsed, stage)
        if candidate.repairs != parsed.repairs:
            yield candidate
        parsed = candidate


def _decide(complete: list[Explanation], source: str, metadata: Mapping[str, str]) -> Explanation:
    specific = [e for e in complete if e.architecture.name in SPECIFIC]
    clean = [e for e in specific if not e.contradicted]
    if not clean:
        others = [e for e in complete if e not in specific]
        if others:
            return others[0]
    best = max(e.fit for e in clean or specific)
    tied = [e for e in clean or specific if e.fit == best]
    if len(tied) > 1:
        stated = [e for e in tied if states(metadata, e.architecture.name)]
        if len(stated) == 1:
            return stated[0]
        raise AmbiguousArchitecture(source, tied)
    return tied[0]


class AmbiguousArchitecture(UsageError):
    """Several architectures explain every key and nothing in the file decides between them."""

    def __init__(self, source: str, candidates: list[Explanation]) -> None:
        self.candidates = candidates
        names = ", ".join(e.architecture.name for e in candidates)
        super().__init__(
            f"{source}: every key is explained by {names} alike, and no pinned shape or metadata "
            "decides. "
            f"Pass --architecture with one of them."
        )


def states(metadata: Mapping[str, str], name: str) -> bool:
    """Whether the file's own metadata (modelspec or sd-scripts) names this architecture."""
    said = " ".join(
        metadata.get(key, "").lower() for key in ("modelspec.architecture", "ss_base_model_version")
    )
    if not said.strip():
        return False
    words = [w for w in STATED.get(name, ()) if any(part.startswith(w) for part in said.split())]
    return bool(words)


def _cannot_explain(source: str, attempts: list[Explanation]) -> str:
    attempts = sorted(attempts, key=lambda e: len(e.unexplained))
    lines = [f"{source}: not every key could be explained."]
    for e in attempts[:2]:
        total = len(e.parsed.records)
        keys = [next(iter(e.parsed.records[m].keys.values())) for m in e.unexplained[:3]]
        lines.append(
            f"  {e.architecture.name}: {len(e.unexplained)} of {total} modules unexplained, first "
            f"{', '.join(map(repr, keys))}: no module of {e.architecture.title} has such a name"
            f"{_closest(e, e.unexplained[0])}."
        )
    lines.append(
        "  Pass --architecture, or --base with the checkpoint it was trained on; convert "
        "--keep-unknown carries what is left as it is."
    )
    return "\n".join(lines)


def _closest(explanation: Explanation, module: str) -> str:
    component = denoiser(explanation.architecture)
    flat = "." not in module
    name = re.sub(r"^(lora_[a-z0-9]+_|lycoris_|base_model\.model\.|diffusion_model\.)", "", module)
    names = [n for c in component.columns for n in component.closest(c, name, flat=flat, n=1)]
    close = nearest(name, names, n=1)
    return f" (closest: {close[0]!r})" if close else ""
