"""How many singular values to keep: the rules of `--rank`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True)
class RankRule:
    """How many singular values σ_1 >= σ_2 >= … to keep: the smallest k that meets every criterion,
    then the cap.

    Written `16`, `energy:0.99`, `fro:0.95`, `cumulative:0.9`, `ratio:100`, `max:64`, or several
    joined by commas.

        16            k = 16 (k = number of singular values if there are fewer)
        energy:p      Σ_{j<=k} σ_j²  >= p · Σ σ_j²            0 < p <= 1
        fro:p         sqrt of the above: energy:p²             0 < p <= 1  (sd-scripts `sv_fro`)
        cumulative:p  Σ_{j<=k} σ_j   >= p · Σ σ_j             0 < p <= 1  (`sv_cumulative`)
        ratio:p       every σ_j >= σ_1 / p is kept             p > 1       (`sv_ratio`)
        max:n         k <= n, whatever the others ask

    k is at least 1. These are the definitions, not sd-scripts' results: its index is one too high.
    Sums are compared with a relative slack of 1e-12, so that `energy:0.5` of two equal values is
    one value.
    """

    criteria: tuple[tuple[str, float], ...]
    cap: int | None = None

    @classmethod
    def parse(cls, text: str | int | RankRule) -> RankRule:
        """Read a rule; UsageError names the part that is wrong and what is allowed."""
        if isinstance(text, RankRule):
            return text
        criteria: list[tuple[str, float]] = []
        cap: int | None = None
        for part in str(text).split(","):
            name, _, value = part.strip().rpartition(":")
            name = name.strip() or "rank"
            if name in ("rank", "max"):
                if not re.fullmatch(r"[0-9]+", value.strip()) or int(value) < 1:
                    raise UsageError(
                        f"rank rule '{part.strip()}': expected a whole number of at least 1, or "
                        "energy:0.99, fro:0.95, cumulative:0.9, ratio:100, max:64, or several "
                        "joined by commas."
                    )
                if name == "max":
                    cap = int(value) if cap is None else min(cap, int(value))
                else:
                    criteria.append((name, float(value)))
                continue
            if name not in ("energy", "fro", "cumulative", "ratio"):
                raise UsageError(
                    f"rank rule '{part.strip()}': unknown rule '{name}'. Known: a number, energy, "
                    "fro, cumulative, ratio, max."
                )
            try:
                number = float(value)
            except ValueError:
                raise UsageError(
                    f"rank rule '{part.strip()}': '{value}' is not a number."
                ) from None
            if name == "ratio" and not 1 < number < math.inf:
                raise UsageError(
                    f"rank rule '{part.strip()}': ratio:p keeps sigma >= sigma_1 / p and needs "
                    "p > 1, for example ratio:100. For a share of the spectrum use energy:0.99 or "
                    "cumulative:0.9."
                )
            if name != "ratio" and not 0 < number <= 1:
                raise UsageError(f"rank rule '{part.strip()}': expected a share with 0 < p <= 1.")
            criteria.append((name, number))
        return cls(tuple(criteria), cap)

    def __str__(self) -> str:
        parts = [f"{int(v)}" if n == "rank" else f"{n}:{v:g}" for n, v in self.criteria]
        return ",".join(([f"max:{self.cap}"] if self.cap else []) + parts)

    def choose(self, singular_values: Tensor | Sequence[float]) -> int:
        """The rank for a descending spectrum (k,); between 1 and k."""
        s = torch.as_tensor(singular_values).double().flatten()
        if s.numel() == 0:
            raise UsageError("rank rule: the spectrum is empty.")
        if not bool(torch.isfinite(s).all()):
            raise UsageError("rank rule: the singular values contain NaN or Inf.")
        wanted = [1]
        for name, p in self.criteria:
            if name == "rank":
                wanted.append(int(p))
            elif name == "ratio":
                wanted.append(int((s >= s[0] / p).sum()) if float(s[0]) > 0 else 1)
            else:
                sums = (s if name == "cumulative" else s.square()).cumsum(0)
                share = p * p if name == "fro" else p
                wanted.append(int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1)
        if not self.criteria:
            wanted.append(s.numel())
        rank = max(wanted)
        if self.cap is not None:
            rank = min(rank, self.cap)
        return min(rank, s.numel())
