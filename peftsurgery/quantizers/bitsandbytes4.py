"""bitsandbytes' 4-bit formats, NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314).

Stored (bitsandbytes, functional.py QuantState.as_dict): `X.weight` bytes, two codes each, the
first in the high half, viewed as any `quant_storage` dtype; `X.weight.absmax`,
`X.weight.quant_map` and, as JSON in bytes, `X.weight.quant_state.bitsandbytes__nf4`. Blocks of
`blocksize` run through the weight in row-major order and may cross rows:

    w_i = map[code_i] · absmax[i // blocksize]

Nested ("double quant"): absmax is a byte, nested_map[absmax_j] · nested_absmax[j // 256] + offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import ClassVar, cast

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.dtypes import FROM_TORCH_NAMES
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import bits
from peftsurgery.quantizers.books import Codebook
from peftsurgery.quantizers.grids import Grid, magnitudes
from peftsurgery.quantizers.packed import Format, Outline, Packed, found

# Quantiles of N(0, 1) (appendix E of the paper), and a float of one sign, two exponent bits and
# one mantissa bit over its largest value; both as bitsandbytes rounded them.
NF4_LEVELS = (
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
_FP4_POSITIVE = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_LEVELS = tuple(sign * level / 12.0 + 0.0 for sign in (1, -1) for level in _FP4_POSITIVE)
NESTED = 256  # values of absmax in a block of the second level


def dynamic_map() -> Tensor:
    """The 256 signed values of bitsandbytes' dynamic 8-bit type (Dettmers 2016, arXiv:1511.04561),
    ascending, fp32.

    For i = 0 … 6 decimal exponents: 2^i means of neighbours among 2^i + 1 even steps from 0.1 to
    1, times 10^(i - 6), of either sign; with 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2.0) * 10 ** (i - 6)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values))


@cache
def _second_level() -> Codebook:
    return Codebook(dynamic_map())


@lru_cache(16)
def _book(levels: tuple[float, ...]) -> Codebook:
    return Codebook(torch.tensor(levels))


class Bits4(Format):
    """What NF4 and FP4 share."""

    quant_type: ClassVar[str]
    levels: ClassVar[tuple[float, ...]]

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        suffix = f".quant_state.bitsandbytes__{self.quant_type}"
        for stored in checkpoint:
            if not stored.endswith(suffix):
                continue
            weight = stored.removesuffix(suffix)
            state = _state(checkpoint[stored])
            shape = tuple(map(int, cast("list[int]", state["shape"])))
            names = {"weight": weight, "absmax": f"{weight}.absmax", "map": f"{weight}.quant_map"}
            nested = "nested_blocksize" in state
            if nested:
                names["nested_absmax"] = f"{weight}.nested_absmax"
                names["nested_map"] = f"{weight}.nested_quant_map"
            names["state"] = stored
            for name in names.values():
                if name not in checkpoint:
                    raise UsageError(
                        f"{checkpoint.source}: {weight!r} is packed by bitsandbytes "
                        f"({self.quant_type}), but {name!r} is missing. Download it again."
                    )
            native = FROM_TORCH_NAMES.get(str(state.get("dtype")), "F32")
            packed = found(self, checkpoint, weight, shape, native, names, state=state)
            self._check(packed)
            yield packed

    def _check(self, packed: Packed) -> None:
        numel, block = math.prod(packed.shape), self._block(packed)
        sizes = {"weight": (numel + 1) // 2, "absmax": -(-numel // block)}
        for role, expected in sizes.items():
            part = packed.parts[role]
            count = part.nbytes if role == "weight" else math.prod(part.shape)
            if count != expected:
                raise UsageError(
                    f"{packed.outlines[role].name!r}: holds {count} values, a weight of "
                    f"{list(packed.shape)} in blocks of {block} has {expected}."
                )

    @staticmethod
    def _block(packed: Packed) -> int:
        return int(_numbers(packed)["blocksize"])

    def _absmax(self, packed: Packed, first: int = 0, last: int | None = None) -> Tensor:
        """absmax of the blocks first:last."""
        stored = packed.whole("absmax").reshape(-1)[first:last]
        if "nested_absmax" not in packed.parts:
            return stored.float()
        state = _numbers(packed)
        table = packed.whole("nested_map").float().reshape(-1)
        scale = packed.whole("nested_absmax").float().reshape(-1)
        values = table.index_select(0, stored.int())
        size = int(state["nested_blocksize"])
        wide = scale[first // size :][: len(values) // size + 2].repeat_interleave(size)
        values *= wide[first % size :][: len(values)]
        return values.add_(float(state["nested_offset"]))

    def _grid(self, packed: Packed, book: Codebook, absmax: Tensor, start: int, stop: int) -> Grid:
        """The grid of rows start:stop; absmax: of the blocks that they lie in."""
        columns, block = packed.columns, self._block(packed)
        if columns % block == 0:
            return Grid(book, absmax.reshape(-1, columns // block), group=block)
        place = torch.arange(start * columns, stop * columns, dtype=torch.int32) // block
        scale = absmax.index_select(0, place - start * columns // block)
        return Grid(book, scale.reshape(-1, columns), group=1)

    def _held(self, packed: Packed, start: int, stop: int) -> Grid:
        """The grid of rows start:stop as they are stored."""
        block = self._block(packed)
        first, last = start * packed.columns // block, -(-stop * packed.columns // block)
        absmax = self._absmax(packed, first, last)
        return self._grid(packed, self._book(packed), absmax, start, stop)

    def _book(self, packed: Packed) -> Codebook:
        if "map" not in packed.parts:
            return _book(self.levels)
        return _book(tuple(packed.whole("map").reshape(-1).tolist()))

    def _bytes(self, packed: Packed, start: int, stop: int) -> Tensor:
        """The bytes of rows start:stop, with the halves before and behind that belong to others."""
        raw = torch.frombuffer(packed.parts["weight"].read(), dtype=torch.uint8)
        return raw[start * packed.columns // 2 : (stop * packed.columns + 1) // 2]

    def grid(self, packed: Packed, start: int, stop: int) -> tuple[Grid, Tensor]:
        count, skipped = (stop - start) * packed.columns, start * packed.columns % 2
        codes = bits.high_first(self._bytes(packed, start, stop))[skipped : skipped + count]
        return self._held(packed, start, stop), codes.reshape(stop - start, packed.columns)

    def dequantize(
        self, packed: Packed, start: int, stop: int, out: Tensor | None = None
    ) -> Tensor:
        """By whole bytes where rows do not share any: several times as fast."""
        start, stop = self.matrix_rows(packed, start, stop)
        if packed.columns % 2 or start == stop:
            grid, codes = self.grid(packed, start, stop)
            return self.to_weight(packed, grid.values(codes, out=out))
        grid = self._held(packed, start, stop)
        values = grid.book.values_of_pairs(self._bytes(packed, start, stop), out)
        return self.to_weight(packed, grid.placed(values.reshape(stop - start, -1)))

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        block, columns = self._block(packed), packed.columns
        flat = matrix.reshape(-1)
        book = self._book(packed)
        lacking = -flat.numel() % block
        wide = (torch.nn.functional.pad(flat, (0, lacking)) if lacking else flat).reshape(-1, block)
        largest = magnitudes(wide, block)[:, 0]
        absmax = self._kept(book, self._absmax(packed), largest) if packed.parts else largest
        parts = self._stored_absmax(packed, absmax)
        held = self._absmax_of(packed, parts)
        return self._grid(packed, book, held, 0, flat.numel() // columns), parts

    @staticmethod
    def _kept(book: Codebook, old: Tensor, largest: Tensor) -> Tensor:
        """absmax of every block: the old one, unless the largest value moved far from it: up by a
        quarter of the outermost step, so that values are cut off, or down by half of it. Which of
        two closer scales rounds a block better is chance.
        """
        half = float(book.levels[-1] - book.levels[-2]) / 2
        moved = (largest > old * (1 + half / 2)) | (largest < old * (1 - half))
        return torch.where(moved, largest, old)

    def _absmax_of(self, packed: Packed, parts: dict[str, Tensor]) -> Tensor:
        """What stored scales stand for; those that are not there are the ones of before."""
        if "nested_absmax" not in packed.outlines:
            return parts["absmax"].float().reshape(-1)
        state: dict[str, float] = json.loads(bytes(parts["state"].tolist()))
        scale = parts["nested_absmax"].repeat_interleave(int(state["nested_blocksize"]))
        values = parts["nested_map"].index_select(0, parts["absmax"].int())
        return values * scale[: len(values)] + float(state["nested_offset"])

    def _stored_absmax(self, packed: Packed, absmax: Tensor) -> dict[str, Tensor]:
        """absmax (blocks,) fp32 as stored, with everything that is stored beside it."""
        state = dict(cast("dict[str, object]", packed.fields["state"]))
        kept = {role: packed.whole(role) for role in ("map", "state") if role in packed.parts}
        if "nested_absmax" not in packed.outlines:
            made = {"absmax": absmax}
            dtype = packed.whole("absmax").dtype if packed.parts else torch.float32
            made["absmax"] = absmax.to(dtype)
        elif packed.parts:
            made = self._nested_again(packed, absmax)
        else:
            offset = float(absmax.mean())
            state["nested_offset"] = offset
            made = _nested(absmax - offset, _second_level())
            made["nested_map"] = _second_level().table
        if not packed.parts:
            kept["map"] = torch.tensor(self.levels)
            kept["state"] = _state_bytes(state, packed.outlines["state"].shape[0])
        return {**kept, **made}

    def _nested_again(self, packed: Packed, absmax: Tensor) -> dict[str, Tensor]:
        """Second-level codes of changed scales; a second-level scale grows where it has to."""
        state = _numbers(packed)
        size, offset = int(state["nested_blocksize"]), float(state["nested_offset"])
        book = _book(tuple(packed.whole("nested_map").reshape(-1).tolist()))
        old_codes = packed.whole("absmax").reshape(-1)
        old_scale = packed.whole("nested_absmax").float().reshape(-1)
        shifted = absmax - offset
        blocks = torch.nn.functional.pad(shifted, (0, -shifted.numel() % size)).reshape(-1, size)
        largest = blocks.abs().amax(1)
        scale = torch.where(largest > old_scale * 1.02, largest, old_scale)
        same = self._absmax(packed) == absmax
        same &= (scale == old_scale).repeat_interleave(size)[: shifted.numel()]
        other = (~same).nonzero()[:, 0]
        spread = scale.index_select(0, other // size)
        units = shifted.index_select(0, other) / torch.where(spread > 0, spread, torch.inf)
        codes = old_codes.index_copy(0, other, book.nearest(units))
        return {
            "absmax": codes.reshape(packed.parts["absmax"].shape),
            "nested_absmax": scale,
            "nested_map": packed.whole("nested_map"),
        }

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        flat = codes.reshape(-1)
        if flat.numel() % 2:  # the half byte behind the last code stands for 0
            zero = self._book(packed).nearest(torch.zeros(1))
            flat = torch.cat((flat, zero))
        outline = packed.outlines["weight"]
        stored = bits.pack_high_first(flat)
        if packed.parts:
            stored = stored.view(packed.whole("weight").dtype)
        return {"weight": stored.reshape(outline.shape)}

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        block, nested = cast(int, options.get("block", 64)), bool(options.get("nested", True))
        if block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise UsageError(f"{self.title}: a block of {block}; expected 32, 64, 128 … 4096.")
        dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[native]
        state: dict[str, object] = {"quant_type": self.quant_type, "blocksize": block}
        state |= {"dtype": dtype, "shape": list(shape)}
        numel = math.prod(shape)
        count = -(-numel // block)
        outlines = {
            "weight": Outline(name, "U8", ((numel + 1) // 2, 1)),
            "absmax": Outline(f"{name}.absmax", "U8" if nested else "F32", (count,)),
            "map": Outline(f"{name}.quant_map", "F32", (16,)),
        }
        if nested:
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": 0.0}
            seconds = -(-count // NESTED)
            outlines["nested_absmax"] = Outline(f"{name}.nested_absmax", "F32", (seconds,))
            outlines["nested_map"] = Outline(f"{name}.nested_quant_map", "F32", (256,))
        size = len(json.dumps(state)) + (24 if nested else 0)
        stored = f"{name}.quant_state.bitsandbytes__{self.quant_type}"
        outlines["state"] = Outline(stored, "U8", (size,))
        return Packed(self, name, shape, native, outlines, {}, {"state": state})

    def config(self, **options: object) -> dict[str, object]:
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": bool(options.get("nested", True)),
            "bnb_4bit_compute_dtype": str(options.get("compute", "bfloat16")),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": options.get("skip"),
            "llm_int8_threshold": 6.0,
        }


class NF4(Bits4):
    name = "nf4"
    title = "bitsandbytes NF4"
    quant_type = "nf4"
    levels = NF4_LEVELS


class FP4(Bits4):
    name = "fp4"
    title = "bitsandbytes FP4"
    quant_type = "fp4"
    levels = FP4_LEVELS


def _numbers(packed: Packed) -> dict[str, float]:
    """The numbers of the quant state."""
    return cast("dict[str, float]", packed.fields["state"])


def _nested(shifted: Tensor, book: Codebook) -> dict[str, Tensor]:
    blocks = torch.nn.functional.pad(shifted, (0, -shifted.numel() % NESTED)).reshape(-1, NESTED)
    scale = blocks.abs().amax(1)
    units = blocks / torch.where(scale > 0, scale, torch.inf)[:, None]
    codes = book.nearest(units).reshape(-1)[: shifted.numel()]
    return {"absmax": codes, "nested_absmax": scale}


def _state(tensor: LazyTensor) -> dict[str, object]:
    try:
        state = json.loads(bytes(tensor.read()))
    except ValueError as error:
        raise UsageError(f"{tensor.path}: {tensor.name!r} is no JSON: {error}") from error
    wanted = {"blocksize", "shape", "quant_type"}
    if not isinstance(state, dict) or not wanted <= set(state):
        raise UsageError(f"{tensor.path}: {tensor.name!r} lacks one of {sorted(wanted)}.")
    if state.get("nested_dtype", "float32") != "float32":
        raise UnsupportedError(f"{tensor.path}: {tensor.name!r}: nested_dtype is not float32.")
    return state


def _state_bytes(state: dict[str, object], size: int) -> Tensor:
    """JSON, filled up with spaces: its length is promised before the offset is known."""
    raw = json.dumps(state).encode()
    if len(raw) > size:
        raise RuntimeError(f"a quant state of {len(raw)} bytes where {size} were promised")
    return torch.tensor(list(raw.ljust(size)), dtype=torch.uint8)
