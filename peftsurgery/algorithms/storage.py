"""What an adapter holds: tensors by name, scale, magnitude, bias; checked once, never copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn

from ..errors import UsageError, nearest
from .slots import fit_shape

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Axis = Literal["out", "in"]


def _all_zero(tensor: Tensor) -> bool:
    """The first element decides for nearly every tensor; the rest is read only behind a zero."""
    values = tensor.detach()
    return values[(0,) * values.ndim].item() == 0 and not bool((values != 0).any())


def _all_finite(tensor: Tensor) -> bool:
    """A finite sum has only finite terms; looking at each takes ten times as long."""
    values = tensor.detach().float()
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


class Common(TypedDict, total=False):
    """Constructor arguments of every algorithm besides its own tensors."""

    scale: float | Tensor
    magnitude: Tensor | None
    magnitude_axis: Axis | None
    bias: Tensor | None
    bias_is_value: bool
    padded_shape: tuple[int, ...] | None
    stored: str


class AdapterTensors(nn.Module):
    """Storage and description of a `WeightAdapter`; see there for the meaning of the fields."""

    algorithm: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]] = ()  # further constructor arguments of the subclass
    scale: Tensor
    magnitude: nn.Parameter | None
    magnitude_axis: Axis | None
    bias: nn.Parameter | None
    bias_is_value: bool
    padded_shape: tuple[int, ...] | None
    stored: str
    _shape: tuple[int, ...]
    _one: tuple[Tensor, int] | None

    def __init__(self, tensors: Mapping[str, Tensor | None], **common: Unpack[Common]) -> None:
        # A file holds a thousand of these: the dictionaries of nn.Module are filled directly, which
        # is five times faster than its attribute setters.
        super().__init__()
        for name, tensor in tensors.items():
            self._store(name, tensor)
        magnitude = common.get("magnitude")
        if magnitude is not None and magnitude.ndim != 1:
            magnitude = magnitude.reshape(-1)
        self._store("magnitude", magnitude)
        self._store("bias", common.get("bias"))
        scale = common.get("scale", 1.0)
        number = float(scale.detach()) if isinstance(scale, Tensor) else scale
        self._buffers["scale"] = torch.tensor(number, dtype=torch.float32)
        self.__dict__["_one"] = self._mark_of_one(number)
        padded = common.get("padded_shape")
        self.__dict__.update(
            magnitude_axis=common.get("magnitude_axis"),
            bias_is_value=common.get("bias_is_value", False),
            padded_shape=None if padded is None else tuple(padded),
            stored=common.get("stored", "linear"),
        )
        self.__dict__["_shape"] = self._measure()
        self._check_common()

    def _store(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            self._parameters[name] = None
            return
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UsageError(f"{self._at(name)}: got {kind}, expected a floating-point tensor.")
        if tensor.numel() == 0:
            raise UsageError(f"{self._at(name)}: shape {tuple(tensor.shape)} has no elements.")
        if type(tensor) is not nn.Parameter:
            tensor = nn.Parameter(tensor, requires_grad=False)
        self._parameters[name] = tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to()`, `.half()`, … of a model reach the tensors; `scale` stays fp32."""
        scale, is_one = self.scale, self._is_one
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self._buffers["scale"] = scale.to(self.scale.device)
        self.__dict__["_one"] = self._mark_of_one(1.0 if is_one else 0.0)
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_one": self._is_one}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.__dict__["_one"] = self._mark_of_one(1.0 if state["_one"] else 0.0)

    def _mark_of_one(self, number: float) -> tuple[Tensor, int] | None:
        """The scale and its version, where it is 1: while both stay, it is known to be."""
        scale = self._buffers["scale"]
        if number != 1 or scale is None or scale.is_inference():
            return None
        return scale, scale._version

    @property
    def _is_one(self) -> bool:
        """Whether the scale is known to be 1 without reading it."""
        one = self._one
        return one is not None and self._buffers["scale"] is one[0] and one[0]._version == one[1]

    def scaled(self, tensor: Tensor) -> Tensor:
        """scale · tensor; the tensor itself while the scale is known to be 1."""
        if torch.compiler.is_compiling() or not self._is_one:
            return tensor * self.scale
        return tensor

    def _at(self, field: str) -> str:
        return f"{type(self).__name__}.{field}"

    def _fields(self) -> tuple[nn.Parameter | None, ...]:
        return tuple(self._parameters[n] for n in self.fields)

    def _mismatch(self, field: str, expected: str) -> UsageError:
        got = self._parameters[field]
        found = "nothing" if got is None else f"shape {tuple(got.shape)}"
        return UsageError(f"{self._at(field)}: got {found}, expected {expected}.")

    def _expect(self, field: str, good: bool, expected: str) -> None:
        if not good:
            raise self._mismatch(field, expected)

    @property
    def _bias_axis(self) -> int:
        """A transformers Conv1D stores its weight (in, out): its bias runs along dimension 1."""
        return 1 if self.stored == "conv1d" and len(self._shape) == 2 else 0

    def _check_common(self) -> None:
        o = self._shape[0]
        magnitude, bias = self._parameters["magnitude"], self._parameters["bias"]
        if magnitude is not None:
            n = magnitude.numel()
            if self.magnitude_axis == "out":
                self._expect("magnitude", n == o, f"({o},) for axis 'out'")
            elif self.magnitude_axis == "in":
                i = self._shape[1] if len(self._shape) > 1 else 0
                # (o, i*k) factors do not tell i
                fits = n == i or (len(self._shape) == 2 and i % n == 0)
                self._expect("magnitude", fits, f"({i},) for axis 'in'")
            else:
                raise UsageError(f"{self._at('magnitude')}: needs magnitude_axis 'out' or 'in'.")
        elif self.magnitude_axis is not None:
            raise UsageError(f"{self._at('magnitude_axis')}: given without a magnitude.")
        if bias is not None:
            n = self._shape[self._bias_axis]
            self._expect("bias", tuple(bias.shape) == (n,), f"({n},)")
        if self.padded_shape is not None and not fit_shape(self._shape, self.padded_shape):
            raise UsageError(
                f"{self._at('padded_shape')}: got {self.padded_shape}, but the change has shape "
                f"{self._shape}."
            )

    def _measure(self) -> tuple[int, ...]:
        """Check the fields' shapes and return the shape of ΔW."""
        raise NotImplementedError

    @property
    def _has_product(self) -> bool:
        """Whether the weight changes at all, and with it whether the columns are known."""
        return True

    # --- description ------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ΔW as far as the factors tell: (o, i), (o, i, *k), (o, i·k) or (n,)."""
        return self._shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(o, i·k): ΔW with everything behind the rows flattened; (n, 1) for 1-D."""
        return self._shape[0], math.prod(self._shape[1:])

    @property
    def rank(self) -> int | None:
        """Inner dimension of the factors (the r of alpha / r), None without factors."""
        return None

    @property
    def additive(self) -> bool:
        """Whether ΔW is known without looking at the weight."""
        return self.magnitude is None

    @property
    def row_wise(self) -> bool:
        """Whether a row of W_1 looks at that row of W alone."""
        return self.magnitude_axis != "in"

    @property
    def bias_factor(self) -> Tensor | None:
        """What the base's bias is multiplied by, (o,), where the map scales outputs; else None."""
        return None

    @property
    def maps_bias(self) -> bool:
        """Whether the base's bias is mapped with the weight; `merged_bias` does it."""
        return self.bias_factor is not None

    def on(self, shape: tuple[int, ...]) -> Self:
        """The same adapter, of a weight of this shape: fills in sizes the tensors do not tell."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors present, by field name, then `magnitude` and `bias`."""
        names = (*self.fields, "magnitude", "bias")
        return {n: t for n in names if (t := self._parameters[n]) is not None}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def numel(self) -> int:
        return sum(t.numel() for t in self.tensors().values())

    def nonfinite(self) -> tuple[str, ...]:
        """Names of the tensors (and `scale`) that hold NaN or Inf. Reads everything."""
        checked = {**self.tensors(), "scale": self.scale}
        return tuple(n for n, t in checked.items() if not _all_finite(t))

    def is_zero(self) -> bool:
        """Whether it certainly changes nothing: neither the weight nor the bias."""
        if self.bias_is_value:
            return False
        if any(t.is_meta for t in self.tensors().values()):
            return False  # shapes only: the values are not known
        if self.bias is not None and bool((self.bias != 0).any()):
            return False
        return self._changes_nothing()

    def _changes_nothing(self) -> bool:
        """Whether the weight certainly stays what it is; the values are known."""
        return self.additive and self._is_nothing()

    def _is_nothing(self) -> bool:
        """A zero scale or factor."""
        return float(self.scale) == 0 or self._is_zero_product()

    def _is_zero_product(self) -> bool:
        return any(_all_zero(t) for n in self.fields if (t := self._parameters[n]) is not None)

    def extra_repr(self) -> str:
        text = f"shape={self._shape}, rank={self.rank}, scale={float(self.scale):g}"
        return text + (f", dora={self.magnitude_axis}" if self.magnitude_axis else "")

    # --- copies -----------------------------------------------------------------------------------

    def common(self) -> Common:
        """The constructor arguments besides the algorithm's own tensors."""
        return Common(
            scale=self.scale,
            magnitude=self.magnitude,
            magnitude_axis=self.magnitude_axis,
            bias=self.bias,
            bias_is_value=self.bias_is_value,
            padded_shape=self.padded_shape,
            stored=self.stored,
        )

    def with_tensors(self, **changes: object) -> Self:
        """The same adapter with some fields, options or common arguments replaced."""
        known: dict[str, object] = {n: self._parameters[n] for n in self.fields}
        known |= {n: getattr(self, n) for n in self.options}
        known |= self.common()
        for name in changes:
            if name not in known:
                hint = ", ".join(nearest(name, known))
                raise UsageError(
                    f"{self._at(name)}: no such field" + (f" (closest: {hint})." if hint else ".")
                )
        arguments = known | changes
        return type(self)(**arguments)  # pyright: ignore[reportArgumentType, reportCallIssue]
