"""Which rank every module gets: a rule for each, or one budget for the file; and the curve of size
against energy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.checkpoint import Deferred, serialized_header
from peftsurgery.checkpoint.dtypes import FROM_TORCH_NAMES
from peftsurgery.codec import encode
from peftsurgery.errors import UsageError
from peftsurgery.linalg import Budget, Chooser, RankRule, allocate, kohya_rank
from peftsurgery.operations.subjects import Subjects, outline
from peftsurgery.operations.truncating import Subject
from peftsurgery.reports.base import Row

LINEAGE = 2048  # bytes kept for what is written into the header besides what was there


@dataclass(frozen=True)
class AsKohya:
    """A rule as sd-scripts reads it; see `linalg.kohya_rank`."""

    rule: RankRule

    def choose(self, singular_values: Tensor, shape: tuple[int, int] | None = None) -> int:
        """The rank sd-scripts takes."""
        if shape is None:
            raise UsageError("kohya_rank: needs the shape of the matrix.")
        return kohya_rank(self.rule, singular_values, shape)


@dataclass(frozen=True)
class Rules:
    """`--rank`, `--conv-rank` and what goes with them, read."""

    budget: Budget | None
    linear: RankRule
    conv: RankRule | None  # of convolutions with a kernel larger than 1; None: the same
    pad: bool
    kohya: bool

    @classmethod
    def parse(
        cls, rank: str | int, conv_rank: str | int | None, *, pad: bool, kohya: bool
    ) -> Rules:
        """UsageError names the part that is wrong."""
        budget, linear = Budget.split(rank)
        conv = None
        if conv_rank is not None:
            conv_budget, conv = Budget.split(conv_rank)
            if conv_budget is not None:
                raise UsageError(
                    f"--conv-rank {conv_rank}: the budget belongs into --rank; it counts the "
                    "convolutions too."
                )
        if kohya:
            if budget is not None:
                raise UsageError("--kohya-compat: sd-scripts has no budget for a file.")
            one = torch.ones(1, dtype=torch.float64)
            for rule in (linear, conv):
                if rule is not None:
                    kohya_rank(rule, one, (2, 2))  # refuses what sd-scripts does not have
        return cls(budget, linear, conv, pad, kohya)

    def of(self, subject: Subject) -> RankRule:
        """The rule of a module, budget aside."""
        return self.conv if self.conv is not None and subject.convolution else self.linear

    def chooser(self, subject: Subject) -> Chooser:
        """What decides on the rank of a module alone."""
        rule = self.of(subject)
        return AsKohya(rule) if self.kohya else rule

    @property
    def needs_spectra(self) -> bool:
        """Whether all spectra must be known before the first rank is."""
        if self.budget is not None:
            return True
        return self.pad and any(r is not None and r.fixed is None for r in (self.linear, self.conv))

    def pads(self, subjects: Sequence[Subject], ranks: Mapping[str, int]) -> dict[str, int]:
        """With `pad`: one rank for all linear modules and one for all convolutions (the same
        without a rule of their own): the number asked for, or the largest that was chosen."""
        if not self.pad:
            return {}
        found: dict[bool, int] = {}
        for subject in subjects:
            own = self.conv is not None and subject.convolution
            rule = self.of(subject)
            wanted = ranks.get(subject.path, 0) if rule.fixed is None else rule.fixed
            found[own] = max(found.get(own, rule.floor), wanted)
        return {s.path: found[self.conv is not None and s.convolution] for s in subjects}


def size_without_factors(
    adapter: Adapter, subjects: Subjects, to: str, dtype: torch.dtype | None
) -> int:
    """Bytes of the safetensors files in the layout `to` besides the factors that are resized: their
    headers at the largest ranks, everything carried, and room for the lineage.
    """
    ranks = {s.path: min(s.shape) for s in subjects.resized}
    encoded = encode(outline(adapter, subjects, ranks), to)
    total = LINEAGE * len(encoded.tensors)
    for tensors in encoded.tensors.values():
        entries = {
            k: Deferred(FROM_TORCH_NAMES[str(t.dtype).removeprefix("torch.")], tuple(t.shape), list)
            for k, t in tensors.items()
        }
        total += len(serialized_header(entries, encoded.metadata)[0])
        for key, tensor in tensors.items():
            cast = dtype is not None and tensor.is_floating_point() and not key.endswith(".alpha")
            total += tensor.numel() * (dtype if cast and dtype else tensor.dtype).itemsize
    return total - sum(ranks[s.path] * s.cost for s in subjects.resized)


def spend(
    rules: Rules, budget: Budget, subjects: Sequence[Subject], spectra: Sequence[Tensor], fixed: int
) -> list[int]:
    """Ranks within the budget, of which `fixed` bytes are gone already (`size` only).

    A rule beside the budget is the most a module may take, `min:` the least (1 otherwise: no module
    is dropped). Convolutions with a rule of their own get what that says, before all others.
    """
    most = [
        rules.of(s).choose(values, s.shape) for s, values in zip(subjects, spectra, strict=True)
    ]
    own = [rules.conv is not None and s.convolution for s in subjects]
    least = [
        high if o else rules.of(s).floor for s, high, o in zip(subjects, most, own, strict=True)
    ]
    by_size = budget.kind == "size"
    costs = [s.cost if by_size else 1 for s in subjects]
    try:
        amount = budget.amount - (fixed if by_size else 0)
        return allocate(spectra, costs, amount, least=least, most=most)
    except UsageError as error:
        ranks = [min(low, len(s)) for low, s in zip(least, spectra, strict=True)]
        needed = sum(k * c for k, c in zip(ranks, costs, strict=True)) + (fixed if by_size else 0)
        raise UsageError(
            f"{budget}: the smallest that works is {budget.kind}:{needed}{'B' if by_size else ''} "
            f"(every module at rank {min(ranks)} or more)."
        ) from error


def curve(subjects: Sequence[Subject], spectra: Sequence[Tensor], fixed: int) -> list[Row]:
    """Size of the file against the share of Σ||ΔW||² it keeps, at one rank everywhere and at ranks
    chosen by a budget of the same size; as large as the adapter allows, in powers of two."""
    costs = [s.cost for s in subjects]
    counts = [len(s) for s in spectra]
    squares = [s.square().cumsum(0) for s in spectra]
    total = sum(float(s[-1]) for s in squares)
    top = max(counts, default=0)
    rows: list[Row] = []
    for rank in [1 << n for n in range(top.bit_length()) if 1 << n < top] + ([top] if top else []):
        same = [min(rank, n) for n in counts]
        nbytes = sum(k * c for k, c in zip(same, costs, strict=True))
        best = allocate(spectra, costs, nbytes, least=[1] * len(costs), most=counts)
        rows.append(
            {
                "rank": rank,
                "bytes": fixed + nbytes,
                "energy, same rank": _kept(squares, same, total),
                "energy, budget of that size": _kept(squares, best, total),
                "largest relative error, same rank": max(
                    (_lost(s, k) for s, k in zip(squares, same, strict=True)), default=0.0
                ),
            }
        )
    return rows


def _kept(squares: Sequence[Tensor], ranks: Sequence[int], total: float) -> float:
    if not total:
        return 1.0
    return sum(float(s[k - 1]) for s, k in zip(squares, ranks, strict=True)) / total


def _lost(squares: Tensor, rank: int) -> float:
    whole = float(squares[-1])
    return (max(1 - float(squares[rank - 1]) / whole, 0.0)) ** 0.5 if whole else 0.0


def fixed_rule(rank: int) -> RankRule:
    """`rank` and nothing else."""
    return RankRule((("rank", float(rank)),))
