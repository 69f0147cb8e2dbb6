"""How a fresh adapter starts. Those that do not start at ΔW = 0 come with an origin.

default      the algorithm's own `init`
gaussian     LoRA: down ~ N(0, 1 / r²), up = 0 (PEFT)
pissa        LoRA: the top r singular triplets of W, U √S and √S Vh (Meng et al. 2024,
             arXiv 2404.02948); "pissa_niter_N" takes them from a randomized SVD with N power steps
olora        LoRA: W = Q R, up = Q[:, :r], down = R[:r] (Büyükakyüz 2024, arXiv 2406.01775)
loftq        LoRA of a matrix: what NF4 takes from W, so that Q + ΔW_0 ≈ W; "loftq_niter_N"
             alternates N times; see `quantized_start`
orthogonal   LoRA, even r: rows of an orthogonal Q (r, r): up from the even ones, down from the odd
             ones, so that up @ down = 0 and both are non-zero (PEFT `orthogonal`)

PiSSA and OLoRA subtract their start from the base, W - ΔW_0. Here the base stays untouched: the
start is kept as a frozen `origin` and what is applied is ΔW - ΔW_0, which is the same function and
has the same gradients. `save` can write either that difference, an ordinary LoRA of rank 2 r, or
the bare factors.

LoftQ is for a base that will be quantized: the weight is Q while the adapter is attached, in the
model's state dict too, and the base's own bytes come back when it is taken off. What is saved is an
ordinary LoRA of Q: on W it adds more than was learned. With one iteration Q is NF4(W), as
quantizing tools make it; otherwise save the base beside the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from peftsurgery.algorithms import LoRA, WeightAdapter
from peftsurgery.errors import UsageError
from peftsurgery.linalg import RankRule, dense_svd

from .quantized_start import loftq

NAMES = (
    "default",
    "gaussian",
    "pissa",
    "pissa_niter_N",
    "olora",
    "orthogonal",
    "loftq",
    "loftq_niter_N",
)


@dataclass(frozen=True)
class Start:
    """A fresh adapter.

    origin   frozen, to subtract; None when the adapter starts at ΔW = 0 or `base` makes up for it
    base     the weight it is meant for, None for the one it was made of
    """

    adapter: WeightAdapter
    origin: WeightAdapter | None = None
    base: Tensor | None = None


def start(
    kind: type[WeightAdapter],
    weight: Tensor,
    init: str,
    *,
    rank: int | None,
    alpha: float | None,
    generator: Generator | None,
    stored: str,
    dtype: torch.dtype,
    options: Mapping[str, object],
) -> Start:
    """A fresh adapter of `weight` by the name of its init; UsageError for one it does not have."""
    adapter = kind.init(
        weight,
        rank=rank,
        alpha=alpha,
        generator=generator,
        stored=stored,
        dtype=dtype,
        **options,
    )
    if init == "default":
        return Start(adapter)
    if not isinstance(adapter, LoRA) or adapter.mid is not None:
        raise UsageError(f"init {init!r} is defined for a LoRA without core, not for {kind}.")
    r = adapter.rank
    if init == "gaussian":
        side = adapter.up if stored == "conv1d" else adapter.down
        side.data.normal_(0.0, 1 / r, generator=generator)
        return Start(adapter)
    if init == "orthogonal":
        return Start(_orthogonal(adapter, generator))
    base: Tensor | None = None
    matrix = weight.detach().float().flatten(1)
    if init == "pissa":
        u, s, vh = dense_svd(matrix, RankRule.parse(min(r, *matrix.shape)))
    elif init.startswith("pissa_niter_") and init.removeprefix("pissa_niter_").isdigit():
        steps = int(init.removeprefix("pissa_niter_"))
        u, s, vh = _randomized(matrix, r, steps, generator)
    elif init == "loftq":
        base, (u, s, vh) = loftq(weight, r)
    elif init.startswith("loftq_niter_") and init.removeprefix("loftq_niter_").isdigit():
        base, (u, s, vh) = loftq(weight, r, int(init.removeprefix("loftq_niter_")))
    elif init == "olora":
        q, upper = torch.linalg.qr(matrix)
        u, vh = q[:, :r], upper[:r]
        s = torch.ones(u.shape[1], device=u.device)
    else:
        raise UsageError(f"init {init!r}: expected one of {', '.join(NAMES)}.")
    root = s.clamp_min(0).sqrt()
    scale = float(adapter.scale)
    if scale <= 0:
        raise UsageError(f"init {init!r}: needs a positive scale, got {scale:g}.")
    _fill(adapter.up, u * root / scale**0.5)
    _fill(adapter.down, root[:, None] * vh / scale**0.5)
    if base is not None:
        return Start(adapter, base=base)
    origin = adapter.with_tensors(
        up=adapter.up.detach().clone(), down=adapter.down.detach().clone()
    )
    return Start(adapter, origin.requires_grad_(False))


def _fill(parameter: Tensor, values: Tensor) -> None:
    """The first columns (or rows) get the values, ranks beyond the matrix's stay zero."""
    with torch.no_grad():
        flat = parameter.new_zeros(parameter.flatten(1).shape)
        flat[: values.shape[0], : values.shape[1]] = values.to(flat.dtype)
        parameter.copy_(flat.reshape(parameter.shape))


def _randomized(
    matrix: Tensor, rank: int, steps: int, generator: Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Top triplets by subspace iteration (Halko, Martinsson, Tropp 2011, arXiv 0909.4061)."""
    rank = min(rank, *matrix.shape)
    width = min(2 * rank + 8, *matrix.shape)
    probe = torch.empty(matrix.shape[1], width, device=matrix.device).normal_(generator=generator)
    q = torch.linalg.qr(matrix @ probe)[0]
    for _ in range(steps):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q)[0])[0]
    u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vh[:rank]


def _orthogonal(adapter: LoRA, generator: Generator | None) -> LoRA:
    r = adapter.rank
    if r % 2:
        raise UsageError(f"init 'orthogonal': got rank {r}, expected an even one.")
    square = torch.empty(r, r, device=adapter.up.device).normal_(generator=generator)
    q = torch.linalg.qr(square)[0]
    even, odd = q[0::2], q[1::2]  # (r / 2, r): rows of one are orthogonal to rows of the other
    outer = torch.empty(adapter.matrix_shape[0], r // 2, device=q.device)
    inner = torch.empty(r // 2, adapter.matrix_shape[1], device=q.device)
    outer.normal_(0.0, 0.1, generator=generator)
    inner.normal_(0.0, 0.1, generator=generator)
    with torch.no_grad():
        adapter.up.copy_((outer @ even).reshape(adapter.up.shape))
        adapter.down.copy_((odd.T @ inner).reshape(adapter.down.shape))
    return adapter
