"""Fine-grained 8-bit floats: one scale for every block of a weight, mostly 128 x 128.

Stored by DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437) and transformers' `quant_method: fp8`
(integrations/finegrained_fp8.py): `X.weight` F8_E4M3 (o, i) and `X.weight_scale_inv` (⌈o/128⌉,
⌈i/128⌉), which multiplies in spite of its name; fp32, fp32 that holds powers of two, or F8_E8M0
(`scale_fmt: ue8m0`), the latter sometimes as bytes. `X.qscale_weight` (Mistral)
and `X.scale` (DeepSeek's own files) are other names of it. One scale alone is that of the whole
weight (`weight_block_size: null`). Experts in one tensor: `X` (E, o, i) and `X_scale_inv` (E, …).

    w = code · scale of its block
"""

from __future__ import annotations

from collections.abc import Iterator

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.configs import quantization_config
from peftsurgery.quantizers.float8 import FLOAT8, ScaledFloat8, is_stack, kept
from peftsurgery.quantizers.packed import Outline, Packed

BLOCK = (128, 128)
ACTIVATIONS = ("activation_scale", "qscale_act")


class BlockFloat8(ScaledFloat8):
    name = "fp8-block"
    title = "fine-grained 8-bit floats"

    def find(self, checkpoint: Checkpoint) -> Iterator[Packed]:
        for scale, tensor in checkpoint.items():
            weight = _weight_of(checkpoint, scale)
            if weight is None:
                continue
            if weight not in checkpoint or checkpoint[weight].dtype not in FLOAT8:
                if weight in checkpoint and checkpoint[weight].dtype == "I8":
                    continue  # 4-bit floats, two to the byte
                raise UsageError(
                    f"{checkpoint.source}: {scale!r} without a {weight!r} of 8-bit floats. "
                    "Download it again."
                )
            config = quantization_config(checkpoint, scale)
            shape = tuple(checkpoint[weight].shape)
            stacked = is_stack(weight, shape) or len(tensor.shape) == len(shape) == 3
            names = {"weight": weight, "scale": scale}
            if weight.endswith(".weight"):
                names |= kept(checkpoint, weight.removesuffix(".weight"), ACTIVATIONS)
            elif f"{weight}_activation_scale" in checkpoint:
                names["kept activation_scale"] = f"{weight}_activation_scale"
            yield self._claim(
                checkpoint,
                weight,
                "BF16",
                names,
                block=block_size(config),
                stacked=stacked,
                powers=True if config.get("scale_fmt") == "ue8m0" else None,
            )

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """Options: `block` (height, width), default (128, 128), None for one scale alone; `ue8m0`,
        whether scales are powers of two, stored as F8_E8M0.

        UnsupportedError where blocks do not divide the weight: transformers does not read that.
        """
        block = options.get("block", BLOCK)
        powers = bool(options.get("ue8m0", False))
        stacked = is_stack(name, shape)
        if not stacked and (len(shape) != 2 or not name.endswith(".weight")):
            raise UnsupportedError(
                f"{name!r}: {self.title} pack matrices and stacks of them, this is {list(shape)}."
            )
        if block is None:
            scales: tuple[int, ...] = (shape[0], 1, 1) if stacked else ()
        else:
            height, width = _two(block)
            if shape[-2] % height or shape[-1] % width:
                raise UnsupportedError(
                    f"{name!r}: {list(shape)} is no whole number of blocks of {height} x {width}. "
                    "Leave it unpacked or give another block."
                )
            scales = (*shape[:-2], shape[-2] // height, shape[-1] // width)
        stored = name.removesuffix(".weight") + ".weight_scale_inv"
        if stacked:
            stored = f"{name}_scale_inv"
        scale = Outline(stored, "F8_E8M0" if powers else "F32", scales)
        return self._fresh(name, shape, native, scale, stacked=stacked)

    def config(self, **options: object) -> dict[str, object]:
        block = options.get("block", BLOCK)
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": None if block is None else list(_two(block)),
            "modules_to_not_convert": options.get("skip"),
            "scale_fmt": "ue8m0" if options.get("ue8m0", False) else "float",
        }


def _weight_of(checkpoint: Checkpoint, scale: str) -> str | None:
    """The weight that a tensor of this name holds the scales of; None when it holds none."""
    if scale.endswith((".weight_scale_inv", ".qscale_weight")):
        return scale.rpartition(".")[0] + ".weight"
    weight = scale.removesuffix("_scale_inv")
    if weight != scale:
        return weight if weight in checkpoint else None
    if scale.endswith(".scale") and scales_blocks(checkpoint, scale):
        return scale.removesuffix(".scale") + ".weight"
    return None


def scales_blocks(checkpoint: Checkpoint, scale: str) -> bool:
    """Whether `X.scale` is there and holds scales of a matrix `X.weight`: it is a matrix as well,
    or of E8M0.
    """
    weight = scale.removesuffix(".scale") + ".weight"
    if scale not in checkpoint or weight not in checkpoint:
        return False
    found, matrix = checkpoint[scale], checkpoint[weight]
    if len(matrix.shape) != 2 or matrix.dtype not in (*FLOAT8, "I8"):
        return False
    return found.dtype == "F8_E8M0" or (len(found.shape) == 2 and matrix.dtype in FLOAT8)


def block_size(config: dict[str, object]) -> tuple[int, int] | None:
    """`weight_block_size` of a quantization_config, where it has one."""
    found = config.get("weight_block_size")
    return None if found is None else _two(found)


def _two(block: object) -> tuple[int, int]:
    if isinstance(block, list | tuple) and len(block) == 2:
        height, width = block
        if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
            return height, width
    raise UsageError(f"a block size of {block!r}; expected two whole numbers, as [128, 128].")
