"""One budget for a whole file: how many singular values each of many matrices may keep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError
from .rank_rules import RankRule

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """What all matrices may take together: `size:200MB` (powers of 1000, `200MiB` of 1024), or
    `total-rank:4000`, the sum of all ranks.
    """

    kind: Literal["size", "total-rank"]
    amount: int

    @classmethod
    def split(cls, text: str | int | RankRule) -> tuple[Budget | None, RankRule]:
        """The budget in a rule, if there is one, and the rest: what a matrix may take at most.

        UsageError for two budgets, and for an amount that is not one.
        """
        if isinstance(text, RankRule):
            return None, text
        parts = [part.strip() for part in str(text).split(",")]
        found = [p for p in parts if p.partition(":")[0].strip() in ("size", "total-rank")]
        rest = ",".join(p for p in parts if p not in found)
        if len(found) > 1:
            raise UsageError(f"rank rule '{text}': one budget for the file, not {len(found)}.")
        budget = cls._parse(found[0]) if found else None
        return budget, RankRule.parse(rest) if rest or not found else RankRule(())

    @classmethod
    def _parse(cls, part: str) -> Budget:
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name == "total-rank":
            if not re.fullmatch(r"[0-9]{1,12}", value) or int(value) < 1:
                raise UsageError(f"rank rule '{part}': expected a whole number, total-rank:4000.")
            return cls("total-rank", int(value))
        match = _SIZE.fullmatch(value)
        if match is None or len(value) > 24:
            raise UsageError(
                f"rank rule '{part}': expected bytes, as in size:200MB or size:1.5GiB."
            )
        number, unit, binary = match.groups()
        power = " KMGT".index(unit.upper() or " ")
        amount = int(float(number) * (1024 if binary else 1000) ** power)
        if amount < 1:
            raise UsageError(f"rank rule '{part}': expected more than 0 bytes.")
        return cls("size", amount)

    def __str__(self) -> str:
        return f"{self.kind}:{self.amount}{'B' if self.kind == 'size' else ''}"


def allocate(
    spectra: Sequence[Tensor],
    costs: Sequence[int],
    amount: int,
    *,
    least: Sequence[int],
    most: Sequence[int],
) -> list[int]:
    """Ranks k_i with Σ k_i cost_i <= amount and least_i <= k_i <= most_i that keep much of
    Σ_i Σ_{j<=k_i} σ_ij².

    Greedy: the values of all matrices in the order of σ² / cost; one that no longer fits is passed
    over with the smaller ones of its matrix. The objective is separable and concave (Eckart and
    Young 1936), so with equal costs no choice keeps more; with unequal ones, no choice within the
    amount keeps more than this one plus the first value that did not fit. A matrix that `least`
    lets out is not dropped here: 0 is a rank like another.

    spectra: descending, on any device. UsageError when the least already exceed the amount; it
    tells the smallest amount that works.
    """
    if not len(spectra) == len(costs) == len(least) == len(most):
        raise UsageError("allocate: one cost, least and most rank for each spectrum.")
    ranks = [min(low, len(s)) for low, s in zip(least, spectra, strict=True)]
    left = amount - sum(k * cost for k, cost in zip(ranks, costs, strict=True))
    if left < 0:
        raise UsageError(
            f"the budget of {amount} is below the {amount - left} that the smallest ranks take. "
            "Give more, or a smaller min:."
        )
    gains, owners = [], []
    for index, (s, cost) in enumerate(zip(spectra, costs, strict=True)):
        some = s[ranks[index] : most[index]].double().cpu().square() / cost
        gains.append(some)
        owners.append(torch.full((some.numel(),), index, dtype=torch.int64))
    gain, owner = torch.cat(gains), torch.cat(owners)
    order = gain.sort(descending=True, stable=True).indices
    full = [False] * len(ranks)
    for index in owner[order][gain[order] > 0].tolist():
        if full[index]:
            continue
        if costs[index] > left:
            full[index] = True
            continue
        ranks[index] += 1
        left -= costs[index]
    return ranks
