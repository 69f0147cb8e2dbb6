"""How many singular values to keep: the rules of `--rank`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UsageError

Shape = tuple[int, int]  # of the matrix a spectrum belongs to


class Chooser(Protocol):
    """Anything that decides on a rank once it is shown the spectrum."""

    def choose(self, singular_values: Tensor, shape: Shape | None = None) -> int:
        """The rank for a descending spectrum (k,) of a matrix of that shape; 1 to k."""
        ...


class Seen:
    """A rule that remembers the spectrum it was shown."""

    def __init__(self, rule: Chooser | None = None) -> None:
        self.rule = rule
        self.spectrum = torch.zeros(1, dtype=torch.float64)

    def choose(self, singular_values: Tensor, shape: Shape | None = None) -> int:
        """The rule's answer; 1 without a rule."""
        self.spectrum = singular_values.double().cpu()
        return 1 if self.rule is None else self.rule.choose(self.spectrum, shape)


@dataclass(frozen=True)
class RankRule:
    """How many singular values σ_1 >= σ_2 >= … to keep: the smallest k that meets every criterion,
    then the bounds.

    Written `16`, `energy:0.99`, `fro:0.95`, `cumulative:0.9`, `ratio:100`, `noise`, `max:64`,
    `min:4`, or several joined by commas.

        16            k = 16 (k = number of singular values if there are fewer)
        energy:p      Σ_{j<=k} σ_j²  >= p · Σ σ_j²            0 < p <= 1
        fro:p         sqrt of the above: energy:p²             0 < p <= 1  (sd-scripts `sv_fro`)
        cumulative:p  Σ_{j<=k} σ_j   >= p · Σ σ_j             0 < p <= 1  (`sv_cumulative`)
        ratio:p       every σ_j >= σ_1 / p is kept             p > 1       (`sv_ratio`)
        noise         every σ_j above the noise floor is kept; see `noise_floor`
        min:n         k >= n, whatever the others ask
        max:n         k <= n, whatever the others ask

    k is at least 1 and at most the number of singular values. These are the definitions, not
    sd-scripts' results; see `kohya_rank`. Sums are compared with a relative slack of 1e-12, so that
    `energy:0.5` of two equal values is one value.
    """

    criteria: tuple[tuple[str, float], ...]
    cap: int | None = None
    floor: int = 1

    @classmethod
    def parse(cls, text: str | int | RankRule) -> RankRule:
        """Read a rule; UsageError names the part that is wrong and what is allowed."""
        if isinstance(text, RankRule):
            return text
        criteria: list[tuple[str, float]] = []
        cap: int | None = None
        floor = 1
        for part in (p.strip() for p in str(text).split(",")):
            name, _, value = part.rpartition(":")
            name = name.strip() or "rank"
            if part == "noise":
                criteria.append(("noise", 0.0))
            elif name in ("rank", "max", "min"):
                number = _whole(part, value.strip())
                if name == "max":
                    cap = number if cap is None else min(cap, number)
                elif name == "min":
                    floor = max(floor, number)
                else:
                    criteria.append((name, float(number)))
            elif name in ("size", "total-rank"):
                raise UsageError(
                    f"rank rule '{part}': a budget for the whole file is for the --rank of "
                    "resize-rank only."
                )
            else:
                criteria.append((name, _share(part, name, value)))
        if cap is not None and floor > cap:
            raise UsageError(f"rank rule '{text}': min:{floor} is above max:{cap}.")
        return cls(tuple(criteria), cap, floor)

    def __str__(self) -> str:
        parts = [f"max:{self.cap}"] if self.cap else []
        parts += [f"min:{self.floor}"] if self.floor > 1 else []
        for name, value in self.criteria:
            plain = {"rank": f"{value:g}", "noise": "noise"}
            parts.append(plain.get(name, f"{name}:{value:g}"))
        return ",".join(parts)

    @property
    def fixed(self) -> int | None:
        """The rank when the rule is nothing but a number, whatever the spectrum."""
        if len(self.criteria) != 1 or self.criteria[0][0] != "rank":
            return None
        wanted = max(int(self.criteria[0][1]), self.floor)
        return wanted if self.cap is None else min(wanted, self.cap)

    def choose(self, singular_values: Tensor | Sequence[float], shape: Shape | None = None) -> int:
        """The rank for a descending spectrum (k,) of a matrix of that shape; between 1 and k.

        UsageError for an empty spectrum, for NaN or Inf, and for `noise` without a shape.
        """
        s = _checked(singular_values)
        wanted = [self.floor]
        for name, p in self.criteria:
            if name == "rank":
                wanted.append(int(p))
            elif name == "ratio":
                wanted.append(int((s >= s[0] / p).sum()) if float(s[0]) > 0 else 1)
            elif name == "noise":
                if shape is None:
                    raise UsageError("rank rule 'noise': needs the shape of the matrix.")
                wanted.append(int((s > noise_floor(s, shape)).sum()))
            else:
                sums = (s if name == "cumulative" else s.square()).cumsum(0)
                share = p * p if name == "fro" else p
                wanted.append(int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1)
        if not self.criteria:
            wanted.append(s.numel())
        return self._bounded(max(wanted), s.numel())

    def _bounded(self, rank: int, count: int) -> int:
        if self.cap is not None:
            rank = min(rank, self.cap)
        return min(max(rank, self.floor), count)


def _whole(part: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < 1:
        raise UsageError(
            f"rank rule '{part}': expected a whole number of at least 1, or energy:0.99, fro:0.95, "
            "cumulative:0.9, ratio:100, noise, min:4, max:64, or several joined by commas."
        )
    return int(value)


def _share(part: str, name: str, value: str) -> float:
    if name not in ("energy", "fro", "cumulative", "ratio"):
        raise UsageError(
            f"rank rule '{part}': unknown rule '{name}'. Known: a number, energy, fro, cumulative, "
            "ratio, noise, min, max."
        )
    try:
        number = float(value)
    except ValueError:
        raise UsageError(f"rank rule '{part}': '{value}' is not a number.") from None
    if name == "ratio" and not 1 < number < math.inf:
        raise UsageError(
            f"rank rule '{part}': ratio:p keeps sigma >= sigma_1 / p and needs p > 1, for example "
            "ratio:100. For a share of the spectrum use energy:0.99 or cumulative:0.9."
        )
    if name != "ratio" and not 0 < number <= 1:
        raise UsageError(f"rank rule '{part}': expected a share with 0 < p <= 1.")
    return number


def _checked(singular_values: Tensor | Sequence[float]) -> Tensor:
    s = torch.as_tensor(singular_values).double().flatten()
    if s.numel() == 0:
        raise UsageError("rank rule: the spectrum is empty.")
    if not bool(torch.isfinite(s).all()):
        raise UsageError("rank rule: the singular values contain NaN or Inf.")
    return s


def noise_floor(singular_values: Tensor, shape: Shape) -> float:
    """The optimal hard threshold for a low-rank signal in white noise of unknown level.

        τ = ω(β) · median(σ),   ω(β) ≈ 0.56 β³ - 0.95 β² + 1.82 β + 1.43      (2.86 for β = 1)

    Gavish and Donoho 2014 (arXiv 1305.5870), for an m x n matrix with β = m / n <= 1 and all
    its singular values, most of which must be noise of one variance: the median is taken as noise.
    An adapter shows only its k = rank values of a matrix (o, n). They are read as those of the o x
    k matrix up in the frame of down, β = k / o, which is right where down has stayed close to a
    multiple of an orthogonal frame, as it is at the start of training. A spectrum without noise has
    a floor too: on adapters that use their whole rank the rule keeps too little.
    """
    o, n = shape
    k = singular_values.numel()
    beta = min(o, n) / max(o, n) if k >= min(o, n) else k / o
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return omega * float(singular_values.double().median())


def kohya_rank(rule: RankRule, singular_values: Tensor, shape: Shape) -> int:
    """The rank that `networks/resize_lora.py` of sd-scripts took for `ratio`, `fro` or
    `cumulative`, capped by `max:`.

    Its older releases (newer ones count right) work on all min(o, n) values of the dense matrix,
    count one more than the smallest number that meets the criterion (of at least 1 and at most
    min(o, n) - 1, then one more), want σ > σ_1 / p strictly, and take 1 when σ_1 <= 1e-6. The
    values are those of the product without alpha / rank. What the rule would add beyond the number
    of singular values given is rounding noise there, and is left out here. A plain number is taken
    as it is.
    """
    s = _checked(singular_values)
    if rule.floor > 1 or len(rule.criteria) != 1 or rule.criteria[0][0] in ("energy", "noise"):
        raise UsageError(
            f"rank rule '{rule}': sd-scripts has one of a number, ratio, fro and cumulative, and "
            "max. Leave --kohya-compat out."
        )
    name, p = rule.criteria[0]
    if name == "rank":
        return rule.choose(s)
    if float(s[0]) <= 1e-6:
        return 1
    if name == "ratio":
        index = int((s > s[0] / p).sum())
    else:
        sums = (s if name == "cumulative" else s.square()).cumsum(0)
        sums = sums / sums[-1]
        index = int(torch.searchsorted(sums, p if name == "cumulative" else p * p)) + 1
    index = max(1, min(index, min(shape) - 1))
    return rule._bounded(index + 1, s.numel())
