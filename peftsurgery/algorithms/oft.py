"""OFT, a block-diagonal rotation of inputs or outputs (Qiu et al. 2023, arXiv 2306.07280; OFTv2,
Qiu et al. 2025, arXiv 2506.19847)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CannotFuse, UsageError
from ..linalg import cayley, cayley_neumann, skew_from_vector, skew_part, turn, within_norm
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
from .slots import Part, join
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class OFT(WeightMap):
    """W_1 = W Dᵀ on inputs, or W_1 = rescale · D W on outputs, with D = blockdiag(D_1 … D_n).

    D_k = C(S_k) or its transpose (`inverse`), C(S) = (I + S)(I - S)⁻¹ or the first terms of its
    series. Inputs are the columns of the flattened weight, kernel positions included.

    vector      (n, b(b-1)/2), the upper triangles of S_k (PEFT, OneTrainer), or
    blocks      (n, b, b) with S_k = B_k - B_kᵀ (LyCORIS, Kohya)
    rescale     None or o factors of the outputs after the rotation, any shape
    series      0: exact Cayley; else PEFT's number of Neumann terms (see linalg.cayley_neumann)
    half_last   the last term has half the weight (PEFT since 0.18)
    limit       COFT: ||S_k|| <= limit / √n, projected
    constraint  ||(S_1 … S_n)|| <= constraint, scaled down as a whole
    spread      S is divided by it (OneTrainer's scaled OFT: 2 √(b - 1))
    shared      one block repeated over all inputs; n is 1
    """

    algorithm = "oft"
    fields = ("vector", "blocks", "rescale")
    options = (
        "acts_on",
        "series",
        "half_last",
        "inverse",
        "limit",
        "constraint",
        "spread",
        "shared",
        "sized",
    )
    vector: nn.Parameter | None
    blocks: nn.Parameter | None
    rescale: nn.Parameter | None

    def __init__(
        self,
        vector: Tensor | None = None,
        blocks: Tensor | None = None,
        rescale: Tensor | None = None,
        *,
        acts_on: MapAxis = "in",
        series: int = 0,
        half_last: bool = True,
        inverse: bool = False,
        limit: float | None = None,
        constraint: float | None = None,
        spread: float = 1.0,
        shared: bool = False,
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.__dict__.update(
            acts_on=acts_on,
            series=series,
            half_last=half_last,
            inverse=inverse,
            limit=limit,
            constraint=constraint,
            spread=spread,
            shared=shared,
            sized=sized,
        )
        super().__init__({"vector": vector, "blocks": blocks, "rescale": rescale}, **common)

    acts_on: MapAxis
    series: int
    half_last: bool
    inverse: bool
    limit: float | None
    constraint: float | None
    spread: float
    shared: bool

    def _known(self) -> tuple[int, ...]:
        if (self.vector is None) == (self.blocks is None):
            raise UsageError("OFT: needs either a vector or blocks.")
        if self.vector is not None:
            size = self.block_size
            good = self.vector.ndim == 2 and size * (size - 1) // 2 == self.vector.shape[1]
            self._expect("vector", good, "(blocks, b(b-1)/2) for a whole b")
        else:
            assert self.blocks is not None
            good = self.blocks.ndim == 3 and self.blocks.shape[1] == self.blocks.shape[2]
            self._expect("blocks", good, "(blocks, b, b)")
        width = self.count * self.block_size
        if self.shared:
            name = "vector" if self.blocks is None else "blocks"
            self._expect(name, self.count == 1, "one shared block")
            width = 0
        if self.rescale is not None:
            good = self.acts_on == "out" and self.rescale.numel() == width
            self._expect("rescale", good, f"{width} values, on outputs only")
        return (0, width) if self.acts_on == "in" else (width, 0)

    def _admits(self, shape: tuple[int, ...]) -> bool:
        if len(shape) < 2:
            return False
        width = math.prod(shape[1:]) if self.acts_on == "in" else shape[0]
        if self.shared:
            return width % self.block_size == 0
        return width == self.count * self.block_size

    @property
    def count(self) -> int:
        """Number of stored blocks."""
        tensor = self.vector if self.vector is not None else self.blocks
        assert tensor is not None
        return tensor.shape[0]

    @property
    def block_size(self) -> int:
        """b; for a vector the root of b(b-1)/2 = length, rounded."""
        if self.vector is not None:
            return (1 + math.isqrt(1 + 8 * self.vector.shape[-1])) // 2
        assert self.blocks is not None
        return self.blocks.shape[-1]

    def skew(self, dtype: torch.dtype) -> Tensor:
        """S (n, b, b) after projection, constraint and spread."""
        if self.vector is not None:
            s = skew_from_vector(self.vector.to(dtype), self.block_size)
        else:
            assert self.blocks is not None
            s = skew_part(self.blocks.to(dtype))
        if self.limit is not None:
            s = within_norm(s, self.limit / math.sqrt(self.count), each=True)
        if self.constraint is not None:
            s = within_norm(s, self.constraint, each=False)
        return s if self.spread == 1 else s / self.spread

    def rotation(self, dtype: torch.dtype) -> Tensor:
        """D (n, b, b)."""
        s = self.skew(dtype)
        if self.series:
            d = cayley_neumann(s, self.series, half_last=self.half_last)
            return d.mT if self.inverse else d
        return cayley(-s if self.inverse else s)

    def _spread_over(self, width: int, dtype: torch.dtype) -> Tensor:
        blocks = self.rotation(dtype)
        return blocks.expand(width // self.block_size, -1, -1) if self.shared else blocks

    def _map(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        if self.acts_on == "in":
            return turn(flat, self._spread_over(flat.shape[1], flat.dtype)).reshape(weight.shape)
        turned = turn(flat.T, self._spread_over(flat.shape[0], flat.dtype)).T
        if self.rescale is not None:
            turned = turned * self.rescale.to(flat.dtype).reshape(-1, 1)
        return turned.reshape(weight.shape)

    def _channels(self, y: Tensor, axis: int, *, transposed: bool) -> Tensor:
        y = channels_last(y, axis)
        dtype = torch.promote_types(y.dtype, torch.float32)
        blocks = self._spread_over(y.shape[-1], dtype).to(y.dtype)
        if self.rescale is not None and transposed:
            y = y * self.rescale.to(y.dtype).reshape(-1)
        y = turn(y, blocks.mT if transposed else blocks)
        if self.rescale is not None and not transposed:
            y = y * self.rescale.to(y.dtype).reshape(-1)
        return channels_back(y, axis)

    def _changes_nothing(self) -> bool:
        if self.rescale is not None and bool((self.rescale != 1).any()):
            return False
        return not bool((self.skew(torch.float32) != 0).any())

    # --- rows -------------------------------------------------------------------------------------

    def _as_blocks(self) -> dict[str, object]:
        """The skew matrices with constraint and spread worked in, as blocks: B - Bᵀ = S."""
        if self.constraint is None:
            return {"blocks": self.blocks}
        upper = torch.triu(self.skew(torch.float32).detach(), 1)
        return {"blocks": upper, "constraint": None, "spread": 1.0}

    def _cut(self, start: int, stop: int) -> dict[str, object]:
        if self.acts_on == "in":
            return {}
        low, high = between_blocks("OFT", self.block_size, start, stop, self.shape[0])
        changes: dict[str, object] = {}
        if self.shared:
            pass
        elif self.vector is not None and self.constraint is None:
            changes = {"vector": self.vector[low:high]}
        else:
            changes = self._as_blocks()
            changes["blocks"] = changes["blocks"][low:high]  # pyright: ignore[reportIndexIssue]
            changes["vector"] = None
        if self.rescale is not None:
            changes["rescale"] = vector_like(self.rescale, start, stop)
        return changes

    @classmethod
    def _joined(cls, parts: Sequence[Part]) -> dict[str, object]:
        live = [p.adapter for p in parts if isinstance(p.adapter, OFT)]
        first = live[0]
        if first.acts_on == "in" or any(a.acts_on == "in" for a in live):
            if len(live) < len(parts) or not all(a.same_map(first) for a in live):
                raise CannotFuse(OTHER_INPUTS)
            return {}
        if any(a.shared or a.vector is not None or a.limit is not None for a in live):
            raise CannotFuse("output rotations of this form (shared, COFT) are not joined")
        alike = ("block_size", "series", "half_last", "inverse")
        if any(getattr(a, n) != getattr(first, n) for a in live for n in alike):
            raise CannotFuse("the parts have blocks of different sizes or conventions")
        b = first.block_size
        blocks: list[Tensor] = []
        changes: dict[str, object] = {"constraint": None, "spread": 1.0}
        for part in parts:
            if isinstance(part.adapter, OFT):
                own = part.adapter
                exact = own.constraint is None and own.spread == 1
                found = own.blocks if exact else torch.triu(own.skew(torch.float32).detach(), 1)
                assert found is not None
                blocks.append(found)
            elif part.rows % b:
                raise CannotFuse(
                    f"{part.rows} untouched rows are no multiple of the block size {b}"
                )
            else:
                assert first.blocks is not None
                blocks.append(first.blocks.new_zeros(part.rows // b, b, b))
        changes["blocks"] = join(blocks)
        changes["rescale"] = join_vectors(parts, "rescale")
        return changes

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
        acts_on: MapAxis = "in",
        series: int = 5,
        limit: float | None = None,
        constraint: float | None = None,
        shared: bool = False,
        rescaled: bool = False,
        **options: object,
    ) -> Self:
        """D = I exactly. `rank` is the number of blocks, or give `block_size`; on inputs PEFT's
        form, on outputs LyCORIS's (exact Cayley). `alpha` has no meaning here."""
        refuse_options(cls, options)
        width = math.prod(weight.shape[1:]) if acts_on == "in" else weight.shape[0]
        size = block_size_of("OFT", width, rank, block_size, least=1)
        count = 1 if shared else width // size
        place = {"device": weight.device, "dtype": dtype}
        if acts_on == "in":
            if size < 2:
                raise UsageError("OFT: a block of one value has nothing to train.")
            vector = nn.Parameter(torch.zeros(count, size * (size - 1) // 2, **place))
            inverse = (series == 0) != (stored == "embedding")
            return cls(
                vector,
                series=series,
                inverse=inverse,
                limit=limit,
                shared=shared,
                stored=stored,
                sized=tuple(weight.shape),
            )
        blocks = nn.Parameter(torch.zeros(count, size, size, **place))
        rescale = None
        if rescaled:
            ones = [1] * (weight.ndim - 1)
            rescale = nn.Parameter(torch.ones(width, *ones, **place))
        return cls(
            None,
            blocks,
            rescale,
            acts_on="out",
            inverse=True,
            limit=limit,
            constraint=constraint,
            shared=shared,
            stored=stored,
            sized=tuple(weight.shape),
        )
