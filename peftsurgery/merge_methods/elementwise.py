"""Element-wise methods: a sparsifier per adapter, then a consensus over adapters.

    ΔW = λ · consensus( w_1 · sparse(ΔW_1), …, w_n · sparse(ΔW_n) )

The table at the end names the pairs, as mergekit's generalized task arithmetic does
(generalized_task_arithmetic.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .base import NORMALIZE, SCALE, Chosen, Elementwise, Option, Stack, TileFunction
from .selection import chosen
from .sparsify import Prepare, drop, drop_by_rank, outliers, trim

DENSITY = Option("density", "share of the elements that stay", None, 0, 1, above=True)
EPSILON = Option("epsilon", "half the range of keep probabilities around the density", 0.15, 0, 0.5)
GAMMA = Option("gamma", "share of the largest elements that go", 0.01, 0, 0.999)
RESCALE = Option("rescale", "divide by the keep probability, so that the mean stays", True)
MAJORITY = Option(
    "majority_sign",
    "elect signs by the weighted sum or by counting",
    "total",
    choices=("total", "frequency"),
)


def generalized(prepare: Prepare, elect: bool, stack: Stack, options: Chosen) -> TileFunction:
    """Sparsify every source, then add them up, or their majority where `elect`."""
    sparse = [prepare(stack, source, options) for source in range(stack.count)]
    scale = options.number("scale")

    def tile(start: int, stop: int) -> Tensor:
        parts = []
        for source, (apply, weight) in enumerate(zip(sparse, stack.weights, strict=True)):
            part = stack.read(source, start, stop)
            parts.append(apply(part, start).mul_(weight))
        if elect:
            result = majority(parts, stack.weights, options)
        else:
            result = total(parts, stack.total_weight, options)
        return result.mul_(scale)

    return tile


def total(parts: Sequence[Tensor], weight: float, options: Chosen) -> Tensor:
    """Σ_i w_i x_i, divided by Σ_i w_i with `normalize`."""
    result = parts[0].clone()
    for part in parts[1:]:
        result += part
    return result.div_(weight) if options.flag("normalize") and abs(weight) > 1e-8 else result


def majority(parts: Sequence[Tensor], weights: Sequence[float], options: Chosen) -> Tensor:
    """TIES' election and disjoint mean, per element, y_i = w_i x_i:

        s = sign Σ y_i ("total"; zero counts as +) or sign Σ sign y_i ("frequency")
        result = Σ_{sign y_i = s} y_i,  divided by Σ_{sign y_i = s} |w_i| with `normalize`

    The memory of `parts` is used for the result. For positive weights this is mergekit's formula.
    For negative ones mergekit divides by Σ w_i, which turns the sign of the result. PEFT elects
    with the unweighted values and divides by the count.
    """
    if options.word("majority_sign") == "frequency":
        votes = torch.sign(parts[0])
        for part in parts[1:]:
            votes += torch.sign(part)
    else:
        votes = parts[0].clone()
        for part in parts[1:]:
            votes += part
    side = chosen(torch.ge, votes, 0.0, votes).mul_(2).sub_(1)  # s
    normalize = options.flag("normalize")
    agreed = torch.zeros_like(side) if normalize else side  # Σ |w_i|
    room = torch.empty_like(side) if normalize else side
    result = parts[0]
    for n, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        part.mul_(side).clamp_min_(0)  # |y_i| where it agrees
        if normalize:
            agreed.add_(torch.sign(part, out=room), alpha=abs(weight))
        if n:
            result += part
    result.mul_(side)
    if normalize:  # where nothing agrees, 0 is divided by any number
        result.div_(agreed.clamp_min_(min((abs(w) for w in weights if w), default=1.0)))
    return result


def _method(
    name: str,
    prepare: Prepare,
    *options: Option,
    elect: bool = False,
    random: bool = False,
    mean: bool = False,
) -> Elementwise:
    normalize = Option("normalize", "divide by the sum of the weights that agree", mean)
    shared = (SCALE, normalize if elect else NORMALIZE, *((MAJORITY,) if elect else ()))
    run = partial(generalized, prepare, elect)
    return Elementwise(name, (*options, *shared), random=random, run=run)


ALL = Option("density", "share of the elements that stay; 0.2 in the paper", 1.0, 0, 1, above=True)

# TIES: trim, elect sign, disjoint mean (Yadav et al. 2023, arXiv 2306.01708)
TIES = _method("ties", trim, ALL, elect=True, mean=True)
# DARE: drop and rescale (Yu et al. 2023, arXiv 2311.03099), then the sum, or TIES' election
DARE_LINEAR = _method("dare_linear", drop, DENSITY, RESCALE, random=True)
DARE_TIES = _method("dare_ties", drop, DENSITY, RESCALE, elect=True, random=True)
# DELLA (Deep et al. 2024, arXiv 2406.11617): keep probabilities follow the magnitudes
DELLA = _method("della", drop_by_rank, DENSITY, EPSILON, RESCALE, elect=True, random=True)
DELLA_LINEAR = _method("della_linear", drop_by_rank, DENSITY, EPSILON, RESCALE, random=True)
# Model Breadcrumbs (Davari, Belilovsky 2023, arXiv 2312.06795): neither outliers nor small ones
BREADCRUMBS = _method("breadcrumbs", outliers, DENSITY, GAMMA)
BREADCRUMBS_TIES = _method("breadcrumbs_ties", outliers, DENSITY, GAMMA, elect=True)
# the largest magnitudes of each, added up (PEFT's magnitude_prune, there on factors)
MAGNITUDE_PRUNE = _method("magnitude_prune", trim, DENSITY)
