"""Random maps of the weight; each with its formula from W to W_1 written again in fp64, with dense
matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from peftsurgery.algorithms import (
    BOFT,
    HRA,
    IA3,
    OFT,
    Bat,
    GLoRA,
    HiRA,
    RoAd,
    Tokens,
    WeightAdapter,
)
from tests.algorithms.cases import KERNEL, MATRIX, draw, get, number, size


@dataclass(frozen=True)
class MapCase:
    """`make(shape, rng, dtype)` draws a map of weights of that shape; `formula` is W -> W_1."""

    name: str
    make: Callable[[tuple[int, ...], Generator, torch.dtype], WeightAdapter]
    formula: Callable[[Any, Tensor], Tensor]
    layers: tuple[str, ...] = MATRIX


def skew(vector: Tensor, b: int) -> Tensor:
    """(n, b(b-1)/2) -> (n, b, b), element by element."""
    s = torch.zeros(len(vector), b, b, dtype=vector.dtype)
    pairs = [(i, j) for i in range(b) for j in range(i + 1, b)]
    for place, (i, j) in enumerate(pairs):
        s[:, i, j], s[:, j, i] = vector[:, place], -vector[:, place]
    return s


def diagonal(blocks: Tensor) -> Tensor:
    return torch.block_diag(*blocks)


def rotated(skews: Tensor) -> Tensor:
    """(I + S) (I - S)⁻¹ of each block."""
    eye = torch.eye(skews.shape[-1], dtype=skews.dtype)
    return (eye + skews) @ torch.linalg.inv(eye - skews)


def on_columns(weight: Tensor, matrix: Tensor) -> Tensor:
    return (weight.flatten(1) @ matrix).reshape(weight.shape)


def on_rows(weight: Tensor, matrix: Tensor) -> Tensor:
    return (matrix @ weight.flatten(1)).reshape(weight.shape)


def make_oft(block: int, **options: Any) -> Callable[..., WeightAdapter]:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> OFT:
        count = 1 if options.get("shared") else size(shape[1:]) // block
        vector = 0.4 * draw(rng, count, block * (block - 1) // 2)
        return OFT(vector.to(dtype), **options)

    return make


def oft(a: Any, weight: Tensor) -> Tensor:
    b = a.block_size
    s = skew(get(a, "vector"), b)
    if a.limit is not None:
        norms = s.flatten(1).norm(dim=1)[:, None, None]
        s = s * (a.limit / len(s) ** 0.5 / norms).clamp_max(1.0)
    s = s / a.spread
    if a.series:
        eye = torch.eye(b, dtype=s.dtype)
        powers = [eye.expand_as(s), 2 * s, 2 * s @ s, 2 * s @ s @ s]
        d = sum(powers) + (1 if a.half_last else 2) * s @ s @ s @ s
        d = d.mT if a.inverse else d
    else:
        d = rotated(-s if a.inverse else s)
    if a.shared:
        d = d.expand(size(weight.shape[1:]) // b, -1, -1)
    return on_columns(weight, diagonal(d).T)


def make_oft_out(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> OFT:
    blocks = draw(rng, shape[0] // 2, 2, 2, dtype=dtype)
    rescale = (1 + 0.2 * draw(rng, shape[0], *[1] * (len(shape) - 1))).to(dtype)
    return OFT(None, blocks, rescale, acts_on="out", inverse=True, constraint=1.5)


def oft_out(a: Any, weight: Tensor) -> Tensor:
    s = get(a, "blocks") - get(a, "blocks").mT
    s = s * min(1.0, a.constraint / float(s.norm()))
    factors = get(a, "rescale").reshape(-1, *[1] * (weight.ndim - 1))
    return on_rows(weight, diagonal(rotated(s)).T) * factors


def make_boft(form: str) -> Callable[..., WeightAdapter]:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> BOFT:
        width = size(shape[1:]) if form == "peft" else shape[0]
        depth = 2 if width % 4 == 0 else 1
        blocks = 0.5 * draw(rng, depth, width // 2, 2, 2)
        rescale = 1 + 0.2 * draw(rng, shape[0], 1)
        return BOFT(blocks.to(dtype), rescale.to(dtype), form=form)  # type: ignore[arg-type]

    return make


def boft(a: Any, weight: Tensor) -> Tensor:
    """With permutation matrices, b = 2: a half is one element, so both forms pair the same ones."""
    blocks = get(a, "blocks")
    s = blocks - blocks.mT
    s = -s / 2 if a.form == "peft" else s
    width = blocks.shape[1] * 2
    total = torch.eye(width, dtype=s.dtype)
    for k in range(blocks.shape[0]):
        order = [g + h for g in range(0, width, 2 ** (k + 1)) for h in range(2**k)]
        pairs = torch.tensor([[x, x + 2**k] for x in order]).reshape(-1)
        swap = torch.eye(width, dtype=s.dtype)[pairs]
        total = swap.T @ diagonal(rotated(s[k])) @ swap @ total
    turned = on_columns(weight, total.T) if a.form == "peft" else on_rows(weight, total)
    return turned * get(a, "rescale").reshape(-1, *[1] * (weight.ndim - 1))


def make_hra(orthogonal: bool) -> Callable[..., WeightAdapter]:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> HRA:
        return HRA(draw(rng, size(shape[1:]), 3, dtype=dtype), orthogonal=orthogonal)

    return make


def hra(a: Any, weight: Tensor) -> Tensor:
    u = get(a, "u")
    if a.orthogonal:
        q = torch.linalg.qr(u)[0]
        return on_columns(weight, torch.eye(len(u), dtype=u.dtype) - 2 * q @ q.T)
    for column in u.T:
        v = column / column.norm()
        weight = on_columns(weight, torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(v, v))
    return weight


def make_ia3(acts_on: str, centred: bool) -> Callable[..., WeightAdapter]:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> IA3:
        n = shape[0] if acts_on == "out" else shape[1]
        return IA3(draw(rng, n, dtype=dtype), acts_on=acts_on, centred=centred)  # type: ignore[arg-type]

    return make


def ia3(a: Any, weight: Tensor) -> Tensor:
    factor = get(a, "vector") + (1 if a.centred else 0)
    tail = weight.ndim - 1
    return weight * (
        factor.reshape(-1, *[1] * tail)
        if a.acts_on == "out"
        else factor.reshape(1, -1, *[1] * (tail - 1))
    )


def make_glora(tucker: bool) -> Callable[..., WeightAdapter]:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> GLoRA:
        o, i, *k = shape
        ones = [1] * len(k)
        b2 = draw(rng, 3, i, *(ones if tucker else k), dtype=dtype)
        bm = draw(rng, 3, 3, *k, dtype=dtype) if tucker else None
        a1, a2 = draw(rng, i, 3, *ones, dtype=dtype), draw(rng, 3, i, *ones, dtype=dtype)
        b1 = draw(rng, o, 3, *ones, dtype=dtype)
        return GLoRA(a1, a2, b1, b2, bm, scale=number(rng))

    return make


def glora(a: Any, weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = (get(a, n).flatten(1) for n in ("a1", "a2", "b1", "b2"))
    seen = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2)
    if a.bm is None:
        added = (b1 @ b2).reshape(weight.shape)
    else:
        added = torch.einsum("mn...,om,ni->oi...", get(a, "bm"), b1, b2).reshape(weight.shape)
    return weight + float(a.scale) * (seen + added)


def make_road(variant: int) -> Callable[..., WeightAdapter]:
    def make(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> RoAd:
        n = shape[0] * variant // 2
        theta, radius = draw(rng, n, dtype=dtype), (1 + 0.3 * draw(rng, n)).to(dtype)
        return RoAd(theta, radius, variant=variant, group=2)

    return make


def road(a: Any, weight: Tensor) -> Tensor:
    """The 2 x 2 blocks of pairs of neighbours, element by element."""
    theta, radius = get(a, "theta"), get(a, "radius")
    total = torch.zeros(len(weight), len(weight), dtype=theta.dtype)
    for pair in range(len(weight) // 2):
        j, k = 2 * pair, 2 * pair + 1
        four = [2 * j, 2 * j + 2, 2 * j + 1, 2 * j + 3]  # of a group both cosines, both sines
        c0, s0, c1, s1 = {1: [pair] * 4, 2: [j, j, k, k], 4: four}[a.variant]
        total[j, j] = radius[c0] * theta[c0].cos()
        total[j, k] = -radius[s0] * theta[s0].sin()
        total[k, k] = radius[c1] * theta[c1].cos()
        total[k, j] = radius[s1] * theta[s1].sin()
    return on_rows(weight, total)


def make_hira(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> HiRA:
    o, i, *k = shape
    up, down = draw(rng, o, 3, *[1] * len(k), dtype=dtype), draw(rng, 3, i, *k, dtype=dtype)
    return HiRA(up, down, scale=number(rng))


def hira(a: Any, weight: Tensor) -> Tensor:
    up, down = get(a, "up").flatten(1), get(a, "down").flatten(1)
    gain = torch.einsum("or,ri->oi", up, down).reshape(weight.shape)
    return weight * (1 + float(a.scale) * gain)


def make_tokens(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> Tokens:
    return Tokens(draw(rng, 3, shape[1], dtype=dtype), indices=(8, 0, 5))


def tokens(a: Any, weight: Tensor) -> Tensor:
    result = weight.clone()
    for row, value in zip(a.indices, get(a, "values"), strict=True):
        result[row] = value
    return result


def make_bat(shape: tuple[int, ...], rng: Generator, dtype: torch.dtype) -> Bat:
    return Bat(0.5 * draw(rng, shape[0] // 2, 2, 2).to(dtype))


def bat(a: Any, weight: Tensor) -> Tensor:
    block, flat = get(a, "block"), weight.flatten(1)
    result = flat.clone()
    for k in range(len(block)):
        for c in range(flat.shape[1] // 2):
            rows, columns = slice(2 * k, 2 * k + 2), slice(2 * c, 2 * c + 2)
            result[rows, columns] += flat[rows, columns] @ block[k] + block[k]
    return result.reshape(weight.shape)


MAP_CASES = (
    MapCase("bat", make_bat, bat),
    MapCase("oft-neumann", make_oft(2, series=5), oft),
    MapCase("oft-neumann-old", make_oft(2, series=5, half_last=False), oft),
    MapCase("oft-exact", make_oft(2, inverse=True), oft),
    MapCase("oft-wide", make_oft(5, inverse=True), oft, ("linear", "conv1d", "conv3x3")),
    MapCase("oft-shared", make_oft(2, shared=True, series=5), oft),
    MapCase("oft-coft", make_oft(2, limit=0.3), oft),
    MapCase("oft-scaled", make_oft(5, series=5, spread=4.0), oft, ("linear", "conv3x3")),
    MapCase("oft-out", make_oft_out, oft_out),
    MapCase("boft-peft", make_boft("peft"), boft),
    MapCase("boft-lycoris", make_boft("lycoris"), boft),
    MapCase("hra", make_hra(False), hra),
    MapCase("hra-orthogonal", make_hra(True), hra),
    MapCase("ia3-out", make_ia3("out", False), ia3),
    MapCase("ia3-in", make_ia3("in", False), ia3),
    MapCase("ia3-centred", make_ia3("in", True), ia3),
    MapCase("road-1", make_road(1), road),
    MapCase("road-2", make_road(2), road),
    MapCase("road-4", make_road(4), road),
    MapCase("hira", make_hira, hira),
    MapCase("tokens", make_tokens, tokens, ("linear", "embedding")),
    MapCase("glora", make_glora(False), glora),
    MapCase("glora-tucker", make_glora(True), glora, KERNEL),
)
MAPS = [(case, layer) for case in MAP_CASES for layer in case.layers]
MAP_IDS = [f"{case.name}-{layer}" for case, layer in MAPS]
