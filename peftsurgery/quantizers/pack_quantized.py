"""`pack-quantized` of compressed-tensors: codes of 2 to 8 bits in int32 words.

See compressed_integers.py for what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.errors import UsageError
from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.compressed_integers import (
    SIDES,
    CompressedIntegers,
    matrix_of,
    unpacked,
    words_of,
)
from peftsurgery.quantizers.compressed_schemes import (
    check_config,
    config_of,
    layout,
    options_of,
    weights_of,
)
from peftsurgery.quantizers.configs import quantization_config
from peftsurgery.quantizers.packed import Outline, Packed, found


class PackQuantized(CompressedIntegers):
    name = "pack-quantized"
    title = "compressed-tensors pack-quantized"

    def book(self, packed: Packed) -> Integers:
        half = 1 << (cast(int, packed.fields["bits"]) - 1)
        return Integers(-half, half - 1, half)

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for stored, words in checkpoint.items():
            if not stored.endswith(".weight_packed") or words.dtype != "I32":
                continue
            module = stored.removesuffix(".weight_packed")
            config = quantization_config(checkpoint, stored)
            where = f"{checkpoint.source}: {stored!r}"
            check_config(where, config)
            names = {"packed": stored, **self.sides(checkpoint, module)}
            for role in ("scale", "shape"):
                if role not in names:
                    raise UsageError(
                        f"{where}: {f'{module}.{SIDES[role]}'!r} is missing. Download it again."
                    )
            shape = tuple(map(int, checkpoint[names["shape"]].torch().tolist()))
            if len(shape) < 2 or tuple(words.shape[:-1]) != shape[:-1]:
                raise UsageError(
                    f"{where}: has shape {list(words.shape)}, and weight_shape says {list(shape)}. "
                    "Download it again."
                )
            size, padded = layout(where, config, shape[-1], words)
            native = checkpoint[names["scale"]].dtype
            fields = {"bits": size, "padded": padded}
            name = f"{module}.weight"
            packed = found(self, checkpoint, name, shape, native, names, **fields)
            self.check(packed)
            yield packed

    def codes(self, packed: Packed, start: int, stop: int) -> Tensor:
        return unpacked(packed, packed.part_rows("packed", start, stop), packed.columns)

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        return {"packed": words_of(packed, codes).reshape(packed.outlines["packed"].shape)}

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """options: bits (4), 2 to 8; group (128; -1: whole rows), symmetric (True)."""
        size, group, symmetric = options_of(options)
        rows, columns = matrix_of(self, name, shape, group)
        module, groups = name.removesuffix(".weight"), 1 if group == -1 else columns // group
        outlines = {
            "packed": Outline(f"{module}.weight_packed", "I32", (rows, -(-columns * size // 32))),
            "scale": Outline(f"{module}.weight_scale", native, (rows, groups)),
            "shape": Outline(f"{module}.weight_shape", "I64", (2,)),
        }
        if not symmetric:
            zeros = (-(-rows * size // 32), groups)
            outlines["zero"] = Outline(f"{module}.weight_zero_point", "I32", zeros)
        fields = {"bits": size, "padded": False, "symmetric": symmetric}
        return Packed(self, name, shape, native, outlines, {}, fields)

    def config(self, **options: object) -> dict[str, object]:
        size, group, symmetric = options_of(options)
        weights = weights_of(size, symmetric=symmetric, group=None if group == -1 else group)
        return config_of("pack-quantized", weights, None, options)
