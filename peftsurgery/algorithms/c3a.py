"""C3A, circular convolution on blocks (Chen et al. 2024, arXiv 2407.19342)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from ..errors import CannotFuse, CannotSplit, UsageError
from .base import WeightAdapter
from .fresh import refuse_options, trainable
from .layer import Layer
from .sized import dense_of
from .slots import Part, ratio, scaled, widest
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class _Correlated(torch.autograd.Function):
    """y_m[p] = scale Σ_nq w_mn[(q - p) mod b] x_n[q], x (…, n·b), w (m, n, b), through the
    transforms of blocks: Y_m = Σ_n X_n conj(W_mn). With the gradient G_m, that of x_n is
    Σ_m G_m W_mn, that of w_mn is conj(G_m) X_n, summed over positions.

    Kept for the backward pass are x and w and not their transforms, which take twice the room.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, scale)
        n, b = w.shape[1:]
        exact = torch.promote_types(x.dtype, torch.float32)
        waves = torch.fft.rfft(x.to(exact).unflatten(-1, (n, b)))
        found = torch.einsum("...nk,mnk->...mk", waves, torch.fft.rfft(w.to(exact) * scale).conj())
        return torch.fft.irfft(found, n=b).flatten(-2).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, scale = tuple(ctx.saved_tensors)
        for_x, for_w, _ = tuple(ctx.needs_input_grad)
        m, n, b = w.shape
        exact = torch.promote_types(x.dtype, torch.float32)
        of_x = of_w = None
        waves = torch.fft.rfft(grad.to(exact).unflatten(-1, (m, b))) * scale
        if for_x:
            found = torch.einsum("...mk,mnk->...nk", waves, torch.fft.rfft(w.to(exact)))
            of_x = torch.fft.irfft(found, n=b).flatten(-2).to(x.dtype)
        if for_w:
            inputs = torch.fft.rfft(x.to(exact).unflatten(-1, (n, b)))
            found = torch.einsum("...mk,...nk->mnk", waves.conj(), inputs)
            of_w = torch.fft.irfft(found, n=b).to(w.dtype)
        return of_x, of_w, None


class C3A(WeightAdapter):
    """ΔW = scale · [C(w_mn)], a circulant block for each pair of a block of outputs and one of
    inputs: C(w)[p, q] = w[(q - p) mod b].

    kernel    (o / b, i / b, b)

    PEFT's scale is 1 / i.
    """

    algorithm = "c3a"
    fields = ("kernel",)
    kernel: nn.Parameter

    def __init__(self, kernel: Tensor, **common: Unpack[Common]) -> None:
        super().__init__({"kernel": kernel}, **common)

    def _measure(self) -> tuple[int, ...]:
        good = self.kernel is not None and self.kernel.ndim == 3
        self._expect("kernel", good, "(out / b, in / b, b)")
        m, n, b = self.kernel.shape
        return m * b, n * b

    @property
    def block_size(self) -> int:
        return self.kernel.shape[2]

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        b = self.block_size
        row = torch.arange(start, stop, device=self.kernel.device)
        place = (torch.arange(b, device=row.device) - row[:, None]) % b
        kernel = self.kernel[torch.div(row, b, rounding_mode="floor")].to(dtype)
        blocks = kernel.gather(2, place[:, None, :].expand(-1, self.kernel.shape[1], -1))
        return blocks.flatten(1) * float(self.scale)

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """Correlation of each block of x with its kernels, through FFTs of length b. The gradient
        has no gradient itself (RuntimeError)."""
        if layer.kind != "linear":
            return super().change(x, layer)
        return _Correlated.apply(x, self.kernel, self.scale)

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, common: Common) -> C3A:
        b = self.block_size
        if start % b or stop % b:
            raise CannotSplit(
                f"C3A repeats {b} numbers over {b} outputs, and rows {start}:{stop} of "
                f"{self.shape[0]} cut such a block in two"
            )
        return C3A(self.kernel[start // b : stop // b], **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> C3A:
        live = [p.adapter for p in parts if isinstance(p.adapter, C3A)]
        b = live[0].block_size
        if any(a.block_size != b for a in live):
            raise CannotFuse("C3A blocks of different sizes; convert with --algorithm lora")
        dtype = widest([a.kernel for a in live])
        pieces: list[Tensor] = []
        for part in parts:
            if isinstance(part.adapter, C3A):
                factor = ratio(part.adapter, common.get("scale", 1.0))
                pieces.append(scaled(part.adapter.kernel, factor, dtype))
            elif part.rows % b:
                raise CannotFuse(f"{part.rows} untouched rows are no whole C3A blocks of {b}")
            else:
                like = live[0].kernel
                pieces.append(like.new_zeros(part.rows // b, *like.shape[1:], dtype=dtype))
        return C3A(torch.cat(pieces), **common)

    # --- fresh and fitted -------------------------------------------------------------------------

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
        block_size: int | None = None,
        **options: object,
    ) -> Self:
        """kernel = 0 (PEFT's own default draws it, which changes the model from the start), scale
        1 / i. block_size divides both sides of the weight; rank and alpha have no meaning here."""
        refuse_options(cls, options)
        if block_size is None:
            raise UsageError("C3A: give block_size, a common divisor of inputs and outputs.")
        m, n = _blocks(weight.flatten(1) if weight.ndim > 1 else weight[None], block_size)
        kernel = torch.zeros(m, n, block_size, device=weight.device)
        return trainable(cls(kernel, scale=1 / (n * block_size), stored=stored), dtype)

    @classmethod
    def fit(
        cls,
        source: WeightAdapter | Tensor,
        block_size: int,
        weight: Tensor | None = None,
    ) -> C3A:
        """ΔW -> the nearest C3A in the Frobenius norm, the mean over each circular diagonal, with
        scale 1 / i."""
        dense, _ = dense_of(source, weight)
        m, n = _blocks(dense, block_size)
        b, common = block_size, Common()
        if isinstance(source, WeightAdapter):
            common = source.common()
        common.update(scale=1 / (n * b), magnitude=None, magnitude_axis=None)
        place = (torch.arange(b)[None] + torch.arange(b)[:, None]) % b  # row p, shift l -> column
        blocks = dense.reshape(m, b, n, b).permute(0, 2, 1, 3)
        turned = blocks.gather(3, place.to(dense.device).expand(m, n, b, b))
        return cls(turned.mean(2) * (n * b), **common)


def _blocks(matrix: Tensor, size: int) -> tuple[int, int]:
    o, i = matrix.shape
    if size < 1 or o % size or i % size:
        raise UsageError(f"C3A: blocks of {size} do not divide a weight {o} x {i}.")
    return o // size, i // size
