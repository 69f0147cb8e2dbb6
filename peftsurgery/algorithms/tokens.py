"""Trainable tokens: new values of some rows of an embedding (PEFT `tuners/trainable_tokens`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CannotFuse, CannotSplit, UsageError
from .fresh import refuse_options
from .maps import MapAxis, WeightMap
from .slots import Part, join, pad_to
from .storage import Common

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class Tokens(WeightMap):
    """W_1 = W with row indices[k] replaced by values[k].

    values    (n, d); None where no index is left after a split
    indices   n different row numbers

    At strength 1 indices may lie behind the last row, as long as they leave no gap: the vocabulary
    grows. How many rows the weight has is not in the tensors (see `on`).
    """

    algorithm = "tokens"
    fields = ("values",)
    options = ("indices", "sized")
    acts_on: MapAxis = "in"  # row by row
    values: nn.Parameter | None
    indices: tuple[int, ...]

    def __init__(
        self,
        values: Tensor | None = None,
        *,
        indices: Sequence[int] = (),
        sized: tuple[int, ...] | None = None,
        **common: Unpack[Common],
    ) -> None:
        self.__dict__.update(indices=tuple(int(n) for n in indices), sized=sized)
        common.setdefault("stored", "embedding")
        super().__init__({"values": values}, **common)

    @property
    def side(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "weight"

    def _known(self) -> tuple[int, ...]:
        n = len(self.indices)
        if self.values is None:
            if n or self.sized is None:
                raise UsageError("Tokens: no values, and no weight they could be missing from.")
            return (0, *self.sized[1:])
        good = self.values.ndim == 2 and self.values.shape[0] == n
        self._expect("values", good, f"({n}, width), a row per index")
        if len(set(self.indices)) < n or min(self.indices) < 0:
            raise UsageError("Tokens.indices: expected different numbers of at least 0.")
        return (0, self.values.shape[1])

    def _admits(self, shape: tuple[int, ...]) -> bool:
        wide = self.values is None or shape[1:] == (self.values.shape[1],)
        return len(shape) == 2 and wide and not self._gap(shape[0])

    def _gap(self, rows: int) -> bool:
        """Whether rows behind the last one are missing below the largest index."""
        top = max(self.indices, default=-1)
        return top >= rows and not set(range(rows, top)) <= set(self.indices)

    def on(self, shape: tuple[int, ...]) -> Self:
        """See `WeightAdapter.on`; the vocabulary of the result where it grows."""
        top = max(self.indices, default=-1)
        if len(shape) != 2 or self._gap(shape[0]):
            raise UsageError(
                f"Tokens: sets row {top} of a weight {list(shape)}, and the rows in between are "
                "not in the file. Resize the base first."
            )
        return super().on((max(shape[0], top + 1), *shape[1:]))

    def _map(self, weight: Tensor) -> Tensor:
        if self.values is None:
            return weight.clone()
        place = torch.tensor(self.indices, device=weight.device)
        return weight.index_copy(0, place, self.values.to(weight.dtype))

    def merged(
        self, weight: Tensor, bias: Tensor | None = None, strength: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        grown = self.on(tuple(weight.shape))
        if grown.shape[0] > weight.shape[0]:
            if float(strength) != 1:
                raise UsageError(
                    f"Tokens: adds rows to a weight {list(weight.shape)}, which has no meaning at "
                    f"strength {float(strength):g}; use 1."
                )
            weight = pad_to(weight, grown.shape)
        return super().merged(weight, bias, strength)

    def _changes_nothing(self) -> bool:
        return self.values is None

    # --- rows -------------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> Tokens:
        """Those of the indices in start:stop, counted from there."""
        if not self.shape[0]:
            raise CannotSplit("how many rows the embedding has is not in the file of its tokens")
        self._check_range(start, stop)
        kept = [k for k, n in enumerate(self.indices) if start <= n < stop]
        values = self.values
        return self.with_tensors(
            values=None if values is None or not kept else values[kept],
            indices=[self.indices[k] - start for k in kept],
            sized=(stop - start, self.shape[1]),
        )

    @classmethod
    def _joined(cls, parts: Sequence[Part]) -> dict[str, object]:
        live = [(p.adapter, p.start) for p in parts if isinstance(p.adapter, Tokens)]
        values = [a.values for a, _ in live if a.values is not None]
        if not values:
            raise CannotFuse("no part replaces a row")
        indices = [n + start for a, start in live for n in a.indices]
        return {"values": join(values), "indices": indices}

    @classmethod
    def init(
        cls,
        weight: Tensor,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
        stored: str = "embedding",
        dtype: torch.dtype = torch.float32,
        indices: Sequence[int] = (),
        **options: object,
    ) -> Self:
        """A copy of the rows `indices`: nothing changes when `dtype` holds them. `rank`, `alpha`
        have no meaning here."""
        refuse_options(cls, options)
        if weight.ndim != 2 or not indices or not all(0 <= n < weight.shape[0] for n in indices):
            raise UsageError(
                f"Tokens: no rows {list(indices)} in a weight {list(weight.shape)}; give indices."
            )
        values = weight.detach()[list(indices)].to(dtype, copy=True)
        return cls(nn.Parameter(values), indices=indices, stored=stored, sized=tuple(weight.shape))
