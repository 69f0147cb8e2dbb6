"""LoHa, the Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2021, arXiv 2108.06098;
LyCORIS, PEFT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from ..errors import CannotFuse
from ..linalg import khatri_rao
from ..linalg.nodes import by_autograd, in_full, run_node
from .base import CALL, is_one
from .fresh import normal, require_rank, trainable
from .layer import Layer, as_matrix
from .one_node import OneNode
from .slots import Part, block_diagonal, group_by, join, ratio, scaled, stack_rows, widest
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Unpack

Pair = tuple[Tensor, Tensor]


def _sum(
    weight: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float = 1.0
) -> Tensor:
    """W + scale (a1 b1) ⊙ (a2 b2)."""
    return torch.addcmul(weight, torch.mm(a1, b1), torch.mm(a2, b2), value=scale)


def _folded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a1: Tensor,
    b1: Tensor,
    a2: Tensor,
    b2: Tensor,
    scale: float,
) -> Tensor:
    return F.linear(x, _sum(weight, a1, b1, a2, b2, scale), bias)


class _Folded(torch.autograd.Function):
    """`_folded` with its gradients: with D = scale · Gᵀ x and the products P_n = a_n b_n, those of
    the first factors are (D ⊙ P_2) b1ᵀ and a1ᵀ (D ⊙ P_2). The products are made again.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a1: Tensor,
        b1: Tensor,
        a2: Tensor,
        b2: Tensor,
        scale: float,
    ) -> Tensor:
        folded = _sum(weight, a1, b1, a2, b2, scale)
        for_x, *_ = tuple(ctx.needs_input_grad)  # pyright: ignore[reportAttributeAccessIssue]
        saved = x, weight, a1, b1, a2, b2, folded if for_x else None
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        ctx.scale = scale  # pyright: ignore[reportAttributeAccessIssue]
        return F.linear(x, folded, bias)

    @staticmethod
    @in_full
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a1, b1, a2, b2, folded = tuple(ctx.saved_tensors)
        scale: float = ctx.scale  # pyright: ignore[reportAttributeAccessIssue]
        if torch.is_grad_enabled():
            return by_autograd(_folded, (x, weight, None, a1, b1, a2, b2, scale), grad)
        g = grad.reshape(-1, grad.shape[-1])
        for_x, _, _, *for_factors, _ = tuple(ctx.needs_input_grad)
        of_x = torch.mm(g, folded).view(*x.shape) if for_x else None
        if not any(for_factors):
            return of_x, *[None] * 7
        # with beta 0 the first matrix is not looked at
        dense = torch.addmm(weight, g.t(), x.reshape(-1, x.shape[-1]), beta=0, alpha=scale)
        first = torch.mm(a2, b2).mul_(dense)
        second = torch.mm(a1, b1).mul_(dense)
        return (
            of_x,
            None,
            None,
            torch.mm(first, b1.t()),
            torch.mm(a1.t(), first),
            torch.mm(second, b2.t()),
            torch.mm(a2.t(), second),
            None,
        )


class LoHa(OneNode):
    """ΔW = scale · (w1_a @ w1_b) ⊙ (w2_a @ w2_b), reshaped to the weight.

    w1_a, w2_a   (o, r)
    w1_b, w2_b   (r, i·k) or (r, i, *k)

    With Tucker cores each factor is W_j = Σ_mn w_a[m, :] t[m, n, *k] w_b[n, :] and the a side lies
    transposed:

    t1, t2       (r, r', *k), w_a (r, o), w_b (r', i)

    kernel       hint for flat w_b, used by `shape` alone: (r, i·k) does not tell i from k.
    """

    algorithm = "loha"
    fields = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    options = ("kernel",)
    w1_a: nn.Parameter
    w1_b: nn.Parameter
    w2_a: nn.Parameter
    w2_b: nn.Parameter
    t1: nn.Parameter | None
    t2: nn.Parameter | None

    def __init__(
        self,
        w1_a: Tensor,
        w1_b: Tensor,
        w2_a: Tensor,
        w2_b: Tensor,
        t1: Tensor | None = None,
        t2: Tensor | None = None,
        *,
        kernel: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.kernel = kernel
        tensors = {"w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": w2_b, "t1": t1, "t2": t2}
        super().__init__(tensors, **common)

    def _measure(self) -> tuple[int, ...]:
        first = self._measure_half("w1_a", "w1_b", "t1")
        second = self._measure_half("w2_a", "w2_b", "t2")
        if (self.t1 is None) != (self.t2 is None):
            self._expect("t1" if self.t1 is None else "t2", False, "both Tucker cores or none")
        longest = max(first, second, key=len)
        columns = [torch.Size(s[1:]).numel() for s in (first, second)]
        same = first[0] == second[0] and columns[0] == columns[1]
        self._expect("w2_a", same, f"a second factor of the first one's shape {first}")
        if self.kernel and len(longest) == 2:
            size = torch.Size(self.kernel).numel()
            self._expect(
                "w1_b", longest[1] % size == 0, f"(rank, in · {size}) for kernel {self.kernel}"
            )
            return (longest[0], longest[1] // size, *self.kernel)
        return longest

    def _measure_half(self, name_a: str, name_b: str, name_t: str) -> tuple[int, ...]:
        a: Tensor = getattr(self, name_a)
        b: Tensor = getattr(self, name_b)
        t: Tensor | None = getattr(self, name_t)
        self._expect(name_a, a is not None and a.ndim == 2, "a matrix")
        self._expect(
            name_b, b is not None and b.ndim >= 2, "(rank, in · kernel) or (rank, in, *kernel)"
        )
        if t is None:
            self._expect(name_b, b.shape[0] == a.shape[1], f"({a.shape[1]}, in · kernel)")
            return (a.shape[0], *b.shape[1:])
        self._expect(name_t, t.ndim >= 2, "(rank, rank, *kernel)")
        self._expect(name_a, a.shape[0] == t.shape[0], f"({t.shape[0]}, out) beside {name_t}")
        self._expect(
            name_b, tuple(b.shape[:1]) == (t.shape[1],) and b.ndim == 2, f"({t.shape[1]}, in)"
        )
        return (a.shape[1], b.shape[1], *t.shape[2:])

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def _half(self, n: int, start: int, stop: int, dtype: torch.dtype) -> Pair:
        """(A (rows, r), B (r, i·k)) of factor 1 or 2."""
        own = self._parameters
        a, b, t = own[f"w{n}_a"], own[f"w{n}_b"], own[f"t{n}"]
        assert a is not None
        assert b is not None
        if t is None:
            if (start, stop) != (0, a.shape[0]):
                a = a[start:stop]
            return as_matrix(a, dtype), as_matrix(b, dtype)
        core = t.to(dtype).flatten(2) if t.ndim > 2 else t.to(dtype)[..., None]
        return a[:, start:stop].to(dtype).T, torch.einsum("mnk,ni->mik", core, b.to(dtype)).flatten(
            1
        )

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        a1, b1 = self._half(1, start, stop, dtype)
        a2, b2 = self._half(2, start, stop, dtype)
        return (a1 * self.scale @ b1) * (a2 @ b2)

    def _factors(self, dtype: torch.dtype) -> Pair | None:
        """Khatri-Rao factors, R = r1 r2."""
        a1, b1 = self._half(1, 0, self.shape[0], dtype)
        a2, b2 = self._half(2, 0, self.shape[0], dtype)
        if a1.shape[1] * a2.shape[1] >= min(self.matrix_shape):
            return None
        return khatri_rao(a1 * self.scale, b1, a2, b2)

    def folds(self, weight: Tensor, positions: int) -> bool:
        """In multiplications, R = r1 r2, forward and backward: the folded weight takes
        o·i (positions + 6 (r1 + r2) + 40) of them, the last for its element-wise products; `change`
        through Khatri-Rao factors 3 positions · R (o + i), and the calls it makes more.
        """
        rows, columns = self.matrix_shape
        r1, r2 = self._ranks
        folded = rows * columns * (positions + 6 * (r1 + r2) + 40)
        return not self._thin or folded < 3 * positions * r1 * r2 * (rows + columns) + CALL

    @property
    def _ranks(self) -> tuple[int, int]:
        """Inner dimensions of the two products."""
        if self.t1 is None or self.t2 is None:
            return self.w1_a.shape[1], self.w2_a.shape[1]
        return self.t1.shape[0], self.t2.shape[0]

    @property
    def _thin(self) -> bool:
        """Whether two products of rank R take fewer multiplications than one with ΔW."""
        rows, columns = self.matrix_shape
        r1, r2 = self._ranks
        return r1 * r2 * (rows + columns) < rows * columns

    def added(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        self._require_fit(tuple(weight.shape))
        a1, b1 = self._half(1, 0, self._shape[0], weight.dtype)
        a2, b2 = self._half(2, 0, self._shape[0], weight.dtype)
        a1 = self.scaled(a1) if is_one(strength) else a1 * (self.scale * strength)
        flat = weight if weight.ndim == 2 else weight.flatten(1)
        return _sum(flat, a1, b1, a2, b2).view(weight.shape)

    def joins(self, weight: Tensor, positions: int) -> bool:
        self._require_fit(tuple(weight.shape))
        return self.t1 is None and self.folds(weight, positions)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own = self._parameters
        factors = own["w1_a"], own["w1_b"], own["w2_a"], own["w2_b"]
        return run_node(_Folded, x, weight, bias, *factors, self.number)

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """On a Linear through the Khatri-Rao factors (R numbers per position in between) where that
        is cheaper, else through the dense ΔW."""
        if layer.kind != "linear" or not self._thin:
            return super().change(x, layer)
        a1, b1 = self._half(1, 0, self._shape[0], torch.float32)
        a2, b2 = self._half(2, 0, self._shape[0], torch.float32)
        u, v = khatri_rao(a1 * self.scale, b1, a2, b2)
        return F.linear(F.linear(x, v.to(x.dtype)), u.to(x.dtype))

    @classmethod
    def init(
        cls,
        weight: Tensor,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
        stored: str = "linear",
        dtype: torch.dtype = torch.float32,
        tucker: bool = False,
        **options: object,
    ) -> LoHa:
        """w1_a ~ N(0, 0.1²), w1_b, w2_b ~ N(0, 1), w2_a = 0, cores ~ N(0, 0.1²) (LyCORIS).

        tucker   the core form for kernels larger than 1 (PEFT `use_effective_conv2d`).
        """
        rank = require_rank(cls, rank, weight, options)
        o, i, *kernel = weight.shape
        scale = 1.0 if alpha is None else alpha / rank
        cores = tucker and any(n > 1 for n in kernel)
        columns = i if cores else i * torch.Size(kernel).numel()
        left = (rank, o) if cores else (o, rank)
        adapter = cls(
            normal(weight, left, 0.1, generator),
            normal(weight, (rank, columns), 1.0, generator),
            torch.zeros(left, device=weight.device),
            normal(weight, (rank, columns), 1.0, generator),
            normal(weight, (rank, rank, *kernel), 0.1, generator) if cores else None,
            normal(weight, (rank, rank, *kernel), 0.1, generator) if cores else None,
            kernel=None if cores else tuple(kernel) or None,
            scale=scale,
            stored=stored,
        )
        return trainable(adapter, dtype)

    def _rows(self, start: int, stop: int, common: Common) -> LoHa:
        cut = slice(start, stop)
        a1, a2 = (
            (self.w1_a[cut], self.w2_a[cut])
            if self.t1 is None
            else (self.w1_a[:, cut], self.w2_a[:, cut])
        )
        return LoHa(a1, self.w1_b, a2, self.w2_b, self.t1, self.t2, kernel=self.kernel, **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> LoHa:
        """Both products become block-diagonal on the a side, so the blocks stay apart under ⊙."""
        live = [p.adapter for p in parts if isinstance(p.adapter, LoHa)]
        tucker = live[0].t1 is not None
        if any((a.t1 is not None) != tucker for a in live):
            raise CannotFuse("a Tucker LoHa beside a plain one: convert with --algorithm lora.")
        groups, members = group_by(parts, ("w1_b", "w2_b", "t1", "t2"))
        owners = [m for m in members if isinstance(m, LoHa)]
        sides: list[Tensor] = []
        for name in ("w1_a", "w2_a"):
            tensors = [getattr(a, name) for a in live]
            dtype = widest(tensors)
            blocks: list[Tensor | int] = []
            for part in parts:
                if not isinstance(part.adapter, LoHa):
                    blocks.append(part.rows)
                    continue
                a = getattr(part.adapter, name)
                factor = ratio(part.adapter, common.get("scale", 1.0)) if name == "w1_a" else 1.0
                blocks.append(scaled(a.T if tucker else a, factor, dtype))
            widths = [
                m._half(1 if name == "w1_a" else 2, 0, 1, torch.float32)[0].shape[1] for m in owners
            ]
            starts = [sum(widths[:n]) for n in range(len(widths))]
            side = stack_rows(blocks, [starts[g] if g >= 0 else 0 for g in groups])
            sides.append(side.T.contiguous() if tucker else side)
        first = owners[0]
        b1, b2, t1, t2 = first.w1_b, first.w2_b, first.t1, first.t2
        if len(owners) > 1:
            b1 = join([m.w1_b.reshape(m.w1_b.shape[0], *b1.shape[1:]) for m in owners])
            b2 = join([m.w2_b.reshape(m.w2_b.shape[0], *b2.shape[1:]) for m in owners])
            t1 = block_diagonal([m.t1 for m in owners if m.t1 is not None]) if tucker else None
            t2 = block_diagonal([m.t2 for m in owners if m.t2 is not None]) if tucker else None
        return LoHa(sides[0], b1, sides[1], b2, t1, t2, kernel=live[0].kernel, **common)
