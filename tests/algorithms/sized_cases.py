"""Random VeRA, FourierFT, C3A and MiSS; each with its formula written again in fp64."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from peftsurgery.algorithms import C3A, FourierFT, MiSS, VeRA, WeightAdapter
from tests.algorithms.cases import Case, draw, get, number, size

POINTWISE = ("linear", "embedding", "conv1x1")
FLAT = ("linear", "embedding", "conv1d", "conv1x1", "conv3x3")
Make = Callable[[tuple[int, ...], Generator, torch.dtype], WeightAdapter]


def make_vera(rank: int, *, wider: int = 0, seed: int | None = None) -> Make:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> VeRA:
        o, i = shape[0], size(shape[1:])
        vectors = draw(rng, o, dtype=dtype), draw(rng, rank, dtype=dtype)
        if seed is not None:
            widest = (o + wider, i + wider)
            return VeRA(*vectors, seed=seed, widest=widest, sized=shape, scale=number(rng))
        down, up = draw(rng, rank, i + wider), draw(rng, o + wider, rank)
        return VeRA(*vectors, down, up, sized=shape, scale=number(rng))

    return make


def vera(a: Any, shape: tuple[int, ...]) -> Tensor:
    o, i = shape[0], size(shape[1:])
    up, down = a.up.double()[:o], a.down.double()[:, :i]
    left = torch.diag(get(a, "lambda_b")) @ up
    return (left @ torch.diag(get(a, "lambda_d")) @ down).reshape(shape)


def make_fourier(count: int) -> Make:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> FourierFT:
        seed = int(torch.randint(0, 1000, (), generator=rng))
        spectrum = draw(rng, count, dtype=dtype)
        return FourierFT(spectrum, seed=seed, sized=shape, scale=50 * number(rng))

    return make


def fourier(a: Any, shape: tuple[int, ...]) -> Tensor:
    o, i = shape[0], size(shape[1:])
    order = torch.randperm(o * i, generator=Generator().manual_seed(a.seed)).tolist()
    found = torch.zeros(o, i, dtype=torch.float64)
    p, q = torch.arange(o).double()[:, None], torch.arange(i).double()
    for value, place in zip(get(a, "spectrum").tolist(), order, strict=False):
        u, v = divmod(place, i)
        found += value * torch.cos(2 * math.pi * (u * p / o + v * q / i))
    return (found / (o * i)).reshape(shape)


def make_c3a(block: int) -> Make:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> C3A:
        o, i = shape[0], size(shape[1:])
        return C3A(draw(rng, o // block, i // block, block, dtype=dtype), scale=number(rng))

    return make


def c3a(a: Any, shape: tuple[int, ...]) -> Tensor:
    """Through the eigenvalues: a circulant block is F* diag(conj fft w) F."""
    kernel = get(a, "kernel")
    b = kernel.shape[2]
    root = cmath.exp(-2j * math.pi / b)
    dft = torch.tensor([[root ** (j * k) for k in range(b)] for j in range(b)])
    blocks = [
        torch.cat([(dft.mH @ torch.diag((dft @ w.to(dft)).conj()) @ dft).real / b for w in row], 1)
        for row in kernel
    ]
    return torch.cat(blocks).reshape(shape)


def make_miss(rank: int, shared: int = 0) -> Make:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> MiSS:
        block = draw(rng, rank, shared or shape[0], dtype=dtype)
        return MiSS(block, mini=bool(shared), sized=shape, scale=number(rng))

    return make


def miss(a: Any, shape: tuple[int, ...]) -> Tensor:
    block, columns = get(a, "block"), size(shape[1:])
    found = torch.zeros(shape[0], columns, dtype=torch.float64)
    for p in range(shape[0]):
        for q in range(columns):
            found[p, q] = block[q % block.shape[0], p % block.shape[1]]
    return found.reshape(shape)


SIZED = (
    Case("vera", make_vera(4, wider=3), vera, FLAT),
    Case("vera-wide", make_vera(40), vera, POINTWISE),
    Case("vera-drawn", make_vera(5, wider=2, seed=3), vera, POINTWISE),
    Case("fourierft", make_fourier(30), fourier, FLAT),
    Case("fourierft-few", make_fourier(2), fourier, FLAT),
    Case("c3a", make_c3a(2), c3a, FLAT),
    Case("c3a-one", make_c3a(1), c3a, FLAT),
    Case("miss", make_miss(4), miss, FLAT),
    Case("miss-wide", make_miss(6), miss, FLAT),
    Case("miss-mini", make_miss(4, 2), miss, FLAT),
)
SIZED_ALL = [(case, layer) for case in SIZED for layer in case.layers]
SIZED_IDS = [f"{case.name}-{layer}" for case, layer in SIZED_ALL]
