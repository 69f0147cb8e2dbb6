"""ComfyUI's scaled 8-bit floats, in both spellings, and those of musubi-tuner.

Older (ComfyUI, comfy/utils.py `convert_old_quants`): `X.weight` F8, `X.scale_weight` fp32, often
`X.scale_input`, and for the whole model a tensor `scaled_fp8` behind the model's prefix, whose
dtype is that of the weights; it is empty, or has two elements where products are to be computed in
full precision. Newer (comfy/ops.py `mixed_precision_ops`): `X.weight_scale`, `X.input_scale`
and, as JSON in bytes, `X.comfy_quant` {"format": "float8_e4m3fn"}; or for all layers together
`_quantization_metadata` {"layers": {X: {…}}} in the file's metadata. musubi-tuner
(fp8_optimization_utils.py): `X.scale_weight` of shape [1], [o, 1] or [o, b, 1], b blocks of
inputs; no marker is needed.

    w = code · scale
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.float8 import FLOAT8, KEPT, ScaledFloat8, book, kept
from peftsurgery.quantizers.grids import Grid
from peftsurgery.quantizers.packed import Outline, Packed

COMFY_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
ELSEWHERE = ("nvfp4",)  # what ComfyUI names the same way and another file here reads
METADATA = "_quantization_metadata"
MARKER = "scaled_fp8"
TOLD = f"{KEPT}comfy_quant"
# Behind which ComfyUI looks for `scaled_fp8` (comfy/model_detection.py unet_prefix_from_state_dict)
PREFIXES = ("model.diffusion_model.", "model.model.", "net.")


def comfy_layers(checkpoint: Checkpoint) -> dict[str, Mapping[str, object]]:
    """Module -> its `comfy_quant`, from the tensors and from the metadata of the file.

    UsageError for one that cannot be read.
    """
    layers: dict[str, Mapping[str, object]] = {}
    parts = checkpoint.components or {"": checkpoint}
    for component, part in parts.items():
        if METADATA not in part.metadata:
            continue
        told = _json(part.metadata[METADATA], f"{part.source}: metadata {METADATA!r}")
        inner = told.get("layers")
        if not isinstance(inner, dict):
            raise UsageError(f"{part.source}: metadata {METADATA!r} lacks 'layers'.")
        start = f"{component}:" if component else ""
        layers.update({f"{start}{name}": c for name, c in inner.items() if isinstance(c, dict)})
    for name, tensor in checkpoint.items():
        if name.endswith(".comfy_quant"):
            layers[name.removesuffix(".comfy_quant")] = _told(tensor)
    return layers


def _told(tensor: LazyTensor) -> Mapping[str, object]:
    return _json(bytes(tensor.read()), f"{tensor.path}: {tensor.name!r}")


def _json(raw: str | bytes, where: str) -> dict[str, object]:
    try:
        told = json.loads(raw)
    except ValueError as error:
        raise UsageError(f"{where} is no JSON: {error}. Download the file again.") from error
    if not isinstance(told, dict):
        raise UsageError(f"{where} is no JSON object. Download the file again.")
    return told


class ComfyFloat8(ScaledFloat8):
    name = "fp8-scaled"
    title = "ComfyUI's scaled 8-bit floats"

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for scale in checkpoint:
            if not scale.endswith(".scale_weight"):
                continue
            module = scale.removesuffix(".scale_weight")
            names = {"weight": f"{module}.weight", "scale": scale}
            if names["weight"] not in checkpoint:
                continue  # of something else
            dtype = checkpoint[names["weight"]].dtype
            if dtype not in FLOAT8:
                raise UsageError(
                    f"{checkpoint.source}: {scale!r} scales {names['weight']!r}, which is {dtype}; "
                    "8-bit floats were expected. Remove the scale or download the file again."
                )
            names |= kept(checkpoint, module, ("scale_input",))
            yield self._claim(checkpoint, names["weight"], "BF16", names)
        for module, told in comfy_layers(checkpoint).items():
            if told.get("format") not in COMFY_FORMATS:
                _check_known(checkpoint, module, told)
                continue
            names = {"weight": f"{module}.weight", "scale": f"{module}.weight_scale"}
            for name in names.values():
                if name not in checkpoint and f"{module}.scale_weight" not in checkpoint:
                    raise UsageError(
                        f"{checkpoint.source}: {module!r} is packed by ComfyUI "
                        f"({told['format']}), but {name!r} is missing. Download it again."
                    )
            if names["scale"] not in checkpoint:
                continue  # the older spelling, claimed above
            dtype = checkpoint[names["weight"]].dtype
            if dtype != COMFY_FORMATS[str(told["format"])]:
                raise UnsupportedError(
                    f"{checkpoint.source}: {names['weight']!r} is {dtype}, but said to be "
                    f"{told['format']}. Download the file again."
                )
            names |= kept(checkpoint, module, ("input_scale", "comfy_quant"))
            yield self._claim(checkpoint, names["weight"], "BF16", names)

    def fit(self, packed: Packed, matrix: Tensor) -> tuple[Grid, dict[str, Tensor]]:
        grid, parts = super().fit(packed, matrix)
        if not packed.parts and TOLD in packed.outlines:
            raw = _told_bytes(packed.outlines["weight"].dtype)
            parts[TOLD] = torch.tensor(list(raw), dtype=torch.uint8)
        return grid, parts

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """One scale for the whole weight, its largest magnitude / the largest value.

        Options: `dtype` F8_E4M3 (default) or F8_E5M2; `spelling` "comfy_quant" (default), or
        "scaled_fp8", which also wants the tensors of `markers` in the file.
        """
        dtype = str(options.get("dtype", "F8_E4M3"))
        spelling = options.get("spelling", "comfy_quant")
        if dtype not in COMFY_FORMATS.values() or spelling not in ("comfy_quant", MARKER):
            raise UsageError(
                f"{self.title}: dtype {dtype!r}, spelling {spelling!r}; expected "
                f"{' or '.join(COMFY_FORMATS.values())}, and comfy_quant or {MARKER}."
            )
        if not name.endswith(".weight") or len(shape) < 2:
            raise UnsupportedError(
                f"{name!r}: {self.title} pack the `.weight` of a layer, this is {list(shape)}."
            )
        module = name.removesuffix(".weight")
        if spelling == MARKER:
            return self._fresh(
                name, shape, native, Outline(f"{module}.scale_weight", "F32", ()), dtype=dtype
            )
        scale = Outline(f"{module}.weight_scale", "F32", ())
        packed = self._fresh(name, shape, native, scale, dtype=dtype)
        told = Outline(f"{module}.comfy_quant", "U8", (len(_told_bytes(dtype)),))
        return replace(packed, outlines={**packed.outlines, TOLD: told})

    def markers(self, packed: Sequence[Packed]) -> dict[str, Tensor]:
        """An empty `scaled_fp8` behind every prefix below which the older spelling is used."""
        found: dict[str, Tensor] = {}
        for item in packed:
            if item.outlines["scale"].name.endswith(".scale_weight"):
                component, colon, own = item.name.rpartition(":")
                prefix = next((start for start in PREFIXES if own.startswith(start)), "")
                dtype = book(item.outlines["weight"].dtype).float_dtype
                found[f"{component}{colon}{prefix}{MARKER}"] = torch.empty(0, dtype=dtype)
        return found

    def marks(self, name: str) -> bool:
        return name.rpartition(":")[2].rpartition(".")[2] == MARKER


def _told_bytes(dtype: str) -> bytes:
    spelled = next(comfy for comfy, known in COMFY_FORMATS.items() if known == dtype)
    return json.dumps({"format": spelled}).encode()


def _check_known(checkpoint: Checkpoint, module: str, told: Mapping[str, object]) -> None:
    if told.get("format") not in ELSEWHERE:
        raise UnsupportedError(
            f"{checkpoint.source}: {module!r} is packed by ComfyUI as {told.get('format')!r}; "
            f"known are {', '.join((*COMFY_FORMATS, *ELSEWHERE))}. Merge into the original and "
            "quantize the result."
        )
