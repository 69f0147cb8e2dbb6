"""`int-quantized` of compressed-tensors: one int8 a weight.

See compressed_integers.py for what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.quantizers.books import Integers
from peftsurgery.quantizers.compressed_integers import CompressedIntegers, matrix_of
from peftsurgery.quantizers.compressed_schemes import check_config, config_of, weights_of
from peftsurgery.quantizers.configs import quantization_config
from peftsurgery.quantizers.packed import Outline, Packed, found


class IntQuantized(CompressedIntegers):
    name = "int-quantized"
    title = "compressed-tensors int-quantized"

    def book(self, packed: Packed) -> Integers:
        return Integers(-128, 127)

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for stored, weight in checkpoint.items():
            module = stored.removesuffix(".weight")
            if weight.dtype != "I8" or module == stored:
                continue
            names = {"weight": stored, **self.sides(checkpoint, module)}
            config = quantization_config(checkpoint, stored)
            method = config.get("quant_method", "compressed-tensors")
            if "scale" not in names or method != "compressed-tensors":
                continue
            check_config(f"{checkpoint.source}: {stored!r}", config)
            shape, native = tuple(weight.shape), checkpoint[names["scale"]].dtype
            fields = {"bits": 8, "padded": False}
            packed = found(self, checkpoint, stored, shape, native, names, **fields)
            self.check(packed)
            yield packed

    def codes(self, packed: Packed, start: int, stop: int) -> Tensor:
        return packed.part_rows("weight", start, stop)

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        return {"weight": codes.reshape(packed.shape)}

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """One scale for a row, no zeros."""
        rows, _ = matrix_of(self, name, shape, -1)
        outlines = {
            "weight": Outline(name, "I8", shape),
            "scale": Outline(f"{name.removesuffix('.weight')}.weight_scale", native, (rows, 1)),
        }
        fields = {"bits": 8, "padded": False, "symmetric": True}
        return Packed(self, name, shape, native, outlines, {}, fields)

    def config(self, **options: object) -> dict[str, object]:
        """The preset W8A8: the activations are rounded to 8 bits while the model runs."""
        inputs: dict[str, object] = {"num_bits": 8, "type": "int", "symmetric": True}
        inputs |= {"strategy": "token", "dynamic": True}
        return config_of(
            "int-quantized", weights_of(8, symmetric=True, group=None), inputs, options
        )
