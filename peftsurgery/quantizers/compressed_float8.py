"""compressed-tensors' 8-bit floats, and what is stored like them: ModelOpt's, and fbgemm_fp8.

Stored (compressed_tensors, compressors/naive_quantized): `X.weight` F8_E4M3 and `X.weight_scale`,
[1] or [] (per tensor), [o, 1] (per channel), [a, b] (per block, `block_structure` of the config)
or [o, i/g] (per group); fp32, bf16 or fp16, or bytes of E8M0 exponents (MXFP8, groups of 32);
`X.input_scale`, and scales of what a KV cache holds. transformers' fbgemm_fp8 (integrations/
fbgemm_fp8.py) has fp32 [o, 1].

    w = code · scale
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.configs import quantization_config
from peftsurgery.quantizers.float8 import FLOAT8, KEPT, ScaledFloat8, kept
from peftsurgery.quantizers.packed import Outline, Packed

SUFFIX = ".weight_scale"
OTHERS = ("input_scale", "input_global_scale", "weight_zero_point")
NATIVE = ("F32", "F16", "BF16")


class CompressedFloat8(ScaledFloat8):
    name = "fp8-compressed"
    title = "compressed-tensors' 8-bit floats"

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for scale in checkpoint:
            if not scale.endswith(SUFFIX):
                continue
            module = scale.removesuffix(SUFFIX)
            names = {"weight": f"{module}.weight", "scale": scale}
            if names["weight"] not in checkpoint:
                continue
            if checkpoint[names["weight"]].dtype not in FLOAT8:
                continue
            if f"{module}.pre_quant_scale" in checkpoint:
                raise UnsupportedError(
                    f"{checkpoint.source}: {module!r} has a pre_quant_scale: its inputs are scaled "
                    "before the weight. Merge into the original and quantize the result."
                )
            names |= kept(checkpoint, module, OTHERS)
            zero = names.get(f"{KEPT}weight_zero_point")
            if zero and bool(checkpoint[zero].torch().float().any()):
                raise UnsupportedError(
                    f"{checkpoint.source}: {zero!r} is not 0: 8-bit floats with a zero point are "
                    "not known. Merge into the original and quantize the result."
                )
            config = quantization_config(checkpoint, scale)
            native = checkpoint[scale].dtype
            yield self._claim(
                checkpoint,
                names["weight"],
                native if native in ("F16", "BF16") else "BF16",
                names,
                block=block_structure(config),
            )

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """Option: `strategy`, "channel" (default, one scale for each row) or "tensor"."""
        strategy = options.get("strategy", "channel")
        if strategy not in ("channel", "tensor"):
            raise UsageError(f"{self.title}: strategy {strategy!r}; expected channel or tensor.")
        if len(shape) != 2 or not name.endswith(".weight"):
            raise UnsupportedError(
                f"{name!r}: {self.title} pack matrices named `.weight`, this is {list(shape)}."
            )
        scales = (shape[0], 1) if strategy == "channel" else (1,)
        stored = Outline(name.removesuffix(".weight") + SUFFIX, self._scale_dtype(native), scales)
        return self._fresh(name, shape, native, stored)

    def _scale_dtype(self, native: str) -> str:
        return native if native in NATIVE else "F32"

    def config(self, **options: object) -> dict[str, object]:
        skip = options.get("skip")
        strategy = str(options.get("strategy", "channel"))
        return compressed_config("float-quantized", _arguments(strategy), skip)


class FbgemmFloat8(CompressedFloat8):
    """fbgemm_fp8 of transformers: per channel, fp32 scales."""

    name: ClassVar[str] = "fp8-fbgemm"
    title: ClassVar[str] = "transformers' fbgemm_fp8"

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for packed in super().find(checkpoint):
            if quantization_config(checkpoint, packed.name).get("quant_method") == "fbgemm_fp8":
                yield packed
        for name in checkpoint:
            config = quantization_config(checkpoint, name)
            if config.get("quant_method") == "fbgemm_fp8" and name.endswith("_proj_scale"):
                raise UnsupportedError(
                    f"{checkpoint.source}: {name!r}: stacked experts packed by fbgemm_fp8 are not "
                    "known. Merge into the original and quantize the result."
                )

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        if options.get("strategy", "channel") != "channel":
            raise UsageError(f"{self.title}: one scale for each row (strategy channel) only.")
        return super().fresh(name, shape, native, **options)

    def _scale_dtype(self, native: str) -> str:
        return "F32"

    def config(self, **options: object) -> dict[str, object]:
        return {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": options.get("skip"),
        }


def _arguments(strategy: str) -> dict[str, object]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    inputs["strategy"] = "token" if strategy == "channel" else "tensor"
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs}


def compressed_config(form: str, group: dict[str, object], skip: object) -> dict[str, object]:
    """A `quantization_config` of compressed-tensors with one group of layers."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": form}},
        "ignore": skip or [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def block_structure(config: dict[str, object]) -> tuple[int, int] | None:
    """The first `block_structure` of the weights of a config's groups."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        block = weights.get("block_structure") if isinstance(weights, dict) else None
        if isinstance(block, list | tuple) and len(block) == 2:
            return int(block[0]), int(block[1])
    return None
