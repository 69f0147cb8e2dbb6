"""What an adapter needs to know of the layer it sits on: pure functions of x, weight and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedError

Kind = Literal["linear", "conv", "embedding", "hf_conv1d", "norm", "parameter"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def add_product(y: Tensor, h: Tensor, matrix: Tensor) -> Tensor:
    """y + h matrix in y's dtype, in one call where the dtypes are equal: y (…, o), h (positions,
    r), matrix (r, o).
    """
    shape = y.shape
    flat = y if len(shape) == 2 else y.reshape(-1, shape[-1])
    if flat.dtype == h.dtype == matrix.dtype:
        flat = torch.addmm(flat, h, matrix)
    else:
        flat = flat + (h @ matrix.to(h.dtype)).to(flat.dtype)
    return flat if flat.shape == shape else flat.view(shape)


def as_matrix(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, everything else) in this dtype; the tensor itself where it is that already."""
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.ndim == 2 else tensor.flatten(1)


@dataclass(frozen=True)
class Layer:
    """How a layer uses its weight.

    linear       y = x Wᵀ + b, W (o, i), x (…, i)
    hf_conv1d    y = x W + b, W (i, o): transformers' Conv1D, adapters with stored "conv1d"
    conv         y = conv(x, W) + b, W (o, i / groups, *k), x (B, i, *spatial)
    embedding    y = output_scale · W[x], W (V, d), x integers; rows longer than `max_norm` are
                 shortened to it as torch does, but in the result and not in W
    norm, parameter   no activation path: the layer is run with the composed weight

    padding_idx  its row gets no gradient; the result is that of any other row
    padding      one number per spatial dimension, or "same" / "valid"
    """

    kind: Kind
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    kernel: tuple[int, ...] = ()
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    output_scale: float | Tensor = 1.0

    @property
    def stored(self) -> str:
        """The `stored` of adapters on such a layer: "linear", "embedding" or "conv1d"."""
        return {"embedding": "embedding", "hf_conv1d": "conv1d"}.get(self.kind, "linear")

    @property
    def in_axis(self) -> int:
        """Channel axis of x: -1, or -(n + 1) for a convolution over n dimensions."""
        return -(len(self.kernel) + 1) if self.kind == "conv" else -1

    @property
    def out_axis(self) -> int:
        """Channel axis of y."""
        return self.in_axis

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the layer with this weight, in its stored orientation.

        UnsupportedError for norms and bare parameters, which have no function of x alone.
        """
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        if self.kind == "hf_conv1d":
            y = x @ weight
            return y if bias is None else y + bias
        if self.kind == "conv":
            return self.convolve(x, weight, bias)
        if self.kind == "embedding":
            return self._embed(x, weight)
        raise UnsupportedError(
            f"a {self.kind} has no activation path; run it with the composed weight."
        )

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int | None = None
    ) -> Tensor:
        """The convolution with this layer's stride, padding and dilation; other channel counts and
        `groups` are welcome as long as the kernel's size is the layer's.
        """
        function = _CONVOLUTIONS[len(self.kernel)]
        groups = self.groups if groups is None else groups
        if self.padding_mode == "zeros":
            return function(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        padded = F.pad(x, self._pads(), mode=self.padding_mode)
        return function(padded, weight, bias, self.stride, 0, self.dilation, groups)

    def _pads(self) -> list[int]:
        """F.pad's list, last dimension first."""
        pads: list[int] = []
        for n in reversed(range(len(self.kernel))):
            if self.padding == "valid":
                pads += [0, 0]
            elif self.padding == "same":
                total = self.dilation[n] * (self.kernel[n] - 1)
                pads += [total // 2, total - total // 2]
            else:
                pads += [int(self.padding[n])] * 2
        return pads

    def _embed(self, x: Tensor, weight: Tensor) -> Tensor:
        y = F.embedding(x, weight, self.padding_idx)
        if self.max_norm is not None:
            norm = torch.linalg.vector_norm(y.detach(), self.norm_type, dim=-1, keepdim=True)
            y = y * torch.where(norm > self.max_norm, self.max_norm / (norm + 1e-7), 1.0)
        return self.scaled(y)

    def scaled(self, y: Tensor) -> Tensor:
        """output_scale · y in y's dtype."""
        scale = self.output_scale
        if isinstance(scale, Tensor):
            return y * scale.to(y.dtype)
        return y if scale == 1 else y * scale
