"""How LoKr cuts the two sides of a weight into factors."""

from __future__ import annotations

from ..errors import UsageError


def factorization(dimension: int, factor: int = -1, *, ordered: bool = True) -> tuple[int, int]:
    """(m, n) with m n = dimension, as LoKr splits a layer's sides.

    If `factor` > 0 divides the dimension: (factor, dimension / factor). Otherwise, among the
    divisors m <= `factor` (any m for -1), walking up from 1 while m + n does not grow: the last
    pair, m <= n. LyCORIS (functional/general.py) sorts the first case too; PEFT
    (tuners/lokr/layer.py) does not: `ordered=False`.
    """
    if dimension < 1:
        raise UsageError(f"factorization: dimension {dimension}, expected at least 1.")
    if factor > 0 and dimension % factor == 0:
        pair = (factor, dimension // factor)
        return (min(pair), max(pair)) if ordered else pair
    limit = dimension if factor < 0 else factor
    m, n = 1, dimension
    for divisor in range(2, dimension + 1):
        if m >= n:
            break
        if dimension % divisor:
            continue
        if divisor > limit or divisor + dimension // divisor > m + n:
            break
        m, n = divisor, dimension // divisor
    return min(m, n), max(m, n)
