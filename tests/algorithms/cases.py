"""Random adapters of every algorithm and layer; each with its formula written again in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from peftsurgery.algorithms import (
    BOFT,
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    Bat,
    DeLoRA,
    Full,
    GLoRA,
    HiRA,
    LoHa,
    LoKr,
    LoRA,
    RoAd,
    SHiRA,
    Tokens,
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


# --- maps of the weight: `formula` gives W_1 from W in fp64, with dense matrices ------------------


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


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    """Relative Frobenius distance; names it when it is too large."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} != {tuple(wanted.shape)}"
    got, wanted = got.detach().double(), wanted.detach().double()
    scale = max(float(wanted.norm()), 1e-30)
    error = float((got - wanted).norm()) / scale
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:g}"
