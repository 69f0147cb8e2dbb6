"""VeRA, two vectors on random matrices that all layers share (Kopiczko et al. 2023, arXiv
2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..errors import CannotFuse, CannotSplit, UsageError
from .base import is_one
from .fresh import require_rank, trainable
from .layer import Layer
from .sized import SizedChange
from .slots import Part, bit_equal, join, ratio, scaled, stack_rows, widest
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .base import WeightAdapter


class VeRA(SizedChange):
    """ΔW = scale · (λ_b ⊙ up[:o]) (λ_d ⊙ down[:, :i]), rows scaled; transposed on a transformers
    Conv1D.

    lambda_b    (o,)
    lambda_d    (r,)
    down        (r, at least i), up (at least o, r): frozen, shared by the layers of one adapter and
                as large as its largest needs; or
    seed        they are drawn (`drawn`), for `widest` = (outputs, inputs) of the largest layers; 0
                inputs are not known, and the change is not known without them
    """

    algorithm = "vera"
    fields = ("lambda_b", "lambda_d")
    frozen = ("down", "up")
    options = ("down", "up", "seed", "widest", "sized")
    lambda_b: nn.Parameter
    lambda_d: nn.Parameter
    down: Tensor | None
    up: Tensor | None
    seed: int | None
    widest: tuple[int, int]

    def __init__(
        self,
        lambda_b: Tensor,
        lambda_d: Tensor,
        down: Tensor | None = None,
        up: Tensor | None = None,
        *,
        seed: int | None = None,
        widest: tuple[int, int] = (0, 0),
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        given = {"down": down, "up": up}
        self.__dict__.update(seed=seed, widest=widest, sized=sized, _given=given)
        super().__init__({"lambda_b": lambda_b, "lambda_d": lambda_d}, **common)

    def _known(self) -> tuple[int, int]:
        for name in self.fields:
            tensor = self._parameters[name]
            self._expect(name, tensor is not None and tensor.ndim == 1, "a vector")
        o, r = self.lambda_b.numel(), self.lambda_d.numel()
        if self.down is None and self.up is None and self.seed is not None and self.widest[1]:
            self._buffers["down"], self._buffers["up"] = drawn(self.seed, r, *self.widest)
        if self.down is not None or self.up is not None:
            a, b = self.down, self.up
            if a is None or a.ndim != 2 or a.shape[0] < r:
                found = "nothing" if a is None else f"shape {tuple(a.shape)}"
                raise UsageError(f"VeRA.down: got {found}, expected ({r}, inputs).")
            if b is None or b.ndim != 2 or b.shape[0] < o or b.shape[1] < r:
                found = "nothing" if b is None else f"shape {tuple(b.shape)}"
                raise UsageError(f"VeRA.up: got {found}, expected (at least {o}, {r}).")
        elif self.seed is None:
            raise UsageError("VeRA: neither projections nor the seed they are drawn from.")
        return (0, o) if self._turned else (o, 0)

    def _admits(self, rows: int, columns: int) -> bool:
        width = rows if self._turned else columns
        return self.down is None or width <= self.down.shape[1]

    def _trial(self) -> tuple[int, int]:
        width = TRIAL if self.down is None else self.down.shape[1]
        o = self.lambda_b.numel()
        return (width, o) if self._turned else (o, width)

    @property
    def complete(self) -> bool:
        return self.down is not None and super().complete

    def beside(self, other: WeightAdapter) -> SizedChange:
        """See `SizedChange.beside`. Where neither knows the inputs of the largest layer, both are
        drawn for a trial number of them."""
        placed = self
        if self.down is None:
            known = other.widest if isinstance(other, VeRA) and other.widest[1] else self.widest
            placed = self.with_tensors(widest=(known[0], known[1] or TRIAL))
        return super(VeRA, placed).beside(other)

    def same_options(self, other: SizedChange) -> bool:
        if not isinstance(other, VeRA):
            return False
        if self.seed is not None and self.down is None and other.down is None:
            return (self.seed, self.widest) == (other.seed, other.widest)
        r = self.lambda_d.numel()
        pairs = ((self.down, other.down), (self.up, other.up))
        same = all(bit_equal(a, b) for a, b in pairs)
        return same and r == other.lambda_d.numel()

    def _unknown(self, verb: str) -> str:
        return super()._unknown(verb) if self.down is not None else NOT_DRAWN

    @property
    def rank(self) -> int:
        return self.lambda_d.numel()

    def _sides(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(up (o, r) with both vectors, down (r, i)) of the layer, not of the stored weight."""
        if self.down is None or self.up is None:
            raise UsageError(NOT_DRAWN)
        r, o = self.rank, self.lambda_b.numel()
        i = self.matrix_shape[0] if self._turned else self.matrix_shape[1]
        b = self.up[:o, :r].to(self.lambda_b.device, dtype)
        gain = self.lambda_b.to(dtype)[:, None] * (self.lambda_d.to(dtype) * float(self.scale))
        return b * gain, self.down[:r, :i].to(self.lambda_d.device, dtype)

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        up, down = self._sides(dtype)
        return (up @ down[:, start:stop]).T if self._turned else up[start:stop] @ down

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.rank >= min(self.matrix_shape):
            return None
        up, down = self._sides(dtype)
        return (down.T, up.T) if self._turned else (up, down)

    def _raised(self, x: Tensor) -> Tensor:
        """up (scale · λ_d ⊙ down x): r numbers per position in between."""
        down, up = self.down, self.up
        assert down is not None
        assert up is not None
        gain = self.scaled(self.lambda_d)
        down = _corner(down, gain.shape[0], x.shape[-1], x)
        up = _corner(up, self.lambda_b.shape[0], gain.shape[0], x)
        return F.linear(F.linear(x, down) * gain.to(x.dtype), up)

    def _passes(self, layer: Layer) -> bool:
        return layer.kind in ("linear", "hf_conv1d") and self.down is not None

    def change(self, x: Tensor, layer: Layer) -> Tensor:
        """λ_b ⊙ up (scale · λ_d ⊙ down x)."""
        if not self._passes(layer):
            return super().change(x, layer)
        return self._raised(x) * self.lambda_b.to(x.dtype)

    def onto(self, y: Tensor, x: Tensor, layer: Layer, strength: float | Tensor = 1.0) -> Tensor:
        if not (self._passes(layer) and is_one(strength) and x.dtype == y.dtype):
            return super().onto(y, x, layer, strength)
        raised = self._raised(x)
        if raised.dtype != y.dtype:  # autocast
            return super().onto(y, x, layer, strength)
        return torch.addcmul(y, raised, self.lambda_b.to(y.dtype))

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, common: Common) -> VeRA:
        if self._turned:
            # rows of the stored weight are inputs: other columns of down, another VeRA
            down = None if self.down is None else self.down[:, start:stop]
            return VeRA(self.lambda_b, self.lambda_d, down, self.up, **common)
        if self.up is None:
            raise CannotSplit(NOT_DRAWN.rstrip("."))
        up = self.up[start:]
        cut = self._cut(start, stop)
        return VeRA(self.lambda_b[start:stop], self.lambda_d, self.down, up, sized=cut, **common)

    @classmethod
    def _fuse(cls, parts: Sequence[Part], common: Common) -> VeRA:
        live = [p.adapter for p in parts if isinstance(p.adapter, VeRA)]
        first = live[0]
        if any(a._turned or a.up is None for a in live):
            raise CannotFuse("a VeRA on a transposed layer, or without its projections")
        if not all(
            bit_equal(a.lambda_d, first.lambda_d) and bit_equal(a.down, first.down) for a in live
        ):
            raise CannotFuse(
                "the parts scale the shared projection by different vectors, and one VeRA has one; "
                "convert with --algorithm lora"
            )
        r = first.rank
        dtype = widest([a.lambda_b for a in live])
        vectors: list[Tensor] = []
        blocks: list[Tensor | int] = []
        for part in parts:
            own = part.adapter
            if isinstance(own, VeRA) and own.up is not None:
                factor = ratio(own, common.get("scale", 1.0))
                vectors.append(scaled(own.lambda_b, factor, dtype))
                blocks.append(own.up[: part.rows, :r])
            else:
                vectors.append(torch.zeros(part.rows, dtype=dtype, device=first.lambda_b.device))
                blocks.append(part.rows)
        up = stack_rows(blocks, [0] * len(blocks))
        sized = None if first.sized is None else (parts[-1].stop, *first.sized[1:])
        return VeRA(join(vectors), first.lambda_d, first.down, up, sized=sized, **common)

    # --- fresh ------------------------------------------------------------------------------------

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
        seed: int = 0,
        widest: tuple[int, int] | None = None,
        first: float = 0.1,
        **options: object,
    ) -> Self:
        """λ_b = 0, λ_d = `first` (PEFT d_initial), projections drawn from `seed`. No alpha: the
        vectors are the scale.

        widest   (outputs, inputs) of the largest layers, where several layers share the
                 projections as one PEFT adapter does; None: those of this weight.
        """
        rank = require_rank(cls, rank, weight, options)
        o, i = weight.shape[0], weight[0].numel()
        if stored == "conv1d":
            o, i = i, o
        down, up = drawn(seed, rank, *(widest or (o, i)))
        adapter = cls(
            torch.zeros(o, device=weight.device),
            torch.full((rank,), first, device=weight.device),
            down.to(weight.device),
            up.to(weight.device),
            seed=seed,
            widest=widest or (o, i),
            sized=tuple(weight.shape),
            stored=stored,
        )
        return trainable(adapter, dtype)


TRIAL = 16  # inputs, where none are known
NOT_DRAWN = (
    "VeRA: its projections were not saved (save_projection=False), and how they are drawn depends "
    "on the inputs of the largest layer; give the base."
)


def _corner(matrix: Tensor, rows: int, columns: int, like: Tensor) -> Tensor:
    """matrix[:rows, :columns] in the dtype and on the device of `like`."""
    if matrix.shape[0] != rows:
        matrix = matrix[:rows]
    if matrix.shape[1] != columns:
        matrix = matrix[:, :columns]
    return (
        matrix if matrix.dtype == like.dtype and matrix.device == like.device else matrix.to(like)
    )


@lru_cache(maxsize=8)
def drawn(seed: int, rank: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """(down (r, inputs), up (outputs, r)) as PEFT draws them (`tuners/vera/model.py`): one CPU
    generator, down first, each U(±√(6 / fan_in)), kaiming_uniform with a = 0."""
    generator = Generator("cpu").manual_seed(seed)
    found: list[Tensor] = []
    for shape in ((rank, inputs), (outputs, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        found.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return found[0], found[1]
