"""BOFT, butterflies of small rotations (Liu et al. 2023, arXiv 2311.06243), in PEFT's and LyCORIS's
forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..errors import CannotFuse, UsageError
from ..linalg import butterfly, cayley, half_cayley, skew_part, turn, turned_linear, within_norm
from .fresh import refuse_options
from .maps import (
    OTHER_INPUTS,
    MapAxis,
    WeightMap,
    between_blocks,
    block_size_of,
    channels_back,
    channels_last,
    join_vectors,
    vector_like,
)
from .one_node import OneNode
from .slots import Part, join
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .layer import Layer

Form = Literal["peft", "lycoris"]


class BOFT(OneNode, WeightMap):
    """W_1 = rescale · W Mᵀ (form "peft", inputs) or rescale · M W (form "lycoris", outputs), with
    M = B_{m-1} … B_0, B_k = Π_kᵀ blockdiag(D_k1 … D_kn) Π_k.

    blocks      R (m, n, b, b). peft: S = ½ (R - Rᵀ), D = (I + S)⁻¹ (I - S), Π_k brings halves of
                blocks together; inputs are the columns of the flattened weight, kernel included.
                lycoris: S = R - Rᵀ, D = (I - S)⁻¹ (I + S), Π_k brings single elements together.
    rescale     None or o factors of the outputs, any shape (PEFT boft_s, LyCORIS rescale)
    constraint  lycoris: ||S|| <= constraint over all blocks, scaled down as a whole
    """

    algorithm = "boft"
    fields = ("blocks", "rescale")
    options = ("form", "constraint", "sized")
    sides = ("input", "both")
    blocks: nn.Parameter
    rescale: nn.Parameter | None
    form: Form
    constraint: float | None

    def __init__(
        self,
        blocks: Tensor,
        rescale: Tensor | None = None,
        *,
        form: Form = "peft",
        constraint: float | None = None,
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.__dict__.update(form=form, constraint=constraint, sized=sized)
        super().__init__({"blocks": blocks, "rescale": rescale}, **common)

    @property
    def acts_on(self) -> MapAxis:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "in" if self.form == "peft" else "out"

    @property
    def width(self) -> int:
        """Number of values the butterfly acts on."""
        return self.blocks.shape[1] * self.blocks.shape[2]

    @property
    def span(self) -> int:
        """Neighbouring values the butterfly mixes: b · 2^(m-1)."""
        return self.blocks.shape[2] * 2 ** (self.blocks.shape[0] - 1)

    def _known(self) -> tuple[int, ...]:
        r = self.blocks
        square = r is not None and r.ndim == 4 and r.shape[2] == r.shape[3]
        self._expect("blocks", square, "(factors, blocks, b, b)")
        plain = self.form == "peft" and r.shape[0] == 1
        good = plain or (r.shape[2] % 2 == 0 and self.width % self.span == 0)
        self._expect("blocks", good, f"an even b, and n·b a multiple of b · 2^{r.shape[0] - 1}")
        if self.form == "lycoris":
            if self.rescale is not None:
                self._expect("rescale", self.rescale.numel() == self.width, f"{self.width} values")
            return self.width, 0
        if self.constraint is not None:
            raise UsageError("BOFT.constraint: belongs to the form 'lycoris'.")
        return (0 if self.rescale is None else self.rescale.numel()), self.width

    def _admits(self, shape: tuple[int, ...]) -> bool:
        if len(shape) < 2:
            return False
        if self.form == "lycoris":
            return shape[0] == self.width
        rows = self.rescale is None or self.rescale.numel() == shape[0]
        return rows and math.prod(shape[1:]) == self.width

    def skew(self, dtype: torch.dtype) -> Tensor:
        """S (m, n, b, b)."""
        s = skew_part(self.blocks.to(dtype))
        if self.form == "peft":
            return s / 2
        return s if self.constraint is None else within_norm(s, self.constraint, each=False)

    def rotations(self, dtype: torch.dtype) -> Tensor:
        """D (m, n, b, b)."""
        if self.form == "lycoris":
            return cayley(self.skew(dtype))
        inverse = half_cayley(self.blocks.to(dtype))
        eye = torch.eye(inverse.shape[-1], dtype=dtype, device=inverse.device)
        return torch.add(-eye, inverse, alpha=2)

    def _turn(self, x: Tensor, dtype: torch.dtype, *, inverse: bool = False) -> Tensor:
        blocks = self.rotations(dtype).to(x.dtype)
        if self.form == "peft" and blocks.shape[0] == 1:  # halves that are neighbours already
            only = blocks.squeeze(0)
            return turn(x, only.mT if inverse else only)
        return butterfly(x, blocks, chunks=self.form == "peft", inverse=inverse)

    def _map(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        inputs = self.form == "peft"
        turned = self._turn(flat, flat.dtype) if inputs else self._turn(flat.T, flat.dtype).T
        if self.rescale is not None:
            turned = turned * self.rescale.to(flat.dtype).reshape(-1, 1)
        return turned.reshape(weight.shape)

    @property
    def side(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """PEFT's form changes both sides of the weight as soon as it rescales."""
        side = super().side
        if self.form == "lycoris" or self.rescale is None:
            return side
        return "both" if side == "input" else "weight"

    def mapped(
        self, y: Tensor, layer: Layer, bias: Tensor | None, strength: float | Tensor
    ) -> Tensor:
        if self.form == "lycoris":
            return super().mapped(y, layer, bias, strength)
        assert self.rescale is not None
        factor = self.rescale.to(y.dtype).reshape(-1, *[1] * (-1 - layer.out_axis))
        if bias is None:
            return y * factor
        shift = bias.to(y.dtype).reshape(factor.shape)
        return torch.addcmul(shift, y - shift, factor)

    def _channels(self, y: Tensor, axis: int, *, transposed: bool) -> Tensor:
        y = channels_last(y, axis)
        rescale = self.rescale if self.form == "lycoris" else None
        factor = None if rescale is None else rescale.to(y.dtype).reshape(-1)
        if factor is not None and transposed:
            y = y * factor
        y = self._turn(y, torch.promote_types(y.dtype, torch.float32), inverse=transposed)
        if factor is not None and not transposed:
            y = y * factor
        return channels_back(y, axis)

    def joins(self, weight: Tensor, positions: int) -> bool:
        return self.form == "peft" and self.blocks.shape[0] == 1

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own = self._parameters
        blocks = own["blocks"]
        assert blocks is not None
        return turned_linear(x, blocks, weight, bias, own["rescale"])

    def _changes_nothing(self) -> bool:
        if self.rescale is not None and bool((self.rescale != 1).any()):
            return False
        return bool((self.blocks == self.blocks.mT).all())

    # --- rows -------------------------------------------------------------------------------------

    def _plain(self) -> Tensor:
        """The blocks, the constraint worked in."""
        if self.constraint is None:
            return self.blocks
        return torch.triu(self.skew(torch.float32).detach(), 1)

    def _cut(self, start: int, stop: int) -> dict[str, object]:
        changes: dict[str, object] = {}
        if self.form == "lycoris":
            between_blocks("this butterfly", self.span, start, stop, self.shape[0])
            b = self.blocks.shape[2]
            changes = {"blocks": self._plain()[:, start // b : stop // b], "constraint": None}
        if self.rescale is not None:
            changes["rescale"] = vector_like(self.rescale, start, stop)
        return changes

    @classmethod
    def _joined(cls, parts: Sequence[Part]) -> dict[str, object]:
        live = [p.adapter for p in parts if isinstance(p.adapter, BOFT)]
        first = live[0]
        rescale = join_vectors(parts, "rescale")
        if any(a.form == "peft" for a in live):
            if len(live) < len(parts) or not all(a.same_map(first, ("blocks",)) for a in live):
                raise CannotFuse(OTHER_INPUTS)
            return {"rescale": rescale}
        m, _, b, _ = first.blocks.shape
        if any((a.blocks.shape[0], a.blocks.shape[2]) != (m, b) for a in live):
            raise CannotFuse("the parts are butterflies of different depths or block sizes")
        pieces: list[Tensor] = []
        for part in parts:
            if part.start % first.span or part.rows % first.span:
                raise CannotFuse(
                    f"this butterfly mixes {first.span} neighbouring outputs, and a part has "
                    f"{part.rows} rows"
                )
            if isinstance(part.adapter, BOFT):
                pieces.append(part.adapter._plain())
            else:
                pieces.append(first.blocks.new_zeros(m, part.rows // b, b, b))
        return {"blocks": join(pieces, 1), "constraint": None, "rescale": rescale}

    # --- init -------------------------------------------------------------------------------------

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
        factors: int = 1,
        form: Form = "peft",
        constraint: float | None = None,
        rescaled: bool | None = None,
        **options: object,
    ) -> Self:
        """M = I and rescale 1 exactly. `rank` is the number of blocks, or give `block_size`;
        `factors` is m. `rescaled` is what the form's own tool does when missing: PEFT yes, LyCORIS
        no. `alpha` has no meaning here."""
        refuse_options(cls, options)
        width = math.prod(weight.shape[1:]) if form == "peft" else weight.shape[0]
        size = block_size_of("BOFT", width, rank, block_size, least=2)
        place = {"device": weight.device, "dtype": dtype}
        blocks = nn.Parameter(torch.zeros(factors, width // size, size, size, **place))
        rescale = None
        if rescaled or (rescaled is None and form == "peft"):
            o, ones = weight.shape[0], [1] * (weight.ndim - 1)
            shape = (1, o) if form == "peft" and weight.ndim > 2 else (o, *ones)
            rescale = nn.Parameter(torch.ones(shape, **place))
        return cls(
            blocks,
            rescale,
            form=form,
            constraint=constraint,
            stored=stored,
            sized=tuple(weight.shape),
        )
