"""LoftQ: a LoRA that starts as what quantizing the base took away (Li et al. 2023, arXiv
2310.08659)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.linalg import RankRule, Triplet, dense_svd
from peftsurgery.quantizers import by_name, nearest
from peftsurgery.quantizers.packed import check_finite

from .hosting import is_hosted, stack_of
from .packed import is_packed
from .stack import Entry, base_weight


def nf4(weight: Tensor) -> Tensor:
    """What NF4 makes of a matrix (Dettmers et al. 2023, arXiv 2305.14314), fp32: blocks of 64 in
    row-major order with one fp32 scale each. UsageError for NaN and infinity.
    """
    format = by_name("nf4")
    packed = format.fresh("LoftQ: the weight", tuple(weight.shape), "F32", block=64, nested=False)
    matrix = weight.detach().float().cpu()
    check_finite(packed.name, matrix)
    grid, _ = format.fit(packed, matrix)
    return grid.values(nearest(matrix, grid)).to(weight.device)


def loftq(weight: Tensor, rank: int, iterations: int = 1) -> tuple[Tensor, Triplet]:
    """(Q, (U, S, Vh)): alternately Q = NF4(W - L) and L = U diag(S) Vh, the best of rank r for
    W - Q; L = 0 at first.

    Q is the dequantized weight in the shape and dtype of `weight` (o, i), and the SVD makes up for
    its rounding to that dtype too. ||W - Q - L||_F is at most ||W - Q||_F. UsageError for a weight
    that is no matrix and for less than one iteration.
    """
    if weight.ndim != 2 or iterations < 1:
        raise UsageError(
            f"LoftQ: got a weight {tuple(weight.shape)} and {iterations} iterations; expected a "
            "matrix and at least one."
        )
    exact = weight.detach().float()
    rule = RankRule.parse(min(rank, *weight.shape))
    found, low = weight, torch.zeros_like(exact)
    triplet: Triplet | None = None
    for _ in range(iterations):
        found = nf4(exact - low).to(weight.dtype)
        triplet = dense_svd(exact - found.float(), rule)
        u, s, vh = triplet
        low = (u * s) @ vh
    assert triplet is not None
    return found, triplet


def check_replaceable(path: str, module: nn.Module, parameter: str, shared: set[int]) -> None:
    """UsageError when another adapter has replaced this weight, UnsupportedError when other modules
    read it as well or it is packed.
    """
    if is_packed(module):
        raise UnsupportedError(
            f"{path}: LoftQ starts from the weight before it was quantized, and this one is packed "
            "already. Attach to the unquantized model and quantize it afterwards, or use another "
            "init."
        )
    others = stack_of(module).entries if is_hosted(module) else ()
    for other in others:
        if other.original is not None and other.parameter == parameter:
            raise UsageError(
                f"{path}: the adapter {other.name!r} has replaced its weight; delete that first."
            )
    if id(base_weight(module, parameter)) in shared:
        raise UnsupportedError(
            f"{path}: its weight is tied to another module's, which would be quantized with it. "
            "Leave it out of the targets."
        )


@torch.no_grad()
def place(module: nn.Module, entry: Entry, base: Tensor) -> None:
    """Write another base weight in place; the exact bytes are kept on the CPU with the entry."""
    weight = base_weight(module, entry.parameter)
    entry.original = weight.detach().to("cpu", copy=True)
    weight.copy_(base)


@torch.no_grad()
def put_back(module: nn.Module, entry: Entry) -> None:
    """Undo `place`: the exact bytes, if the entry has replaced any."""
    if entry.original is not None:
        base_weight(module, entry.parameter).copy_(entry.original)
        entry.original = None
