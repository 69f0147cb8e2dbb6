"""Half-quadratic quantization (Badri and Shaji 2023, mobiusml.github.io/hqq_blog), as
`HQQLinear.state_dict` stores it (hqq 0.2.8, core/quantize.py and core/bitpack.py).

The weight (outputs, inputs) is taken as M: (groups, size) for axis 1, (size, groups) for axis 0,
and every group has a float scale and a float zero:

    w = (code - zero) · scale

`X.W_q`: the rows of M are cut into as many slabs as codes fit a word, the first slab in its highest
bits: bytes of 8, 4, 2 or 1 bit, or int32 of ten 3-bit codes, M filled up with rows of zeros; with
`view_as_float` under the name of a float dtype. `X.scale`, `X.zero`, and everything else of `meta`
as a small tensor of its own. 1.58 bits are three codes of 2 bits, 5 and 6 are kept in bytes.

The formula is computed in fp32; hqq does so in its compute dtype and rounds after each step there.
Quantized scales and zeros, and offloaded ones (`zero_scale`), which hqq has given up, are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.dtypes import FROM_TORCH_NAMES, torch_dtype
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.packed import Format, Outline, Packed, better, found

PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4)}
PACKINGS["1bit_u8"] = (1, 8)  # name -> bits, codes in a word
OF_BITS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
OF_BITS |= {1: "1bit_u8"}
META = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float"),
    *("quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
NEEDED = ("scale", "zero", "nbits", "group_size", "shape", "axis", "packing")
NORM, WEIGHTING, STEPS = 0.7, 10.0, 20  # hqq's defaults
CACHED = 1 << 16  # values at a time


class HQQ(Format):
    name = "hqq"
    title = "HQQ"

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for stored in checkpoint:
            if not stored.endswith(".W_q"):
                continue
            module = stored.removesuffix(".W_q")
            where = f"{checkpoint.source}: {stored!r}"
            for key in ("zero_scale", "scale_q", "zero_q"):
                if f"{module}.{key}" in checkpoint:
                    raise UnsupportedError(
                        f"{where}: {module}.{key} is there: quantized or offloaded scales are not "
                        "read. Quantize the original again with a present hqq."
                    )
            names = {"weight": stored}
            for key in ("scale", "zero", *META):
                if f"{module}.{key}" in checkpoint:
                    names[key] = f"{module}.{key}"
                elif key in NEEDED:
                    raise UsageError(
                        f"{where}: {f'{module}.{key}'!r} is missing. Download it again."
                    )
            parts = {key: checkpoint[name] for key, name in names.items()}
            fields, shape = _read_meta(where, parts)
            native = parts["scale"].dtype
            name = f"{module}.weight"
            packed = found(self, checkpoint, name, shape, native, names, **fields)
            _check(where, packed)
            yield packed

    def _book(self, packed: Packed) -> Integers:
        return Integers(0, cast(int, packed.fields["high"]))

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        scale = packed.whole("scale").float().reshape(-1)
        zero = packed.whole("zero").float().reshape(-1)
        return self._grid(packed, scale, zero, start, stop), self._codes(packed, start, stop)

    def _codes(self, packed: Packed, start: int, stop: int) -> Tensor:
        """Codes of outputs start:stop, from the rows of M that hold them."""
        columns, wide = packed.columns, _wide(packed)
        words = packed.whole("weight").reshape(-1).view(_word(packed)).reshape(-1, wide)
        first, last = start * columns // wide, -(-stop * columns // wide)
        rows = torch.arange(first, last)
        size, per = PACKINGS[cast(str, packed.fields["packing"])]
        shifts = (per - 1 - rows // len(words)) * size
        codes = words[rows % len(words)] >> shifts[:, None].to(words.dtype)
        flat = (codes & ((1 << size) - 1)).to(torch.uint8).reshape(-1)
        begin = start * columns - first * wide
        return flat[begin : begin + (stop - start) * columns].reshape(-1, columns)

    def _grid(self, packed: Packed, scale: Tensor, zero: Tensor, start: int, stop: int) -> Grid:
        """scale, zero (groups,) fp32."""
        columns, size = packed.columns, cast(int, packed.fields["group"])
        book, axis = self._book(packed), packed.fields["axis"]
        if axis == 1 and columns % size == 0:
            per = columns // size
            cut = slice(start * per, stop * per)
            return Grid(book, scale[cut].reshape(-1, per), zero[cut].reshape(-1, per), group=size)
        place = torch.arange(start * columns, stop * columns)
        place = place // size if axis == 1 else place % len(scale)
        scales, zeros = (value[place].reshape(-1, columns) for value in (scale, zero))
        return Grid(book, scales, zeros, group=1)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        """Afresh, scales of min and max, then hqq's zeros for the p-norm of the error; kept ones
        are weighed against plain ones.
        """
        size, book = cast(int, packed.fields["group"]), self._book(packed)
        flat = matrix.reshape(-1)
        groups = flat.reshape(-1, size) if packed.fields["axis"] == 1 else flat.reshape(size, -1).T
        scale, zero = _plain(groups, book)
        if not packed.parts and packed.fields["optimize"]:
            zero = _half_quadratic(groups, scale, zero, book)
        dtype = torch_dtype(packed.outlines["scale"].dtype)
        assert dtype is not None
        scale, zero = scale[:, 0].to(dtype), zero[:, 0].to(dtype)
        if packed.parts:
            old_scale, old_zero = (packed.whole(role).reshape(-1) for role in ("scale", "zero"))
            old, new = (
                Grid(book, a.float()[:, None], b.float()[:, None])
                for a, b in ((old_scale, old_zero), (scale, zero))
            )
            change = better(groups, old, new)[:, 0]
            scale = torch.where(change, scale, old_scale)
            zero = torch.where(change, zero, old_zero)
            kept = {role: packed.whole(role) for role in packed.parts if role in META}
        else:
            kept = cast("dict[str, Tensor]", packed.fields["meta"])
        if not bool((torch.isfinite(scale) & torch.isfinite(zero)).all()):
            raise UsageError(
                f"{packed.name!r}: its scales or zeros are too large for {dtype}. Repair it, or "
                "pack it as F32."
            )
        parts = {"scale": scale, "zero": zero}
        stored = {role: part.reshape(packed.outlines[role].shape) for role, part in parts.items()}
        grid = self._grid(packed, scale.float(), zero.float(), 0, packed.rows)
        return grid, {**kept, **stored}

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        size, per = PACKINGS[cast(str, packed.fields["packing"])]
        rows = codes.reshape(-1, _wide(packed))
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % per)).to(_word(packed))
        slabs = rows.reshape(per, -1, rows.shape[1])
        words = torch.zeros_like(slabs[0])
        for place, slab in enumerate(slabs):
            words |= slab << (per - 1 - place) * size
        outline = packed.outlines["weight"]
        dtype = torch_dtype(outline.dtype)
        assert dtype is not None
        return {"weight": words.view(dtype).reshape(outline.shape)}

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """options: bits (4) of 8, 4, 3, 2, 1; group (64), axis (1), optimize (True)."""
        weights = _options(options)
        bits, size = cast(int, weights["nbits"]), cast(int, weights["group_size"])
        if len(shape) != 2:
            raise UnsupportedError(f"{name!r}: HQQ packs matrices, this is {list(shape)}.")
        groups, left = divmod(math.prod(shape), size)
        rows = groups if weights["axis"] == 1 else size
        _, per = PACKINGS[OF_BITS[bits]]
        if left or (rows % per and bits != 3):
            raise UnsupportedError(
                f"{name!r}: {list(shape)} does not come out even in groups of {size} and words of "
                f"{per} codes. Choose another group."
            )
        module = name.removesuffix(".weight")
        dtype = torch_dtype(native)
        word = torch.int32 if bits == 3 else torch.uint8
        values: dict[str, object] = {**weights, "shape": shape, "packing": OF_BITS[bits]}
        values |= {"unpack_view_dtype": str(word), "compute_dtype": str(dtype)}
        values |= {"quant_scale": False, "quant_zero": False, "offload_meta": False}
        values |= {"encoded_state_dict": True, "stores_quant_config": True}
        meta = {key: _encoded(value) for key, value in values.items()}
        of_groups = (groups, 1) if weights["axis"] == 1 else (1, groups)
        words = (-(-rows // per), math.prod(shape) // rows)
        outlines = {
            "weight": Outline(f"{module}.W_q", "I32" if bits == 3 else "U8", words),
            "scale": Outline(f"{module}.scale", native, of_groups),
            "zero": Outline(f"{module}.zero", native, of_groups),
        }
        for key, part in meta.items():
            dtype_name = FROM_TORCH_NAMES[str(part.dtype).removeprefix("torch.")]
            outlines[key] = Outline(f"{module}.{key}", dtype_name, tuple(part.shape))
        fields: dict[str, object] = {"group": size, "axis": weights["axis"], "meta": meta}
        fields |= {"high": (1 << bits) - 1, "packing": OF_BITS[bits]}
        fields["optimize"] = weights["optimize"]
        return Packed(self, name, shape, native, outlines, {}, fields)

    def config(self, **options: object) -> dict[str, object]:
        skip = cast("list[str] | None", options.get("skip"))
        quantization: dict[str, object] = {"weight_quant_params": _options(options)}
        quantization |= {"scale_quant_params": None, "zero_quant_params": None}
        quantization["offload_meta"] = False
        return {
            "quant_method": "hqq",
            "quant_config": quantization,
            "skip_modules": ["lm_head"] if skip is None else sorted({_tag(name) for name in skip}),
        }


def _tag(name: str) -> str:
    """A module's name as hqq matches it, for all layers at once: without `model`, `layers` and
    numbers (hqq, models/base.py; transformers, integrations/hqq.py name_to_linear_tag).
    """
    parts = name.split(".")
    return ".".join(p for p in parts if p not in ("model", "layers") and not p.isnumeric())


def _plain(groups: Tensor, book: Integers) -> tuple[Tensor, Tensor]:
    """scale (groups, 1) = (max - min) / high, at least 1/20000, and 1 where a group is all but
    flat; zero = -min / scale.
    """
    least, greatest = torch.aminmax(groups, dim=1, keepdim=True)
    width = greatest - least
    scale = torch.where(width <= 1e-4, 1.0, (width / book.high).clamp(min=5e-5))
    return scale, -least / scale


def _half_quadratic(groups: Tensor, scale: Tensor, zero: Tensor, book: Integers) -> Tensor:
    """Zeros that lessen ‖W - Ŵ‖_p^p, p = 0.7, the error split off as E: in turn

        E = shrink(W - Ŵ),  shrink(x) = sign(x) · max(0, |x| - |x|^(p - 1) / β)
        zero = mean over the group of code - (W - E) / scale

    with β = 10, until the mean |W - Ŵ| of all groups no longer falls, or 20 steps are done
    (hqq, core/optimize.py optimize_weights_proximal_legacy).
    """
    best, zero = math.inf, zero.clone()
    parts = max(1, groups.numel() // CACHED)
    for _ in range(STEPS):
        total = 0.0
        chunks = (each.chunk(parts) for each in (groups, scale, zero))
        for values, step, level in zip(*chunks, strict=True):
            units = values / step
            codes = (units + level).round_().clamp_(0, book.high)
            error = units.sub_(codes).add_(level).mul_(step)
            size = error.abs()
            total += float(size.sum())
            shrunk = size.sub_(size.pow(NORM - 1).div_(WEIGHTING)).clamp_(min=0).copysign_(error)
            level.copy_(codes.sub_(values.sub(shrunk).div_(step)).mean(1, keepdim=True))
        if total >= best:
            break
        best = total
    return zero


def _wide(packed: Packed) -> int:
    """Columns of M."""
    size = cast(int, packed.fields["group"])
    return size if packed.fields["axis"] == 1 else math.prod(packed.shape) // size


def _word(packed: Packed) -> torch.dtype:
    return torch.int32 if packed.fields["packing"] == "3bit_32" else torch.uint8


def _options(options: Mapping[str, object]) -> dict[str, object]:
    """`weight_quant_params` of hqq."""
    bits, group = options.get("bits", 4), options.get("group", 64)
    axis = options.get("axis", 1)
    if bits not in (8, 4, 3, 2, 1) or axis not in (0, 1):
        raise UsageError(f"HQQ: {bits} bits along axis {axis}; 8, 4, 3, 2 or 1, axis 0 or 1.")
    if not isinstance(group, int) or group < 8 or group % 8:
        raise UsageError(f"HQQ: a group of {group}; a multiple of 8 was expected.")
    found: dict[str, object] = {"nbits": bits, "channel_wise": True, "group_size": group}
    found |= {"optimize": bool(options.get("optimize", True)), "round_zero": False}
    return found | {"axis": axis, "view_as_float": False}


def _encoded(value: object) -> Tensor:
    """A value of `meta` as hqq stores it in safetensors (core/utils.py encode_safetensor_type)."""
    if isinstance(value, tuple):
        return torch.tensor(value)
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    return torch.tensor(list(str(value).encode()), dtype=torch.uint8)


def _read_meta(
    where: str, parts: Mapping[str, LazyTensor]
) -> tuple[dict[str, object], tuple[int, ...]]:
    """(fields, shape of the weight)."""

    def number(key: str, missing: float = 0) -> float:
        return float(parts[key].torch().reshape(-1)[0]) if key in parts else missing

    packing = bytes(parts["packing"].torch().to(torch.uint8).tolist()).decode("ascii", "replace")
    bits, axis = number("nbits"), int(number("axis"))
    shape = tuple(map(int, parts["shape"].torch().reshape(-1).tolist()))
    refused = [key for key in ("quant_scale", "quant_zero", "offload_meta") if number(key)]
    if not number("channel_wise", 1):
        refused.append("channel_wise = false")
    if packing not in PACKINGS or axis not in (0, 1) or len(shape) != 2:
        refused.append(f"packing {packing!r}, axis {axis}, shape {list(shape)}")
    elif not 0 < bits <= PACKINGS[packing][0]:
        refused.append(f"{bits} bits as {packing!r}")
    if refused:
        raise UnsupportedError(
            f"{where}: {'; '.join(refused)}: such HQQ weights are not read. Quantize the original "
            "again with a present hqq."
        )
    fields: dict[str, object] = {"group": int(number("group_size")), "axis": axis}
    return fields | {"high": round(2**bits - 1), "packing": packing}, shape


def _check(where: str, packed: Packed) -> None:
    size = cast(int, packed.fields["group"])
    count = math.prod(packed.shape)
    groups, left = divmod(count, size) if size > 0 else (0, 1)
    rows = groups if packed.fields["axis"] == 1 else size
    _, per = PACKINGS[cast(str, packed.fields["packing"])]
    wanted = -(-rows // per) * _wide(packed) * _word(packed).itemsize if not left else -1
    sizes = {role: math.prod(packed.outlines[role].shape) for role in ("scale", "zero")}
    if packed.parts["weight"].nbytes != wanted or set(sizes.values()) != {groups}:
        raise UsageError(
            f"{where}: {packed.parts['weight'].nbytes} bytes and {sizes} values for a weight of "
            f"{list(packed.shape)} in groups of {size}; expected {wanted} and {groups}. Download "
            "it again."
        )
