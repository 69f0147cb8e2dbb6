"""What a merge method is: one of three kinds of function, and the options it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import UsageError, nearest
from .selection import largest

Number: TypeAlias = float | int | str | bool
Pair: TypeAlias = tuple[Tensor, Tensor]  # U (o, R), V (R, n): the matrix U V
TileFunction: TypeAlias = Callable[[int, int], Tensor]  # rows start:stop of the result

TILE = 1 << 17  # elements of a row tile: smaller ones spend their time on calls
EVERY = 16  # row tiles, of which one is looked at to guess a threshold


@dataclass(frozen=True)
class Option:
    """One option of a method. `default` None means that it must be given."""

    name: str
    help: str
    default: Number | None
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # low itself is not allowed
    choices: tuple[str, ...] = ()

    def check(self, value: Number, method: str) -> Number:
        """The value, or a UsageError that names the range."""
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise UsageError(f"{method}: {self.name} is a switch, got {value!r}.")
            return value
        if self.choices:
            if value not in self.choices:
                raise UsageError(
                    f"{method}: {self.name} {value!r} is not known. Expected one of: "
                    f"{', '.join(self.choices)}."
                )
            return value
        number = float(value) if not isinstance(value, str | bool) else math.nan
        if not math.isfinite(number) or not self.low <= number <= self.high:
            raise UsageError(f"{method}: {self.name} is {value}; expected {self._range()}.")
        if self.above and number == self.low:
            raise UsageError(f"{method}: {self.name} is {value}; expected {self._range()}.")
        return number

    def _range(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        low = "" if math.isinf(self.low) else f"{self.low:g} {'<' if self.above else '<='} "
        high = "" if math.isinf(self.high) else f" <= {self.high:g}"
        return f"{low}{self.name}{high}"


@dataclass(frozen=True)
class Chosen:
    """The checked options of one run."""

    values: Mapping[str, Number]

    def number(self, name: str) -> float:
        """A numeric option."""
        value = self.values[name]
        assert not isinstance(value, str)
        return float(value)

    def flag(self, name: str) -> bool:
        """A switch."""
        return self.values[name] is True

    def word(self, name: str) -> str:
        """An option with choices."""
        return str(self.values[name])


@dataclass(frozen=True)
class Stack:
    """The changes of one weight by several adapters, seen through row tiles.

    Only those that change it are here: `indices` are their places among all adapters, `weights`
    theirs, and `total_weight` the sum over all adapters, the absent ones included.
    """

    name: str  # of the weight: random numbers derive from it
    shape: tuple[int, int]
    indices: tuple[int, ...]
    weights: tuple[float, ...]
    total_weight: float
    read: Callable[[int, int, int], Tensor] = field(repr=False)  # (source, start, stop) -> fp32
    seed: int = 0
    tile: int = TILE  # elements

    @property
    def count(self) -> int:
        return len(self.weights)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def spans(self) -> Iterator[tuple[int, int]]:
        """Row tiles [start, stop), about `tile` elements each."""
        rows, columns = self.shape
        step = max(1, self.tile // columns)
        return ((a, min(a + step, rows)) for a in range(0, rows, step))

    def sampled(self) -> list[tuple[int, int]] | None:
        """Some of the row tiles, evenly spaced; None when there are few."""
        spans = list(self.spans())
        return spans[EVERY // 2 :: EVERY] if len(spans) >= 4 * EVERY else None

    def largest(self, source: int, ranks: Sequence[int]) -> list[float]:
        """The magnitudes of these ranks of one ΔW, exactly; see `selection.largest`."""

        def read(spans: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
            return (self.read(source, start, stop).abs_() for start, stop in spans)

        some = self.sampled()
        sample = None if some is None else lambda: read(some)
        return largest(lambda: read(self.spans()), ranks, sample=sample, count=self.numel)

    def dense(self, tile: TileFunction) -> Tensor:
        """The whole result (o, n), from the tiles of `tile`."""
        result = torch.empty(self.shape)
        for start, stop in self.spans():
            result[start:stop] = tile(start, stop)
        return result


@dataclass(frozen=True)
class Method:
    """One merge method. `run`'s docstring holds the formula and the source."""

    name: str
    options: tuple[Option, ...] = ()
    random: bool = False
    exactly: int | None = None  # number of adapters it is defined for
    positive: bool = False  # weights must not be negative
    alone: bool = True  # means something on one adapter; otherwise one adapter is only scaled

    def choose(self, given: Mapping[str, Number | None]) -> Chosen:
        """Check the options that were given and fill in the others. UsageError names an option the
        method does not have, one that is missing and one that is out of range.
        """
        known = {option.name: option for option in self.options}
        for name, value in given.items():
            if value is not None and name not in known:
                takes = ", ".join(known) or "no options"
                raise UsageError(f"{self.name}: has no option {name!r}; it takes {takes}.")
        values: dict[str, Number] = {}
        for name, option in known.items():
            value = given.get(name)
            if value is None:
                value = option.default
            if value is None:
                raise UsageError(f"{self.name}: needs {name} ({option.help}).")
            values[name] = option.check(value, self.name)
        return Chosen(values)

    def check_weights(self, weights: Sequence[float]) -> None:
        """UsageError when the method is not defined for so many adapters, or for these weights."""
        if self.exactly is not None and len(weights) not in (1, self.exactly):
            raise UsageError(
                f"{self.name}: is defined for {self.exactly} adapters, got {len(weights)}."
            )
        if self.positive and any(w < 0 for w in weights):
            raise UsageError(f"{self.name}: weights must not be negative, got {min(weights):g}.")


@dataclass(frozen=True)
class Coefficients(Method):
    """ΔW = Σ c_i ΔW_i with numbers c_i that depend on inner products only.

    run: (Gram matrix of Frobenius inner products (n, n) fp64, weights of those that change the
    weight at all, sum of all weights, options) -> c (n,).
    """

    run: Callable[[Tensor, Sequence[float], float, Chosen], Sequence[float]] = field(kw_only=True)


@dataclass(frozen=True)
class Spectral(Method):
    """A function of factors: ΔW_i = U_i V_i in fp64, to factors of the result."""

    run: Callable[[Sequence[Pair], Sequence[float], Chosen], Pair] = field(kw_only=True)


@dataclass(frozen=True)
class Elementwise(Method):
    """A function of every element: what needs the whole weight is found first, then tiles follow.

    run: (stack, options) -> the function that gives rows start:stop of the result.
    """

    run: Callable[[Stack, Chosen], TileFunction] = field(kw_only=True)


SCALE = Option("scale", "factor λ on the merged change", 1.0)
NORMALIZE = Option("normalize", "divide by the sum of the weights", False)


def method_named(name: str, methods: Mapping[str, Method]) -> Method:
    """One of `methods`; UsageError names the closest."""
    if name not in methods:
        close = ", ".join(nearest(name, methods)) or ", ".join(methods)
        raise UsageError(f"method {name!r} is not known (closest: {close}).")
    return methods[name]
