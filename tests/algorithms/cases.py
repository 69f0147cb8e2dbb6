"""Random adapters of every algorithm and layer; each with its formula written again in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from peftsurgery.algorithms import (
    AdaLoRA,
    DeLoRA,
    Full,
    LoHa,
    LoKr,
    LoRA,
    SHiRA,
    WeightAdapter,
)

LAYERS: dict[str, tuple[int, ...]] = {
    "linear": (12, 10),
    "embedding": (14, 6),
    "conv1d": (12, 10, 3),
    "conv1x1": (12, 10, 1, 1),
    "conv3x3": (12, 10, 3, 3),
    "norm": (12,),
}


@dataclass(frozen=True)
class Case:
    """`make(shape, rng, dtype)` draws an adapter for a weight; `formula` is its ΔW / scale."""

    name: str
    make: Callable[[tuple[int, ...], Generator, torch.dtype], WeightAdapter]
    formula: Callable[[WeightAdapter, tuple[int, ...]], Tensor]
    layers: tuple[str, ...]


def draw(rng: Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=rng).to(dtype)


def number(rng: Generator) -> float:
    return float(torch.rand((), generator=rng)) + 0.25


def size(shape: Sequence[int]) -> int:
    return int(torch.tensor(list(shape)).prod()) if shape else 1


def get(adapter: WeightAdapter, name: str) -> Tensor:
    tensor = adapter.tensors()[name]
    return tensor.detach().double()


MATRIX = ("linear", "embedding", "conv1d", "conv1x1", "conv3x3")
KERNEL = ("conv1d", "conv3x3")


def make_lora(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> LoRA:
    o, i, *k = shape
    up, down = draw(rng, o, 3, *[1] * len(k), dtype=dtype), draw(rng, 3, i, *k, dtype=dtype)
    return LoRA(up, down, scale=number(rng))


def make_dylora(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> LoRA:
    o, i, *k = shape
    up, down = draw(rng, o, 3, dtype=dtype), draw(rng, 3, i, *k, dtype=dtype)
    return LoRA(up, down, scale=number(rng))


def lora(a: WeightAdapter, shape: tuple[int, ...]) -> Tensor:
    up, down = get(a, "up").flatten(1), get(a, "down").flatten(1)
    return torch.einsum("or,ri->oi", up, down).reshape(shape)


def make_tucker(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> LoRA:
    o, i, *k = shape
    ones = [1] * len(k)
    up, down = draw(rng, o, 4, *ones, dtype=dtype), draw(rng, 3, i, *ones, dtype=dtype)
    return LoRA(up, down, draw(rng, 4, 3, *k, dtype=dtype), scale=number(rng))


def tucker(a: WeightAdapter, shape: tuple[int, ...]) -> Tensor:
    up, down = get(a, "up").flatten(1), get(a, "down").flatten(1)
    return torch.einsum("mn...,om,ni->oi...", get(a, "mid"), up, down).reshape(shape)


def make_loha(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> LoHa:
    o, n = shape[0], size(shape[1:])
    pairs = [draw(rng, *s, dtype=dtype) for s in ((o, 2), (2, n), (o, 2), (2, n))]
    return LoHa(*pairs, scale=number(rng), kernel=shape[2:] or None)


def loha(a: WeightAdapter, shape: tuple[int, ...]) -> Tensor:
    first = get(a, "w1_a") @ get(a, "w1_b").flatten(1)
    return (first * (get(a, "w2_a") @ get(a, "w2_b").flatten(1))).reshape(shape)


def make_loha_tucker(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> LoHa:
    o, i, *k = shape
    sizes = ((2, o), (2, i), (2, o), (2, i), (2, 2, *k), (2, 2, *k))
    return LoHa(*(draw(rng, *s, dtype=dtype) for s in sizes), scale=number(rng))


def loha_tucker(a: WeightAdapter, shape: tuple[int, ...]) -> Tensor:
    def half(n: int) -> Tensor:
        core, left, right = (get(a, s.format(n)) for s in ("t{}", "w{}_a", "w{}_b"))
        return torch.einsum("ij...,ip,jr->pr...", core, left, right)

    return (half(1) * half(2)).reshape(shape)


def make_lokr(form: str) -> Callable[[tuple[int, ...], Generator, torch.dtype], LoKr]:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> LoKr:
        o, i, *k = shape
        a, c = 2, 2
        b, d = o // a, i // c
        shapes: dict[str, tuple[int, ...]] = {"w1": (a, c)}
        if form == "full":
            shapes |= {"w2": (b, d, *k)}
        elif form == "tucker":
            shapes |= {"w2_a": (3, b), "w2_b": (2, d), "t2": (3, 2, *k)}
        elif form == "deep":
            shapes |= {"w2_a": (b, 2), "w2_b": (2, d, *k)}
        else:
            shapes |= {"w2_a": (b, 2), "w2_b": (2, d * size(k))}
        if form == "both":
            shapes |= {"w1_a": (a, 1), "w1_b": (1, c)}
            del shapes["w1"]
        tensors: dict[str, Any] = {n: draw(rng, *s, dtype=dtype) for n, s in shapes.items()}
        return LoKr(**tensors, scale=number(rng), kernel=tuple(k) or None)

    return make


def lokr(a: WeightAdapter, shape: tuple[int, ...]) -> Tensor:
    names = a.tensors()
    w1 = get(a, "w1") if "w1" in names else get(a, "w1_a") @ get(a, "w1_b")
    if "t2" in names:
        w2 = torch.einsum("ij...,ip,jr->pr...", get(a, "t2"), get(a, "w2_a"), get(a, "w2_b"))
    elif "w2" in names:
        w2 = get(a, "w2")
    else:
        w2 = get(a, "w2_a") @ get(a, "w2_b").flatten(1)
    return torch.kron(w1, w2.flatten(1)).reshape(shape)


def make_full(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> Full:
    return Full(draw(rng, *shape, dtype=dtype), scale=number(rng))


def make_delora(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> DeLoRA:
    o, n = shape[0], size(shape[1:])
    tensors = [draw(rng, *s, dtype=dtype) for s in ((o, 3), (3, n), (1,), (n,))]
    return DeLoRA(*tensors, scale=number(rng))


def delora(a: WeightAdapter, shape: tuple[int, ...]) -> Tensor:
    """Term by term."""
    up, down, bound = (get(a, n) for n in ("up", "down", "bound"))
    terms = [torch.outer(u / u.norm(), v / v.norm()) for u, v in zip(up.T, down, strict=True)]
    return (bound * sum(terms) / len(terms) * get(a, "norms")).reshape(shape)


def make_adalora(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> AdaLoRA:
    o, i, *k = shape
    e = draw(rng, 3, 1, dtype=dtype)
    down = draw(rng, 3, i, *k, dtype=dtype)
    return AdaLoRA(draw(rng, o, 3, dtype=dtype), e, down, scale=number(rng))


def adalora(a: WeightAdapter, shape: tuple[int, ...]) -> Tensor:
    e = torch.diag(get(a, "e").reshape(-1))
    return (get(a, "up") @ e @ get(a, "down").flatten(1)).reshape(shape)


def make_shira(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> SHiRA:
    rows, columns = shape[0], size(shape[1:])
    own = torch.arange(min(rows, columns))  # the diagonal, so that the rank is full
    count = rows * columns // 2
    row = torch.cat([own, torch.randint(0, rows, (count,), generator=rng)])
    column = torch.cat([own, torch.randint(0, columns, (count,), generator=rng)])
    places = torch.stack([row, column]).to(torch.int32)
    return SHiRA(draw(rng, len(row), dtype=dtype), places, sized=shape, scale=number(rng))


def shira(a: Any, shape: tuple[int, ...]) -> Tensor:
    found = torch.zeros(shape[0], size(shape[1:]), dtype=torch.float64)
    for value, row, column in zip(get(a, "values"), *a.indices.tolist(), strict=True):
        found[row, column] += value
    return found.reshape(shape)


CASES = (
    Case("lora", make_lora, lora, MATRIX),
    Case("adalora", make_adalora, adalora, MATRIX),
    Case("shira", make_shira, shira, MATRIX),
    Case("lora-dylora", make_dylora, lora, KERNEL),
    Case("lora-tucker", make_tucker, tucker, KERNEL),
    Case("loha", make_loha, loha, MATRIX),
    Case("loha-tucker", make_loha_tucker, loha_tucker, KERNEL),
    Case("lokr-full", make_lokr("full"), lokr, MATRIX),
    Case("lokr-low", make_lokr("low"), lokr, MATRIX),
    Case("lokr-both", make_lokr("both"), lokr, MATRIX),
    Case("lokr-deep", make_lokr("deep"), lokr, KERNEL),
    Case("lokr-tucker", make_lokr("tucker"), lokr, KERNEL),
    Case("delora", make_delora, delora, ("linear", "embedding")),
    Case("full", make_full, lambda a, shape: get(a, "diff").reshape(shape), tuple(LAYERS)),
)

ALL = [(case, layer) for case in CASES for layer in case.layers]
IDS = [f"{case.name}-{layer}" for case, layer in ALL]


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    """Relative Frobenius distance; names it when it is too large."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} != {tuple(wanted.shape)}"
    got, wanted = got.detach().double(), wanted.detach().double()
    scale = max(float(wanted.norm()), 1e-30)
    error = float((got - wanted).norm()) / scale
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:g}"
