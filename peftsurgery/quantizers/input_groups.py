"""What GPTQ and AWQ files share: whole numbers with one scale and one zero for every group of
inputs and every output, stored with the inputs first.

    w[o, i] = scale[g(i), o] · (code[i, o] - zero[g(i), o])

`X.qweight` and `X.qzeros` are int32 words of several codes, `X.scales` (groups, outputs) floats,
`X.g_idx` (inputs,) the group of every input where they are out of order. Which of the two tools
wrote a file shows in the shapes: GPTQ's words run along the inputs, AWQ's along the outputs.

Requantized, codes change and nothing else: scales and zeros come from a calibration that a merge
has not. Only a group some value of which has left its grid by more than half a step gets new ones,
if they round it with less error.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.configs import quantization_config
from peftsurgery.quantizers.grids import Grid, extremes
from peftsurgery.quantizers.input_group_files import (
    check_method,
    check_model,
    group_of,
    inputs_of,
    packs_inputs,
)
from peftsurgery.quantizers.packed import Format, Outline, Packed, better, found

ROLES = {"weight": "qweight", "zero": "qzeros", "scale": "scales", "order": "g_idx"}
SLACK = 0.51  # steps beyond the outermost value: half a one, and the rounding of the scale


def width(packed: Packed) -> int:
    """Bits of a code."""
    return cast(int, packed.fields["bits"])


def _size(packed: Packed) -> int:
    """Inputs of a group."""
    return cast(int, packed.fields["group"])


class InputGroups(Format):
    """GPTQ and AWQ. `fields`: bits, minus_one (zeros are stored less one), group, symmetric."""

    packs_inputs: ClassVar[bool]  # the words run along the inputs

    @abc.abstractmethod
    def settings(self, where: str, config: Mapping[str, object]) -> dict[str, object]:
        """What a quantization_config says about how zeros are stored: `minus_one`. Raises
        UnsupportedError for a layout that is another one under the same name.
        """

    @abc.abstractmethod
    def codes(self, packed: Packed, start: int, stop: int) -> Tensor:
        """Codes of outputs start:stop, (outputs, inputs)."""

    @abc.abstractmethod
    def zeros(self, packed: Packed, words: Tensor) -> Tensor:
        """Zeros (groups, outputs) of stored words."""

    @abc.abstractmethod
    def pack_zeros(self, packed: Packed, zeros: Tensor) -> Tensor:
        """The inverse of `zeros`."""

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for stored, words in checkpoint.items():
            if not stored.endswith(".qweight"):
                continue
            module = stored.removesuffix(".qweight")
            names = {role: f"{module}.{suffix}" for role, suffix in ROLES.items()}
            if names["order"] not in checkpoint:
                del names["order"]
            for name in names.values():
                if name not in checkpoint:
                    raise UsageError(
                        f"{checkpoint.source}: {stored!r} is packed as GPTQ and AWQ do, but "
                        f"{name!r} is missing. Download it again."
                    )
            config = quantization_config(checkpoint, stored)
            where = f"{checkpoint.source}: {stored!r}"
            parts = {role: checkpoint[name] for role, name in names.items()}
            check_method(where, config)
            if words.dtype != "I32":
                raise UnsupportedError(
                    f"{where}: is {words.dtype}; int32 words were expected. Take the checkpoint it "
                    "was made from."
                )
            if packs_inputs(where, config, parts) != self.packs_inputs:
                continue
            check_model(checkpoint, stored)
            yield self._found(checkpoint, module, names, config)

    def _found(
        self,
        checkpoint: Checkpoint,
        module: str,
        names: Mapping[str, str],
        config: Mapping[str, object],
    ) -> Packed:
        where = f"{checkpoint.source}: {names['weight']!r}"
        settings = self.settings(where, config)
        parts = {role: checkpoint[name] for role, name in names.items()}
        groups, outputs = parts["scale"].shape
        bits = 32 * parts["zero"].shape[1] // outputs
        known = (4,) if not self.packs_inputs else (2, 3, 4, 8)
        if bits not in known or parts["zero"].shape != (groups, -(-outputs * bits // 32)):
            raise UnsupportedError(
                f"{where}: {names['zero']!r} has shape {list(parts['zero'].shape)}, the scales "
                f"{[groups, outputs]}: that is none of {known} bits. Quantize the original again."
            )
        stored = parts["weight"].shape[0]
        inputs = stored * 32 // bits if self.packs_inputs else stored
        if "order" in parts:
            inputs = inputs_of(where, parts["order"], inputs, bits, stored)
        group = group_of(where, config, inputs, groups)
        fields = {**settings, "bits": bits, "group": group}
        native = parts["scale"].dtype
        shape = (outputs, inputs)
        packed = found(self, checkpoint, f"{module}.weight", shape, native, names, **fields)
        self._check_zeros(where, packed, config)
        return packed

    def _check_zeros(self, where: str, packed: Packed, config: Mapping[str, object]) -> None:
        """Some tools write true zeros under the name of the format that stores them less one."""
        half = 1 << (width(packed) - 1)
        if not packed.fields["minus_one"] or not config.get("sym"):
            return
        first = packed.parts["zero"].rows(0, 1).torch()
        plain = replace(packed, fields={**packed.fields, "minus_one": False})
        if bool((self.zeros(plain, first) == half).all()):
            raise UnsupportedError(
                f"{where}: symmetric, of the format gptq, which stores zeros less one: "
                f"{half - 1} was expected, {half} is there, as in gptq_v2. If the model runs, "
                "write 'checkpoint_format': 'gptq_v2' into its quantization_config."
            )

    def _book(self, packed: Packed) -> Integers:
        return Integers(0, (1 << width(packed)) - 1)

    def _order(self, packed: Packed) -> Tensor | None:
        """Group of every input; None where they lie in order."""
        if "order" not in packed.parts:
            return None
        order = packed.whole("order")
        groups = packed.outlines["scale"].shape[0]
        if int(order.min()) < 0 or int(order.max()) >= groups:
            raise UsageError(
                f"{packed.outlines['order'].name!r}: names group {int(order.max())}, there are "
                f"{groups}. Download it again."
            )
        plain = torch.arange(len(order), dtype=order.dtype) // _size(packed)
        return None if torch.equal(order, plain) else order

    def _grid(self, packed: Packed, scale: Tensor, zero: Tensor) -> Grid:
        """scale and zero (outputs, groups)."""
        group = _size(packed)
        return Grid(
            self._book(packed),
            scale.float().contiguous(),
            zero.float().contiguous(),
            group=group,
            order=self._order(packed),
        )

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        zero = self.zeros(packed, packed.whole("zero"))[:, start:stop]
        scale = packed.whole("scale")[:, start:stop]
        return self._grid(packed, scale.T, zero.T), self.codes(packed, start, stop)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        if not packed.parts:
            symmetric = bool(packed.fields["symmetric"])
            order = torch.arange(packed.columns) // _size(packed)
            least, greatest = extremes(matrix, _size(packed))
            scale, zero = self._scales(packed, least, greatest, symmetric=symmetric)
            parts = {} if "order" not in packed.outlines else {"order": order.int()}
            grid = self._grid(packed, scale, zero)
            return grid, {**self._stored(packed, scale, zero), **parts}
        zero = self.zeros(packed, packed.whole("zero")).T.float()
        old = self._grid(packed, packed.whole("scale").T, zero)
        parts = {role: packed.whole(role) for role in packed.parts if role != "weight"}
        beyond = (old.units(matrix) - old.book.high / 2).abs_() > old.book.high / 2 + SLACK
        least, greatest = extremes(matrix, old.group, old.order, old.scale.shape[1])
        left = (old.grouped(beyond.float()) > 0) | ((old.scale == 0) & (greatest > least))
        if not bool(left.any()):
            return old, parts
        half = (old.book.high + 1) / 2
        symmetric = bool((zero == half).all())
        scale, moved = self._scales(packed, least, greatest, symmetric=symmetric)
        left &= better(matrix, old, self._grid(packed, scale, moved))
        scale = torch.where(left, scale, packed.whole("scale").T)
        zero = torch.where(left, moved, zero)
        return self._grid(packed, scale, zero), parts | self._stored(packed, scale, zero)

    def _scales(
        self, packed: Packed, least: Tensor, greatest: Tensor, *, symmetric: bool
    ) -> tuple[Tensor, Tensor]:
        """Plain min/max scales, in the dtype they are stored in, and zeros, (outputs, groups).

        scale = (max - min) / (2^bits - 1) with 0 between them, and max = -min when symmetric;
        zero = 2^(bits - 1), or -min / scale rounded. Source: GPTQ's quantizer (Frantar et al.
        2022, arXiv:2210.17323, find_params).
        """
        high = (1 << width(packed)) - 1
        least, greatest = least.clamp(max=0), greatest.clamp(min=0)
        if symmetric:
            greatest = torch.maximum(-least, greatest)
            least = -greatest
        flat = greatest == least
        step = torch.where(flat, 2.0, greatest - least) / high
        dtype = torch_dtype(packed.outlines["scale"].dtype)
        assert dtype is not None
        scale = step.to(dtype)
        if not bool(torch.isfinite(scale).all()):
            raise UsageError(f"{packed.name!r}: its scales are too large for {dtype}. Repair it.")
        if symmetric:
            return scale, torch.full_like(step, (high + 1) / 2)
        return scale, (-torch.where(flat, -1.0, least) / step).round_().clamp_(0, high)

    def _stored(self, packed: Packed, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return {
            "scale": scale.T.contiguous(),
            "zero": self.pack_zeros(packed, zero.T.to(torch.uint8)),
        }

    def outlines_of(
        self, name: str, shape: tuple[int, ...], native: str, **options: object
    ) -> Packed:
        """A weight to be packed with plain scales: outlines; the shape of `weight` is GPTQ's or
        AWQ's. options: bits (4), group (128; -1 for whole rows), symmetric.
        """
        bits, group = cast(int, options["bits"]), cast(int, options["group"])
        multiple = 32 if self.packs_inputs else 8
        if len(shape) != 2:
            raise UnsupportedError(f"{name!r}: {self.title} packs matrices, not {list(shape)}.")
        outputs, inputs = shape
        group = inputs if group == -1 else group
        if group < 1 or inputs % group or outputs % multiple or inputs % multiple:
            raise UnsupportedError(
                f"{name!r}: {list(shape)} does not fit {self.title}: outputs and inputs have to be "
                f"multiples of {multiple}, inputs of the group, {group}. Leave it as it is, or "
                "choose another group."
            )
        module, groups = name.removesuffix(".weight"), inputs // group
        words = (inputs * bits // 32, outputs) if self.packs_inputs else (inputs, outputs // 8)
        outlines = {
            "weight": Outline(f"{module}.qweight", "I32", words),
            "zero": Outline(f"{module}.qzeros", "I32", (groups, outputs * bits // 32)),
            "scale": Outline(
                f"{module}.scales",
                native if native in ("F16", "BF16") else "F16",
                (groups, outputs),
            ),
        }
        if self.packs_inputs:
            outlines["order"] = Outline(f"{module}.g_idx", "I32", (inputs,))
        fields: dict[str, object] = {"bits": bits, "group": group}
        fields["symmetric"] = bool(options["symmetric"])
        fields["minus_one"] = self.packs_inputs and bool(options["symmetric"])
        return Packed(self, name, shape, native, outlines, {}, fields)
