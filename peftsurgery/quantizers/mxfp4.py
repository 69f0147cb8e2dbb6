"""MXFP4: 4-bit floats in groups of 32 that share a power of two (OCP Microscaling Formats 1.0,
2023; Rouhani et al. 2023, arXiv:2310.10537).

gpt-oss (OpenAI 2025, arXiv:2508.10925; transformers, integrations/mxfp4.py): `X_blocks` bytes
(E, o, G, 16), `X_scales` bytes (E, o, G), for the experts' weight `X`, which the dense model has
as (E, 32 G, o). compressed-tensors (compressors/mxfp4): `X.weight_packed` bytes (o, i/2),
`X.weight_scale` bytes (o, i/32). DeepSeek's 4-bit experts: `X.weight` int8 (o, i/2) and `X.scale`
or `X.weight_scale_inv`, F8_E8M0 (o, i/32). The even column is in the low half of a byte:

    w = e2m1[code] · 2^(scale - 127)
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.compressed_float8 import compressed_config
from peftsurgery.quantizers.float4 import ScaledFloat4, kept_parts, layer_of
from peftsurgery.quantizers.float8 import kept, scales_of
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.packed import Outline, Packed, found

GROUP = 32
BIAS = 127
MOST = 254  # 255 is NaN


class PowerScaled(ScaledFloat4, abc.ABC):
    """Fresh scales: of the two powers that bring the largest magnitude of the group to [4, 8) and
    to [2, 4), the one that rounds with less squared error.
    """

    group = GROUP

    def _scales(self, packed: Packed, start: int, stop: int) -> Tensor:
        return scales_of(packed.part_rows("scale", start, stop).view(torch.uint8))

    def _fresh_scales(self, matrix: Tensor) -> Tensor:
        """Exponents + 127 of a matrix's groups, uint8."""
        floor = floors(self.largest(matrix))
        low, high = (stored(floor - 2), stored(floor - 1))
        errors = [self.error(matrix, scales_of(scale)) for scale in (low, high)]
        return torch.where(errors[1] < errors[0], high, low)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        scale = self._fresh_scales(matrix)
        if packed.parts:
            old = packed.part_rows("scale", 0, packed.rows).view(torch.uint8)
            errors = [self.error(matrix, scales_of(some)) for some in (old, scale)]
            scale = torch.where(errors[1] < errors[0], scale, old)
        outline = packed.outlines["scale"]
        held = scale.reshape(outline.shape)
        if outline.dtype == "F8_E8M0":
            held = held.view(torch.float8_e8m0fnu)
        return self._grid(scales_of(scale)), {"scale": held, **kept_parts(packed)}

    def _checked(
        self,
        checkpoint: Checkpoint,
        name: str,
        shape: tuple[int, ...],
        names: Mapping[str, str],
        expected: tuple[int, ...],
    ) -> Packed:
        scale = checkpoint[names["scale"]]
        if tuple(scale.shape) != expected or scale.dtype not in ("U8", "F8_E8M0"):
            raise UsageError(
                f"{checkpoint.source}: {names['scale']!r} is {scale.dtype} of shape "
                f"{list(scale.shape)}; {names['weight']!r} of shape "
                f"{list(checkpoint[names['weight']].shape)} needs bytes of shape "
                f"{list(expected)}. Download the file again."
            )
        return found(self, checkpoint, name, shape, "BF16", names)


def floors(largest: Tensor) -> Tensor:
    """⌊log2⌋ of positive values, exact; far below everything for 0."""
    exponent = torch.frexp(largest)[1] - 1
    return torch.where(largest > 0, exponent, -BIAS)


def stored(exponent: Tensor) -> Tensor:
    """Exponents as bytes."""
    return (exponent + BIAS).clamp(0, MOST).to(torch.uint8)


class GptOss(PowerScaled):
    name = "mxfp4"
    title = "MXFP4 experts of gpt-oss"

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for blocks, tensor in checkpoint.items():
            if not blocks.endswith("_blocks") or tensor.dtype != "U8":
                continue
            name = blocks.removesuffix("_blocks")
            names = {"weight": blocks, "scale": f"{name}_scales"}
            if len(tensor.shape) != 4 or tensor.shape[3] != GROUP // 2:
                raise UnsupportedError(
                    f"{checkpoint.source}: {blocks!r} has shape {list(tensor.shape)}; expected "
                    f"(experts, outputs, groups, {GROUP // 2})."
                )
            if names["scale"] not in checkpoint:
                raise UsageError(
                    f"{checkpoint.source}: {blocks!r} without {names['scale']!r}. Download the "
                    "missing file."
                )
            experts, outputs, groups, _ = tensor.shape
            shape = (experts, groups * GROUP, outputs)
            yield self._checked(checkpoint, name, shape, names, (experts, outputs, groups))

    def columns(self, packed: Packed) -> int:
        return packed.shape[1]

    def to_matrix(self, packed: Packed, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2).reshape(-1, packed.shape[1])

    def to_weight(self, packed: Packed, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, packed.shape[2], packed.shape[1]).transpose(1, 2)

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """A stack (experts, inputs, outputs), as the dense gpt-oss has it."""
        if len(shape) != 3 or shape[1] % GROUP or name.endswith(".weight"):
            raise UnsupportedError(
                f"{name!r}: {self.title}: expected a parameter (experts, inputs, outputs) with a "
                f"multiple of {GROUP} inputs, this is {list(shape)}. For the weights of layers "
                "take mxfp4-compressed."
            )
        experts, inputs, outputs = shape
        groups = inputs // GROUP
        outlines = {
            "weight": Outline(f"{name}_blocks", "U8", (experts, outputs, groups, GROUP // 2)),
            "scale": Outline(f"{name}_scales", "U8", (experts, outputs, groups)),
        }
        return Packed(self, name, shape, native, outlines)

    def config(self, **options: object) -> dict[str, object]:
        return {"quant_method": "mxfp4", "modules_to_not_convert": options.get("skip")}


class CompressedMxfp4(PowerScaled):
    """Fresh scales as compressed-tensors makes them: largest magnitudes come to [3.5, 7)."""

    name = "mxfp4-compressed"
    title = "compressed-tensors' MXFP4"

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for packed, tensor in checkpoint.items():
            module = packed.removesuffix(".weight_packed")
            names = {"weight": packed, "scale": f"{module}.weight_scale"}
            if module == packed or tensor.dtype != "U8" or len(tensor.shape) != 2:
                continue
            if names["scale"] not in checkpoint:
                raise UsageError(
                    f"{checkpoint.source}: {packed!r} without {names['scale']!r}. Download the "
                    "missing file."
                )
            if checkpoint[names["scale"]].dtype not in ("U8", "F8_E8M0"):
                continue  # NVFP4
            rows, half = tensor.shape
            names |= kept(checkpoint, module, ("input_global_scale",))
            shape, scales = (rows, 2 * half), (rows, 2 * half // GROUP)
            yield self._checked(checkpoint, f"{module}.weight", shape, names, scales)

    def _fresh_scales(self, matrix: Tensor) -> Tensor:
        largest = self.largest(matrix)
        upper = torch.frexp(largest)[0] >= 0.875
        return stored(floors(largest) + upper.to(torch.int32) - 2)

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        module = layer_of(self.title, name, shape, GROUP)
        outlines = {
            "weight": Outline(f"{module}.weight_packed", "U8", (shape[0], shape[1] // 2)),
            "scale": Outline(f"{module}.weight_scale", "U8", (shape[0], shape[1] // GROUP)),
        }
        return Packed(self, name, shape, native, outlines)

    def config(self, **options: object) -> dict[str, object]:
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
            "scale_dtype": "torch.uint8",
            "zp_dtype": "torch.uint8",
        }
        group: dict[str, object] = {"targets": ["Linear"], "weights": weights}
        return compressed_config("mxfp4-pack-quantized", group, options.get("skip"))


class DeepSeekMxfp4(PowerScaled):
    name = "mxfp4-deepseek"
    title = "4-bit experts of DeepSeek"
    quantizable = False

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for name, tensor in checkpoint.items():
            if not name.endswith(".weight") or tensor.dtype != "I8" or len(tensor.shape) != 2:
                continue
            module = name.removesuffix(".weight")
            for scale in (f"{module}.scale", f"{module}.weight_scale_inv"):
                if scale in checkpoint and checkpoint[scale].dtype in ("F8_E8M0", "U8"):
                    names = {"weight": name, "scale": scale}
                    rows, half = tensor.shape
                    shape, scales = (rows, 2 * half), (rows, 2 * half // GROUP)
                    yield self._checked(checkpoint, name, shape, names, scales)
