"""FourierFT, a few frequencies of ΔW at random places (Gao et al. 2024, arXiv 2405.03003)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from ..errors import CannotFuse, CannotSplit, UsageError
from .base import is_one
from .fresh import refuse_options, trainable
from .layer import Layer, add_product
from .sized import SizedChange
from .slots import Part
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .base import WeightAdapter


Pair = tuple[Tensor, Tensor]


class FourierFT(SizedChange):
    """ΔW = scale · Re ifft2(S): S (o, i) holds the spectrum at places drawn from a seed and is 0
    elsewhere. ΔW[p, q] = scale / (o i) · Σ_f s_f cos 2π (u_f p / o + v_f q / i). Transposed on a
    transformers Conv1D.

    spectrum    (n,), real
    seed        of the places: the first n of a permutation of o · i (`places`); the file does not
                hold them, so the change is known only with the weight's shape
    """

    algorithm = "fourierft"
    fields = ("spectrum",)
    options = ("seed", "sized")
    spectrum: nn.Parameter
    seed: int

    def __init__(
        self,
        spectrum: Tensor,
        *,
        seed: int = 777,
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.__dict__.update(seed=seed, sized=sized)
        super().__init__({"spectrum": spectrum}, **common)

    def _known(self) -> tuple[int, int]:
        self._expect("spectrum", self.spectrum is not None and self.spectrum.ndim == 1, "(n,)")
        return 0, 0

    def _admits(self, rows: int, columns: int) -> bool:
        return self.spectrum.numel() <= rows * columns

    def _trial(self) -> tuple[int, int]:
        side = max(16, math.isqrt(self.spectrum.numel()) + 1)
        return side, side

    def _places(self) -> tuple[Tensor, Tensor, int, int]:
        """(u, v, o, i) of the layer, not of the stored weight."""
        o, i = self.matrix_shape
        if self._turned:
            o, i = i, o
        flat = places(self.seed, self.spectrum.numel(), o * i).to(self.spectrum.device)
        return flat // i, flat % i, o, i

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Of these rows alone: one sum over the frequencies and one FFT per row."""
        u, v, o, i = self._places()
        if self._turned:
            u, v, o, i = v, u, i, o
        real = torch.float64 if dtype == torch.float64 else torch.float32
        p = torch.arange(start, stop, device=u.device)
        angle = (p[:, None] * u % o).to(real) * (2 * math.pi / o)
        weighted = torch.complex(angle.cos(), angle.sin()) * self.spectrum.to(real)
        rows = torch.zeros(stop - start, i, dtype=weighted.dtype, device=u.device)
        rows = rows.index_add(1, v, weighted)
        return (torch.fft.ifft(rows, dim=1).real * (float(self.scale) / o)).to(dtype)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """cos (a + b) = cos a cos b - sin a sin b: two ranks for each frequency."""
        n, (rows, columns) = self.spectrum.numel(), self.matrix_shape
        if 2 * n >= min(rows, columns):
            return None
        up, down = self._waves(dtype)
        gain = self.spectrum.to(dtype) * float(self.scale)
        up = (up.view(-1, 2, n) * gain).flatten(1)
        return (down.T, up.T) if self._turned else (up, down)

    def _waves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`waves` of the layer."""
        o, i = reversed(self.matrix_shape) if self._turned else self.matrix_shape
        return waves(self.seed, self.spectrum.numel(), o, i, dtype, self.spectrum.device)

    @property
    def _few(self) -> bool:
        """Whether two products with the waves take less time than two FFTs per position: about n <
        45 log2 of a side."""
        n, (rows, columns) = self.spectrum.numel(), self.matrix_shape
        fast = 90 * (rows * math.log2(rows) + columns * math.log2(columns))
        return 2 * n * (rows + columns) < fast

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """Of few frequencies by their waves, of many by two FFTs per position; never through a
        dense ΔW: y = Re ifft_o(C), C[u_f] += s_f X[v_f], X = ifft_i(x)."""
        if layer.kind not in ("linear", "hf_conv1d"):
            return super().change(x, layer)
        exact = torch.promote_types(x.dtype, torch.float32)
        if self._few:
            h, up = self._halves(x.to(exact))
            return (h @ up.T).to(x.dtype).view(*x.shape[:-1], -1)
        u, v, o, _ = self._places()
        waves = torch.fft.ifft(x.to(exact), dim=-1)
        gain = self.scaled(self.spectrum).to(waves.real.dtype)
        found = torch.zeros(*x.shape[:-1], o, dtype=waves.dtype, device=x.device)
        found = found.index_add(-1, u, waves.index_select(-1, v) * gain)
        return torch.fft.ifft(found, dim=-1).real.to(x.dtype)

    def onto(self, y: Tensor, x: Tensor, layer: Layer, strength: float | Tensor = 1.0) -> Tensor:
        plain = is_one(strength) and x.dtype == y.dtype == torch.float32
        if layer.kind not in ("linear", "hf_conv1d") or not plain or not self._few:
            return super().onto(y, x, layer, strength)
        h, up = self._halves(x)
        return add_product(y, h, up.T)

    def _halves(self, x: Tensor) -> Pair:
        """(down x (positions, 2n), up with the spectrum), whose product is the change."""
        up, down = self._waves(x.dtype)
        gain = (self.spectrum * self.scale).to(x.dtype)
        gained = (up.view(up.shape[0], 2, -1) * gain).view(up.shape)
        return x.reshape(-1, x.shape[-1]) @ down.T, gained

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, common: Common) -> WeightAdapter:
        raise CannotSplit("every frequency of a FourierFT runs over all rows")

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> WeightAdapter:
        raise CannotFuse(
            "the spectra of several weights are not the spectrum of one; convert with --algorithm "
            "lora"
        )

    @classmethod
    def init(
        cls,
        weight: Tensor,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        generator: Generator | None = None,
        stored: str = "linear",
        dtype: torch.dtype = torch.float32,
        frequencies: int | None = None,
        seed: int = 777,
        scaling: float = 150.0,
        **options: object,
    ) -> Self:
        """spectrum = 0 (PEFT's own default is N(0, 1), which changes the model from the start).

        frequencies    n (None: 1000, or all of a smaller weight); scaling is PEFT's; rank and alpha
                       have no meaning here
        """
        refuse_options(cls, options)
        count = min(1000, weight.numel()) if frequencies is None else frequencies
        if count < 1 or weight.ndim < 2:
            raise UsageError(f"FourierFT: {count} frequencies of a weight {list(weight.shape)}.")
        spectrum = torch.zeros(count, device=weight.device)
        adapter = cls(spectrum, seed=seed, sized=tuple(weight.shape), scale=scaling, stored=stored)
        return trainable(adapter, dtype)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def waves(
    seed: int, count: int, o: int, i: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(up (o, 2n), down (2n, i)): ΔW = scale · up diag(s, s) down, as cos (a + b) = cos a cos b -
    sin a sin b. Shared by all layers of one shape."""
    flat = places(seed, count, o * i).to(device)
    p = torch.arange(o, device=device)[:, None] * (flat // i) % o
    q = torch.arange(i, device=device)[:, None] * (flat % i) % i
    a, b = p.to(dtype) * (2 * math.pi / o), q.to(dtype) * (2 * math.pi / i)
    up = torch.cat([a.cos(), -a.sin()], 1) / (o * i)
    return up, torch.cat([b.cos(), b.sin()], 1).T.contiguous()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def places(seed: int, count: int, size: int) -> Tensor:
    """(n,) flat indices: the first n of torch.randperm(o · i) from a CPU generator of this seed, as
    PEFT draws them (`tuners/fourierft/layer.py`)."""
    return torch.randperm(size, generator=Generator().manual_seed(seed))[:count].clone()
