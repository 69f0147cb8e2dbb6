"""LoKr, the Kronecker product of a small and a larger factor (Yeh et al. 2023, arXiv 2309.14859;
LyCORIS, PEFT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..linalg import Chooser, RankRule, Triplet, core_svd, dense_svd, factorization, kron_svd
from ..linalg.kronecker import Kronecker
from .base import CALL, WeightAdapter, is_one
from .fresh import kaiming, require_rank, trainable
from .layer import Layer, as_matrix
from .lokr_fit import nearest_product, require_finite, split_second
from .lokr_linear import kronecker_linear
from .lokr_rows import cut_rows, joined_rows
from .one_node import OneNode
from .slots import Part
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Unpack

Pair = tuple[Tensor, Tensor]


class LoKr(OneNode):
    """ΔW = scale · w1 ⊗ w2: row α·b + β, column γ·d + δ (kernel last) holds w1[α, γ] · w2[β, δ,
    *k].

    w1     (a, c), or w1_a (a, r) @ w1_b (r, c)
    w2     (b, d, *k); or w2_a (b, r) @ w2_b (r, d·k) or (r, d, *k);
           or Tucker: Σ_mn w2_a[m, :] t2[m, n, *k] w2_b[n, :] with t2 (r, r', *k), w2_a (r, b), w2_b
           (r', d)

    o = a b, i = c d. A flat w2_b does not tell d from k: `shape` is then (o, i·k), unless `kernel`
    says.
    """

    algorithm = "lokr"
    fields = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    options = ("kernel",)
    w1: nn.Parameter | None
    w1_a: nn.Parameter | None
    w1_b: nn.Parameter | None
    w2: nn.Parameter | None
    w2_a: nn.Parameter | None
    w2_b: nn.Parameter | None
    t2: nn.Parameter | None
    blocks: tuple[int, int, int]  # (a, b, c)

    def __init__(
        self,
        w1: Tensor | None = None,
        w1_a: Tensor | None = None,
        w1_b: Tensor | None = None,
        w2: Tensor | None = None,
        w2_a: Tensor | None = None,
        w2_b: Tensor | None = None,
        t2: Tensor | None = None,
        *,
        kernel: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.kernel = kernel
        super().__init__(
            {"w1": w1, "w1_a": w1_a, "w1_b": w1_b, "w2": w2, "w2_a": w2_a, "w2_b": w2_b, "t2": t2},
            **common,
        )

    def _measure(self) -> tuple[int, ...]:
        a, c = self._measure_w1()
        b, d, *kernel = self._measure_w2()
        if self.kernel and not kernel:
            size = torch.Size(self.kernel).numel()
            if d % size:
                raise UsageError(
                    f"{self._at('w2_b')}: {d} columns are no multiple of kernel {self.kernel}."
                )
            d, kernel = d // size, list(self.kernel)
        self.blocks = (a, b, c)
        return (a * b, c * d, *kernel)

    def _one_of(self, whole: str, left: str, right: str) -> bool:
        """Whether the factor is whole; exactly one form must be there."""
        full, a, b = (self._parameters[n] is not None for n in (whole, left, right))
        if full == (a or b) or a != b:
            raise UsageError(
                f"LoKr: needs either {whole}, or both {left} and {right}, and not more."
            )
        return full

    def _measure_w1(self) -> tuple[int, int]:
        if self._one_of("w1", "w1_a", "w1_b"):
            assert self.w1 is not None
            good = self.w1.ndim >= 2 and all(n == 1 for n in self.w1.shape[2:])
            self._expect("w1", good, "(a, c)")
            return self.w1.shape[0], self.w1.shape[1]
        assert self.w1_a is not None
        assert self.w1_b is not None
        self._expect("w1_a", self.w1_a.ndim == 2, "(a, rank)")
        r = self.w1_a.shape[1]
        self._expect("w1_b", self.w1_b.ndim == 2 and self.w1_b.shape[0] == r, f"({r}, c)")
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def _measure_w2(self) -> tuple[int, ...]:
        if self._one_of("w2", "w2_a", "w2_b"):
            assert self.w2 is not None
            self._expect("t2", self.t2 is None, "nothing beside a whole w2")
            self._expect("w2", self.w2.ndim >= 2, "(b, d, *kernel)")
            return tuple(self.w2.shape)
        assert self.w2_a is not None
        assert self.w2_b is not None
        self._expect("w2_a", self.w2_a.ndim == 2, "a matrix")
        self._expect("w2_b", self.w2_b.ndim >= 2, "(rank, d · kernel) or (rank, d, *kernel)")
        if self.t2 is None:
            r = self.w2_a.shape[1]
            self._expect("w2_b", self.w2_b.shape[0] == r, f"({r}, d · kernel)")
            return (self.w2_a.shape[0], *self.w2_b.shape[1:])
        self._expect("t2", self.t2.ndim >= 2, "(rank, rank, *kernel)")
        m, n = self.t2.shape[:2]
        self._expect("w2_a", self.w2_a.shape[0] == m, f"({m}, b) beside t2")
        self._expect("w2_b", self.w2_b.ndim == 2 and self.w2_b.shape[0] == n, f"({n}, d) beside t2")
        return (self.w2_a.shape[1], self.w2_b.shape[1], *self.t2.shape[2:])

    @property
    def rank(self) -> int | None:
        if self.w2_b is not None:
            return self.w2_b.shape[0]
        return None if self.w1_b is None else self.w1_b.shape[0]

    # --- factors ----------------------------------------------------------------------------------

    def _first_pair(self, dtype: torch.dtype) -> Pair | None:
        if self.w1_a is None or self.w1_b is None:
            return None
        return self.w1_a.to(dtype), self.w1_b.to(dtype)

    def _second_pair(self, dtype: torch.dtype) -> Pair | None:
        if self.w2_a is None or self.w2_b is None:
            return None
        if self.t2 is None:
            return self.w2_a.to(dtype), self.w2_b.to(dtype).flatten(1)
        core = self.t2.to(dtype).flatten(2) if self.t2.ndim > 2 else self.t2.to(dtype)[..., None]
        inner = torch.einsum("mnk,nd->mdk", core, self.w2_b.to(dtype)).flatten(1)
        return self.w2_a.to(dtype).T, inner

    def first(self, dtype: torch.dtype) -> Tensor:
        """w1 (a, c) without scale."""
        whole = self._parameters["w1"]
        if whole is not None:
            return as_matrix(whole, dtype)
        pair = self._first_pair(dtype)
        assert pair is not None
        return pair[0] @ pair[1]

    def _second(self, dtype: torch.dtype) -> Tensor:
        """w2 (b, d·k)."""
        whole = self._parameters["w2"]
        if whole is not None:
            return as_matrix(whole, dtype)
        pair = self._second_pair(dtype)
        assert pair is not None
        return pair[0] @ pair[1]

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        b = self.blocks[1]
        first, second = self.first(dtype) * self.scale, self._second(dtype)
        row = torch.arange(start, stop, device=first.device)
        return (first[row // b][:, :, None] * second[row % b][:, None, :]).flatten(1)

    def _factors(self, dtype: torch.dtype) -> Pair | None:
        """(U_1 ⊗ U_2, V_1 ⊗ V_2), R = r_1 r_2; a whole factor counts with its smaller side."""
        pairs = [
            _trivial(self.first(dtype), self._first_pair(dtype)),
            _trivial(self._second(dtype), self._second_pair(dtype)),
        ]
        (u1, v1), (u2, v2) = pairs
        if u1.shape[1] * u2.shape[1] >= min(self.matrix_shape):
            return None
        return _kron(u1 * self.scale, u2), _kron(v1, v2)

    def svd(self, rule: Chooser | None = None) -> Triplet:
        """From the SVDs of the two factors: the singular values are all their products times
        |scale|."""
        self._require_additive("svd")
        if bad := self.nonfinite():
            raise UsageError(f"{self._at(bad[0])}: NaN or Inf; no SVD is defined.")
        first = dense_svd(self.first(torch.float32) * self.scale)
        pair = self._second_pair(torch.float32)
        if pair is None or pair[0].shape[1] >= min(pair[0].shape[0], pair[1].shape[1]):
            return kron_svd(first, dense_svd(self._second(torch.float32)), rule)
        return kron_svd(first, core_svd(*pair), rule)

    # --- training ---------------------------------------------------------------------------------

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
        factor: int = -1,
        decompose_both: bool = False,
        full_matrix: bool = False,
        **options: object,
    ) -> LoKr:
        """All factors kaiming-uniform but the last of w2 (w2, or w2_b; w2_a beside a core), which
        is 0 (LyCORIS).

        w2 is whole when rank >= max(b, d) / 2 or `full_matrix`; w1 is whole unless
        `decompose_both` and rank < max(a, c) / 2. factor: size of w1, see
        `linalg.factorization`. Both whole: scale 1 unless alpha is given, then alpha / rank.
        """
        rank = require_rank(cls, rank, weight, options)
        o, i, *kernel = weight.shape
        (a, b), (c, d) = factorization(o, factor), factorization(i, factor)
        cores = tucker and any(n > 1 for n in kernel)
        tensors: dict[str, Tensor | None] = {}
        if decompose_both and rank < max(a, c) / 2 and not full_matrix:
            tensors["w1_a"] = kaiming(weight, (a, rank), rank, generator)
            tensors["w1_b"] = kaiming(weight, (rank, c), c, generator)
        else:
            tensors["w1"] = kaiming(weight, (a, c), c, generator)
        if full_matrix or rank >= max(b, d) / 2:
            tensors["w2"] = torch.zeros(b, d, *kernel, device=weight.device)
        elif cores:
            tensors["w2_a"] = torch.zeros(rank, b, device=weight.device)
            tensors["w2_b"] = kaiming(weight, (rank, d), rank, generator)
            tensors["t2"] = kaiming(weight, (rank, rank, *kernel), rank, generator)
        else:
            columns = d * torch.Size(kernel).numel()
            tensors["w2_a"] = kaiming(weight, (b, rank), rank, generator)
            tensors["w2_b"] = torch.zeros(rank, columns, device=weight.device)
        adapter = cls(
            *(tensors.get(name) for name in cls.fields),
            kernel=tuple(kernel) or None,
            scale=1.0 if alpha is None else alpha / rank,
            stored=stored,
        )
        return trainable(adapter, dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        first, second = self.first(x.dtype), self._second(x.dtype)
        return kronecker_linear(x, weight, bias, first, second, self.number)

    def folds(self, weight: Tensor, positions: int) -> bool:
        """Small layers, where calls cost more than arithmetic: o·i (positions + 16) < CALL."""
        return weight.numel() * (positions + 16) < CALL

    def added(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        self._require_fit(tuple(weight.shape))
        a, b, c = self.blocks
        first, second = self.first(weight.dtype), self._second(weight.dtype)
        first = self.scaled(first) if is_one(strength) else first * (self.scale * strength)
        # the gradients of an outer product are two products
        outer = torch.mm(first.reshape(-1, 1), second.reshape(1, -1))
        change = outer.view(a, c, b, -1).transpose(1, 2)
        return (weight.reshape(change.shape) + change).view(weight.shape)

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """x as a (c, d) block per position: w2 along d, then w1 along c; w1 ⊗ w2 is never built."""
        if layer.kind == "embedding" or (layer.kind == "conv" and layer.groups > 1):
            return super().change(x, layer)
        a, b, c = self.blocks
        first = self.first(x.dtype) * self.scale
        if layer.kind == "hf_conv1d":  # the rows of the stored weight meet x
            h = x.unflatten(-1, (a, b)) @ self._second(x.dtype).to(x.dtype)
            return torch.einsum("...ad,ac->...cd", h, first.to(h.dtype)).flatten(-2)
        if layer.kind == "linear":
            h = self._through_second(x.reshape(-1, c, x.shape[-1] // c)).transpose(0, 1)
            h = first.to(h.dtype) @ h.reshape(c, -1)
            return h.view(a, -1, b).transpose(0, 1).reshape(*x.shape[:-1], a * b)
        if layer.kind != "conv":
            return super().change(x, layer)
        batch, size = x.shape[0], layer.kernel
        second = self._second(x.dtype).reshape(b, -1, *size)
        h = layer.convolve(x.unflatten(1, (c, -1)).flatten(0, 1), second, groups=1)
        h = h.unflatten(0, (batch, c))
        return torch.einsum("ncb...,ac->nab...", h, first.to(h.dtype)).flatten(1, 2)

    def _through_second(self, x: Tensor) -> Tensor:
        """x (…, d) times w2 transposed, through its factors when they are thinner."""
        pair = self._second_pair(x.dtype)
        if pair is None or pair[0].shape[1] >= min(pair[0].shape[0], pair[1].shape[1]):
            return F.linear(x, self._second(x.dtype))
        return F.linear(F.linear(x, pair[1]), pair[0])

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, common: Common) -> LoKr:
        return self.with_tensors(**cut_rows(self, start, stop), **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> LoKr:
        live = [p.adapter for p in parts if isinstance(p.adapter, LoKr)]
        return live[0].with_tensors(**joined_rows(parts, live, common.get("scale", 1.0)), **common)

    # --- fit --------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        source: WeightAdapter | Tensor,
        rank: RankRule | str | int | None = None,
        weight: Tensor | None = None,
        *,
        factor: int | None = -1,
        dtype: torch.dtype | None = None,
    ) -> LoKr:
        """ΔW -> the nearest w1 ⊗ w2 (`linalg.kronecker`), w2 then truncated to a rank.

        source, weight   as for `LoRA.fit`; a LoRA, LoHa or LoKr is fitted from its factors.
        rank             of w2, truncated to its best approximation; whole when None, or when the
                         rank reaches half of w2's longer side (LyCORIS and PEFT keep it whole too).
        factor           how both sides are cut, as `factorization` says; None takes the most exact
                         of the largest cuts with no more numbers than `source` has (of a dense
                         ΔW: than the cut of factor -1 has).

        A LoKr of rank None is returned as it is. CannotFit for 1-D weights; UsageError names a
        field with NaN or Inf.
        """
        if isinstance(source, WeightAdapter):
            require_finite(source)
            if isinstance(source, LoKr) and source.additive and rank is None and factor == -1:
                return source
        product, target, common = nearest_product(source, weight, factor)
        return cls.of_product(product, target, rank, dtype=dtype, **common)

    @classmethod
    def of_product(
        cls,
        product: Kronecker,
        target: tuple[int, ...],
        rank: RankRule | str | int | None = None,
        *,
        dtype: torch.dtype | None = None,
        **common: Unpack[Common],
    ) -> LoKr:
        """The adapter of A ⊗ B for a weight (o, i, *k), with B truncated to `rank`; see `fit`."""
        dtype = dtype or torch.float32
        (a, c), kernel = product.first.shape, tuple(target[2:])
        b, d = target[0] // a, target[1] // c
        first = product.first.to(dtype)
        if rank is not None and (pair := split_second(product.second, max(b, d), rank)):
            left, right = (t.to(dtype) for t in pair)
            return cls(w1=first, w2_a=left, w2_b=right, kernel=kernel or None, **common)
        return cls(w1=first, w2=product.second.to(dtype).reshape(b, d, *kernel), **common)


def _kron(x: Tensor, y: Tensor) -> Tensor:
    """x ⊗ y for matrices of any strides (torch.kron wants contiguous ones)."""
    blocks = x[:, None, :, None] * y[None, :, None, :]
    return blocks.reshape(x.shape[0] * y.shape[0], x.shape[1] * y.shape[1])


def _trivial(matrix: Tensor, pair: Pair | None) -> Pair:
    """The pair if it is thinner than the matrix, else the matrix and a small identity."""
    rows, columns = matrix.shape
    if pair is not None and pair[0].shape[1] < min(rows, columns):
        return pair
    one = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    return (matrix, one) if columns <= rows else (one, matrix)
