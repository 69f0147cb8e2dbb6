"""NVFP4: 4-bit floats in groups of 16 with an E4M3 scale each, and one scale for all (NVIDIA
2025, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149).

compressed-tensors (compressors/nvfp4): `X.weight_packed` bytes (o, i/2), `X.weight_scale` F8_E4M3
(o, i/16), `X.weight_global_scale` fp32 [1]:      w = e2m1[code] · (scale / global)
ModelOpt (NVFP4QTensor): `X.weight` bytes (o, i/2), `X.weight_scale` F8_E4M3 (o, i/16),
`X.weight_scale_2` fp32 []:                       w = e2m1[code] · (scale · scale_2)
The even column is in the low half of a byte.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.compressed_float8 import compressed_config
from peftsurgery.quantizers.float4 import LARGEST, ScaledFloat4, kept_parts, layer_of
from peftsurgery.quantizers.float8 import kept
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.packed import Outline, Packed, found
from peftsurgery.quantizers.scaled_float8 import comfy_layers

GROUP = 16
HIGHEST = 448.0  # of E4M3
LEAST = 2.0**-9  # the least positive E4M3
OVERFLOW = 464.0  # what is below still rounds to HIGHEST


class NvFloat4(ScaledFloat4, abc.ABC):
    """Parts `weight`, `scale` and `whole`, the one for all."""

    group = GROUP
    names: ClassVar[Mapping[str, str]]  # role -> suffix of the module's name
    others: ClassVar[tuple[str, ...]]  # parts of a module that come back as they were

    @abc.abstractmethod
    def _unit(self, whole: Tensor, scale: Tensor) -> Tensor:
        """What a code of 1 stands for, of `whole` [] and the groups' scales, all fp32."""

    @abc.abstractmethod
    def _whole(self, largest: Tensor) -> Tensor:
        """A fresh `whole` for a weight with this largest magnitude."""

    @abc.abstractmethod
    def _wanted(self, whole: Tensor, largest: Tensor) -> Tensor:
        """The groups' scales, fp32, that make their largest magnitude the largest level."""

    @abc.abstractmethod
    def _coarser(self, whole: Tensor, doublings: int) -> Tensor:
        """`whole` for groups' scales that are divided by 2^doublings."""

    empty: ClassVar[float]  # the scale of a group of zeros

    def _stored_scales(self, packed: Packed, start: int, stop: int) -> Tensor:
        """Scales of rows start:stop, F8_E4M3 (rows, groups)."""
        return packed.part_rows("scale", start, stop)

    def _as_stored(self, packed: Packed, scale: Tensor) -> Tensor:
        return scale.reshape(packed.outlines["scale"].shape)

    def _scales(self, packed: Packed, start: int, stop: int) -> Tensor:
        scale = self._stored_scales(packed, start, stop).float()
        return self._unit(packed.whole("whole").float().reshape(()), scale)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        """Of the scale that was there, a fresh one and the next larger one, every group takes the
        one that rounds with the least squared error. `whole` stays unless some scale would exceed
        448; then it grows by a power of two, which keeps most values.
        """
        largest = self.largest(matrix)
        whole = packed.whole("whole").float().reshape(()) if packed.parts else torch.zeros(())
        highest = float(self._wanted(whole, largest).amax())
        if not packed.parts or not 0 < float(whole) < math.inf or not math.isfinite(highest):
            whole = self._whole(largest.amax())
            scale = self._fresh_scales(whole, largest)
        else:
            old = self._stored_scales(packed, 0, packed.rows).float()
            doublings = max(0, math.ceil(math.log2(max(highest, OVERFLOW) / OVERFLOW)))
            if doublings:
                whole, old = self._coarser(whole, doublings), old / 2**doublings
            scale = self._chosen(matrix, whole, old.to(torch.float8_e4m3fn), largest)
        grid = self._grid(self._unit(whole, scale.float()))
        outline = packed.outlines["whole"]
        parts = {"scale": self._as_stored(packed, scale), "whole": whole.reshape(outline.shape)}
        return grid, {**parts, **kept_parts(packed)}

    def _fresh_scales(self, whole: Tensor, largest: Tensor) -> Tensor:
        wanted = self._wanted(whole, largest).clamp(LEAST, HIGHEST)
        return torch.where(largest > 0, wanted, self.empty).to(torch.float8_e4m3fn)

    def _chosen(self, matrix: Tensor, whole: Tensor, old: Tensor, largest: Tensor) -> Tensor:
        best, least = old, self.error(matrix, self._unit(whole, old.float()))
        fresh = self._fresh_scales(whole, largest)
        bytes_ = fresh.view(torch.uint8)
        above = torch.where(bytes_ < 0x7E, bytes_ + 1, bytes_).view(fresh.dtype)  # 0x7E is 448
        for other in (fresh, above):
            error = self.error(matrix, self._unit(whole, other.float()))
            less = error < least
            best = torch.where(less, other.float(), best.float()).to(old.dtype)
            least = torch.where(less, error, least)
        return best

    def _claim(self, checkpoint: Checkpoint, module: str) -> Packed:
        names = {role: f"{module}.{suffix}" for role, suffix in self.names.items()}
        for name in names.values():
            if name not in checkpoint:
                raise UsageError(
                    f"{checkpoint.source}: {module!r} is packed as NVFP4, but {name!r} is "
                    "missing. Download it again."
                )
        weight, scale = checkpoint[names["weight"]], checkpoint[names["scale"]]
        if len(weight.shape) != 2 or weight.dtype != "U8":
            raise UnsupportedError(
                f"{checkpoint.source}: {names['weight']!r} is {weight.dtype} of shape "
                f"{list(weight.shape)}; expected bytes (outputs, inputs / 2)."
            )
        rows, half = weight.shape
        shape = (rows, 2 * half)
        right = tuple(scale.shape) == self._scale_shape(shape) and shape[1] % GROUP == 0
        if not right or scale.dtype not in ("F8_E4M3", "U8"):
            raise UsageError(
                f"{checkpoint.source}: {names['scale']!r} is {scale.dtype} of shape "
                f"{list(scale.shape)}; a weight of {list(shape)} has F8_E4M3 of shape "
                f"{list(self._scale_shape(shape))}. Download it again."
            )
        whole = checkpoint[names["whole"]]
        if whole.dtype != "F32" or whole.nbytes != 4:
            raise UsageError(
                f"{checkpoint.source}: {names['whole']!r} is {whole.dtype} of shape "
                f"{list(whole.shape)}; expected one fp32 number. Download it again."
            )
        names |= kept(checkpoint, module, self.others)
        return found(self, checkpoint, f"{module}.weight", shape, "BF16", names)

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[0], shape[1] // GROUP

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        module = layer_of(self.title, name, shape, GROUP)
        own = {role: f"{module}.{suffix}" for role, suffix in self.names.items()}
        outlines = {
            "weight": Outline(own["weight"], "U8", (shape[0], shape[1] // 2)),
            "scale": Outline(own["scale"], "F8_E4M3", self._scale_shape(shape)),
            "whole": Outline(own["whole"], "F32", self._whole_shape()),
        }
        return Packed(self, name, shape, native, outlines)

    def _whole_shape(self) -> tuple[int, ...]:
        return ()


class CompressedNvfp4(NvFloat4):
    name = "nvfp4"
    title = "compressed-tensors' NVFP4"
    names: ClassVar[Mapping[str, str]] = {
        "weight": "weight_packed",
        "scale": "weight_scale",
        "whole": "weight_global_scale",
    }
    others = ("input_global_scale",)
    empty = 0.125

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for stored in checkpoint:
            if stored.endswith(".weight_global_scale"):
                yield self._claim(checkpoint, stored.removesuffix(".weight_global_scale"))

    def _unit(self, whole: Tensor, scale: Tensor) -> Tensor:
        return scale / whole

    def _whole(self, largest: Tensor) -> Tensor:
        whole = HIGHEST * LARGEST / largest.clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(torch.isfinite(whole), whole, 1.0)

    def _wanted(self, whole: Tensor, largest: Tensor) -> Tensor:
        return whole * (largest / LARGEST)

    def _coarser(self, whole: Tensor, doublings: int) -> Tensor:
        return whole / 2**doublings

    def _whole_shape(self) -> tuple[int, ...]:
        return (1,)

    def config(self, **options: object) -> dict[str, object]:
        """Weights only (NVFP4A16): scales of the inputs would need data."""
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor_group",
            "group_size": GROUP,
            "scale_dtype": "torch.float8_e4m3fn",
            "zp_dtype": "torch.float8_e4m3fn",
        }
        group: dict[str, object] = {"targets": ["Linear"], "weights": weights}
        return compressed_config("nvfp4-pack-quantized", group, options.get("skip"))


class ModelOptNvfp4(NvFloat4):
    name = "nvfp4-modelopt"
    title = "ModelOpt's NVFP4"
    names: ClassVar[Mapping[str, str]] = {
        "weight": "weight",
        "scale": "weight_scale",
        "whole": "weight_scale_2",
    }
    others = ("input_scale",)
    empty = 1.0

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        comfy = comfy_layers(checkpoint)
        for stored in checkpoint:
            module = stored.removesuffix(".weight_scale_2")
            if module != stored and module not in comfy:
                if f"{module}.pre_quant_scale" in checkpoint:
                    raise UnsupportedError(
                        f"{checkpoint.source}: {module!r} has a pre_quant_scale: its inputs are "
                        "scaled before the weight (AWQ). Merge into the original and quantize the "
                        "result."
                    )
                yield self._claim(checkpoint, module)

    def _unit(self, whole: Tensor, scale: Tensor) -> Tensor:
        return scale * whole

    def _whole(self, largest: Tensor) -> Tensor:
        whole = largest / (LARGEST * HIGHEST)
        return torch.where(whole > 0, whole, 1.0)

    def _wanted(self, whole: Tensor, largest: Tensor) -> Tensor:
        return largest / (LARGEST * whole)

    def _coarser(self, whole: Tensor, doublings: int) -> Tensor:
        return whole * 2**doublings

    def config(self, **options: object) -> dict[str, object]:
        """Weights only (W4A16_NVFP4): scales of the inputs would need data."""
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP}
        return {
            "quant_method": "modelopt",
            "quant_algo": "W4A16_NVFP4",
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": options.get("skip") or [],
        }
