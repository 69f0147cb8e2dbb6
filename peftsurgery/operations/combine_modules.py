"""One module of a combined adapter: the method on ΔW, the fit of its result, and what that lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.algorithms import IA3, Common, Full, LoKr, LoRA, WeightAdapter, difference, norm
from peftsurgery.algorithms.slots import widest
from peftsurgery.errors import CannotFit, CheckFailed, UnsupportedError, UsageError
from peftsurgery.linalg import RankRule, Seen, core_svd, low_rank_norm
from peftsurgery.linalg.randomized import DenseTiles, randomized_svd
from peftsurgery.merge_methods import (
    METHODS,
    Chosen,
    Coefficients,
    Elementwise,
    Method,
    Pair,
    Spectral,
)
from peftsurgery.operations.deltas import Deltas, Entry, length

ABOVE_ROUNDING = RankRule((("ratio", 1 / torch.finfo(torch.float32).eps),))


@dataclass(frozen=True)
class Plan:
    """How modules are combined and written; `count` is the number of adapters."""

    method: Method
    options: Chosen
    count: int
    rank: RankRule | None = None
    algorithm: str | None = None  # "lora", "lokr", "full"; None keeps what is exact
    dtype: torch.dtype | None = None  # None: the widest of the inputs
    seed: int = 0


@dataclass(frozen=True)
class Combined:
    """A combined module; `loss` of the fit and `rounding` of its number type, both
    ||difference||_F / ||ΔW||_F, and `size` = ||ΔW||_F of the result before them.
    """

    module: WeightAdapter
    sources: int
    size: float = 0.0
    loss: float = 0.0
    rounding: float = 0.0
    kept: bool = False  # the module is an input's own


def combine_module(
    path: str, entries: Sequence[Entry], total_weight: float, plan: Plan
) -> Combined:
    """Combine what several adapters do to one weight.

    total_weight: sum of the weights of all adapters at this module. UsageError names a file whose
    values are NaN or Inf, UnsupportedError what has no combination, CheckFailed a result that does
    not fit the output's number type.
    """
    _check(path, entries)
    if any(isinstance(entry.module, IA3) for entry in entries):
        return _multipliers(path, entries, plan)
    bias = _bias(path, entries, _sum_weights(entries, plan))
    first = entries[0].module
    live = tuple(e for e in entries if e.weight != 0 and _changes(e.module))
    if not live:
        zero = min((e.module for e in entries), key=lambda m: m.numel)
        return Combined(_nothing(zero, bias), 0)
    shape = max((e.module.shape for e in entries), key=len)
    common = Common(bias=bias, padded_shape=first.padded_shape, stored=first.stored)
    if _is_identity(live, plan):
        kept = live[0].module.with_tensors(bias=bias)
        return Combined(_rounded(path, kept, plan), 1, norm(kept), kept=True)
    deltas = Deltas(path, live, total_weight, plan.seed)
    dtype = plan.dtype or widest([t for e in live for t in e.module.tensors().values()])
    if (joined := _side_by_side(path, deltas, shape, common, dtype, plan)) is not None:
        return joined
    exact, loss, size = _fitted(path, deltas, shape, common, plan)
    if plan.algorithm == "lokr" and len(shape) > 1:
        exact, loss = _kronecker(path, exact, loss, plan)
    written = _cast(path, exact, dtype)
    rounding = 0.0 if written is exact else difference(exact, written)
    return Combined(written, len(live), size, loss, rounding)


def _check(path: str, entries: Sequence[Entry]) -> None:
    first = entries[0]
    for entry in entries:
        if bad := entry.module.nonfinite():
            raise UsageError(
                f"{entry.file}: {path}: {bad[0]} holds NaN or Inf; it cannot be combined. Leave "
                "the adapter out or repair it."
            )
        module, other = entry.module, first.module
        if isinstance(module, IA3) or isinstance(other, IA3):
            continue
        if module.matrix_shape != other.matrix_shape and _changes(module) and _changes(other):
            raise UsageError(
                f"{path}: {first.file} changes a weight {list(other.shape)} and {entry.file} one "
                f"of {list(module.shape)}: they are not adapters of one model."
            )
        for name in ("stored", "padded_shape"):
            if getattr(module, name) != getattr(other, name):
                raise UnsupportedError(
                    f"{path}: {name} is {getattr(other, name)} in {first.file} and "
                    f"{getattr(module, name)} in {entry.file}; they do not add up."
                )


def _changes(module: WeightAdapter) -> bool:
    """Whether it changes the weight itself, and not by nothing."""
    if set(module.tensors()) <= {"bias"}:
        return False
    return not (module if module.bias is None else module.with_tensors(bias=None)).is_zero()


def _is_identity(live: Sequence[Entry], plan: Plan) -> bool:
    """Whether the sum is one adapter as it is, factors and number type included."""
    if len(live) != 1 or live[0].weight != 1 or plan.rank is not None:
        return False
    if plan.algorithm not in (None, live[0].module.algorithm):
        return False
    if plan.method is METHODS["linear"]:
        return plan.options.number("scale") == 1 and not plan.options.flag("normalize")
    return plan.method is METHODS["svd"] and plan.options.number("scale") == 1 and plan.count == 1


def _nothing(zero: WeightAdapter, bias: Tensor | None) -> WeightAdapter:
    if isinstance(zero, Full) and zero.diff is None and bias is None:
        return zero
    return zero.with_tensors(bias=bias)


# the method ---------------------------------------------------------------------------------------


def _side_by_side(
    path: str,
    deltas: Deltas,
    shape: tuple[int, ...],
    common: Common,
    dtype: torch.dtype,
    plan: Plan,
) -> Combined | None:
    """A weighted sum of LoRAs that stays exact: their factors side by side, moved into the output's
    number type at once; None for everything else.

    What all coefficients share is the scale; what they do not share multiplies the up's, whose
    rounding P U' is known from P alone: ||P V||² / ||ΔW||², no arithmetic where P is 0.
    """
    if not isinstance(plan.method, Coefficients) or plan.rank is not None:
        return None
    if plan.algorithm not in (None, "lora") or len(shape) < 2:
        return None
    coefficients = _coefficients(plan.method, plan.options, deltas)
    found = deltas.side_by_side(coefficients, dtype)
    if found is None:
        return None
    if not math.isfinite(found.lost) and not bool(torch.isfinite(found.up).all()):
        raise _unfit(path, "up", dtype)
    rank, ones = found.up.shape[1], (1,) * (len(shape) - 2)
    up, down = found.up.reshape(shape[0], rank, *ones), found.down.reshape(rank, *shape[1:])
    scaled = common.copy()
    scaled["scale"] = found.scale
    module = LoRA(up, down, **scaled)
    rounding = found.lost / found.size if found.size > 0 else 0.0
    return Combined(module, len(deltas.entries), found.size, 0.0, rounding)


def _coefficients(method: Coefficients, options: Chosen, deltas: Deltas) -> Sequence[float]:
    needs_gram = method is not METHODS["linear"]
    gram = deltas.gram() if needs_gram else torch.zeros(0, 0, dtype=torch.float64)
    return method.run(gram, deltas.weights, deltas.total_weight, options)


def _fitted(
    path: str, deltas: Deltas, shape: tuple[int, ...], common: Common, plan: Plan
) -> tuple[WeightAdapter, float, float]:
    """(the module in fp32, relative loss of the fit, norm before the fit)."""
    method, options = plan.method, plan.options
    if len(shape) < 2 and isinstance(method, Spectral):
        method = METHODS["linear"]  # a vector has no spectrum: the weighted sum
        options = method.choose({"scale": plan.options.number("scale")})
    result: Pair | Tensor
    if isinstance(method, Coefficients):
        coefficients = _coefficients(method, options, deltas)
        joined = deltas.concatenated(coefficients)
        result = joined if joined is not None else deltas.summed(coefficients)
    elif isinstance(method, Spectral):
        left, right = method.run(deltas.pairs(), deltas.weights, options)
        result = (left, right)
    else:
        assert isinstance(method, Elementwise)
        stack = deltas.stack()
        result = stack.dense(method.run(stack, options))
    if plan.algorithm == "full" or len(shape) < 2:
        dense = result if isinstance(result, Tensor) else (result[0] @ result[1]).float()
        return Full(dense.reshape(shape), **common), 0.0, length(dense)
    if isinstance(result, Tensor):
        return _from_dense(result, deltas, shape, common, plan)
    return _from_factors(path, result, deltas, shape, common, plan)


def _from_factors(
    path: str, pair: Pair, deltas: Deltas, shape: tuple[int, ...], common: Common, plan: Plan
) -> tuple[WeightAdapter, float, float]:
    """Factors as they are when no rank is asked and they are thin enough, else their best
    approximation (`core_svd`).
    """
    left, right = pair
    rule = plan.rank
    if rule is None and plan.method.name == "svd":
        rule = RankRule.parse(max(_rank(entry.module) for entry in deltas.entries))
    if rule is None and left.shape[1] < min(left.shape[0], right.shape[1]):
        size = low_rank_norm(left, right, rough=True)
        if left.dtype == torch.float64:
            left, right = _balanced(left, right)
        return _lora(left, right, shape, common), 0.0, size
    seen = Seen(rule or ABOVE_ROUNDING)
    u, s, vh = core_svd(left, right, seen)
    squares = seen.spectrum.square()
    size, tail = math.sqrt(float(squares.sum())), float(squares[s.numel() :].sum())
    loss = math.sqrt(tail) / size if rule is not None and size > 0 else 0.0
    root = s.sqrt()
    return _lora(u * root, root[:, None] * vh, shape, common), loss, size


def _from_dense(
    dense: Tensor, deltas: Deltas, shape: tuple[int, ...], common: Common, plan: Plan
) -> tuple[WeightAdapter, float, float]:
    if plan.rank is None and plan.algorithm is None and isinstance(plan.method, Coefficients):
        return Full(dense.reshape(shape), **common), 0.0, length(dense)  # a dense input stays exact
    rule = plan.rank
    if rule is None:
        ranks = sum(_rank(entry.module) for entry in deltas.entries)
        rule = RankRule.parse(min(ranks, *deltas.shape))
    found = randomized_svd(DenseTiles(dense), rule)
    root = found.s.sqrt()
    module = _lora(found.u * root, root[:, None] * found.vh, shape, common)
    return module, found.error, math.sqrt(found.total)


def _rank(module: WeightAdapter) -> int:
    """Rank of a change at most: that of its factors, else the smaller side."""
    factors = module.factors()
    return factors[0].shape[1] if factors is not None else min(module.matrix_shape)


def _balanced(left: Tensor, right: Tensor) -> Pair:
    """Columns and rows of equal length, so that a narrow number type holds both."""
    a, b = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    turn = torch.where((a > 0) & (b > 0), (b / torch.where(a > 0, a, 1.0)).sqrt(), 1.0)
    safe = torch.where(turn > 0, turn, 1.0)
    return (left * safe).float(), (right / safe[:, None]).float()


def _lora(left: Tensor, right: Tensor, shape: tuple[int, ...], common: Common) -> LoRA:
    rank, ones = left.shape[1], (1,) * (len(shape) - 2)
    up = left.float().reshape(shape[0], rank, *ones)
    return LoRA(up, right.float().reshape(rank, *shape[1:]), **common)


def _kronecker(
    path: str, exact: WeightAdapter, loss: float, plan: Plan
) -> tuple[WeightAdapter, float]:
    """The nearest LoKr; its loss is measured against what was fitted."""
    try:
        fitted = LoKr.fit(exact, plan.rank)
    except CannotFit as error:
        raise CannotFit(f"{path}: {error}") from error
    return fitted, math.hypot(loss, difference(exact, fitted))


def _rounded(path: str, module: WeightAdapter, plan: Plan) -> WeightAdapter:
    return module if plan.dtype is None else _cast(path, module, plan.dtype)


def _cast(path: str, module: WeightAdapter, dtype: torch.dtype) -> WeightAdapter:
    """The module in another number type. CheckFailed when a value does not fit it."""
    tensors = {name: t.detach() for name, t in module.tensors().items()}
    if all(t.dtype == dtype for t in tensors.values()):
        return module
    cast = {name: t.to(dtype) for name, t in tensors.items()}
    for name, tensor in cast.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise _unfit(path, name, dtype)
    return module.with_tensors(**cast)


def _unfit(path: str, name: str, dtype: torch.dtype) -> CheckFailed:
    kind = str(dtype).removeprefix("torch.")
    return CheckFailed(f"{path}: {name} does not fit {kind}. Write --dtype bf16 or fp32.")


# beside the weight --------------------------------------------------------------------------------


def _sum_weights(entries: Sequence[Entry], plan: Plan) -> list[float]:
    scale = plan.options.values.get("scale", 1.0)
    return [float(scale) * entry.weight for entry in entries]


def _bias(path: str, entries: Sequence[Entry], weights: Sequence[float]) -> Tensor | None:
    """Σ w_i Δb_i, whatever the method does to the weights."""
    found = [(e, w) for e, w in zip(entries, weights, strict=True) if e.module.bias is not None]
    if not found:
        return None
    values = [e for e, _ in found if e.module.bias_is_value]
    if values:
        raise UnsupportedError(
            f"{path}: {values[0].file} holds a new bias, not a change of it; it cannot be weighted "
            "beside a changed weight. --base turns it into a change."
        )
    first = found[0][0].module.bias
    assert first is not None
    if len(found) == 1 and found[0][1] == 1:
        return first.detach()
    total = torch.zeros(first.shape)
    for entry, weight in found:
        assert entry.module.bias is not None
        if entry.module.bias.shape != first.shape:
            raise UsageError(
                f"{path}: biases of {found[0][0].file} and {entry.file} differ in size."
            )
        total += weight * entry.module.bias.detach().float()
    return total.to(widest([e.module.bias for e, _ in found if e.module.bias is not None]))


def _multipliers(path: str, entries: Sequence[Entry], plan: Plan) -> Combined:
    """IA3: l = 1 + Σ w_i (l_i - 1), which is W (1 + Σ w_i (l_i - 1)): a sum of changes of W.

    PEFT adds the l_i themselves, which shrinks the layer wherever the weights do not sum to 1.
    """
    others = [e for e in entries if not isinstance(e.module, IA3)]
    if others:
        raise UnsupportedError(
            f"{path}: {others[0].file} adds to the weight and another adapter multiplies it (IA3); "
            "merge them into a base in order instead."
        )
    if plan.method is not METHODS["linear"] or plan.options.flag("normalize"):
        raise UnsupportedError(
            f"{path}: IA3 multipliers are combined with --method linear, without --normalize."
        )
    modules = [e.module for e in entries if isinstance(e.module, IA3)]
    first = modules[0]
    alike = {(m.acts_on, m.on_bias, m.stored, m.vector.numel()) for m in modules}
    if len(alike) > 1:
        raise UnsupportedError(
            f"{path}: the IA3 vectors act on different sides or sizes; they do not add up."
        )
    if len(entries) == 1 and entries[0].weight == 1 and plan.options.number("scale") == 1:
        return Combined(_rounded(path, first, plan), 1)
    offset = torch.zeros(first.vector.numel())
    for module, weight in zip(modules, _sum_weights(entries, plan), strict=True):
        offset += weight * (module.factor(torch.float32).detach() - 1)
    vector = (offset if first.centred else 1 + offset).reshape(first.vector.shape)
    dtype = plan.dtype or widest([m.vector for m in modules])
    return Combined(first.with_tensors(vector=vector.to(dtype)), len(entries), length(offset))
