"""NF4, four bits per weight, in plain torch (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.errors import UsageError

BLOCK = 64


# Quantiles of N(0, 1) at 8 and at 7 evenly spaced probabilities between 0.9677083 and 1/2 on either
# side of 0, over the largest (appendix E of the paper), as bitsandbytes rounded them.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class NF4:
    """codes (n,) uint8 below 16 in row-major order; absmax (ceil(n / block),) fp32."""

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    block: int = BLOCK

    def dequantize(self) -> Tensor:
        """LEVELS[code] · absmax of its block, (shape) in fp32."""
        values = torch.tensor(LEVELS, device=self.codes.device)[self.codes.long()]
        scales = self.absmax.repeat_interleave(self.block)[: values.numel()]
        return (values * scales).reshape(self.shape)


def quantize(weight: Tensor, block: int = BLOCK) -> NF4:
    """Each weight, divided by the largest magnitude of its block, to the nearest level.

    Blocks of `block` run through the weight in row-major order; the last one may be short.
    UsageError for NaN or Inf, which no level stands for.
    """
    if block < 1:
        raise UsageError(f"NF4: got a block of {block}, expected at least 1.")
    flat = weight.detach().float().reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise UsageError("NF4: the weight holds NaN or Inf.")
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).reshape(-1, block)
    absmax = padded.abs().amax(1)
    unit = padded / torch.where(absmax > 0, absmax, 1.0)[:, None]
    steps = torch.tensor(LEVELS, device=flat.device)
    codes = torch.bucketize(unit, (steps[1:] + steps[:-1]) / 2)
    return NF4(
        codes.reshape(-1)[: flat.numel()].to(torch.uint8), absmax, tuple(weight.shape), block
    )
