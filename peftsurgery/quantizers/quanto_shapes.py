"""What optimum-quanto does not store of a weight of 4 or 2 bits: its shape, and how many bits.

Codes of groups lie in a matrix (groups, group), which says nothing of the weight's rows. These are
as many as the layer's bias has values; without one they follow from the sizes in config.json, by
the names that layers of transformers have, checked against the number of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.configs import quantization_config

SIZES = (128, 96, 64, 32)  # of groups, as quanto tries them (nn/qmodule.py)
MAP = "quanto_qmap.json"  # module -> {"weights": "qint4", …}, written beside the weights
# Layer -> (outputs, inputs), as config.json calls them.
LAYERS = {
    **{"q_proj": ("heads", "hidden"), "k_proj": ("shared", "hidden")},
    **{"v_proj": ("shared", "hidden"), "o_proj": ("hidden", "heads")},
    **{"gate_proj": ("inner", "hidden"), "up_proj": ("inner", "hidden")},
    **{"down_proj": ("hidden", "inner"), "lm_head": ("vocabulary", "hidden")},
    **{"q": ("heads", "hidden"), "k": ("heads", "hidden"), "v": ("heads", "hidden")},
    **{"o": ("hidden", "heads"), "wi": ("inner", "hidden"), "wi_0": ("inner", "hidden")},
    **{"wi_1": ("inner", "hidden"), "wo": ("hidden", "inner")},
}


def group_of(columns: int) -> int:
    """Codes of a group in rows of so many; all of them where rows are not cut."""
    if columns > SIZES[0]:
        for size in SIZES:
            if columns % size == 0:
                return size
    return columns


def stored_bits(checkpoint: Checkpoint, name: str, height: int, count: int) -> int:
    """4 or 2, from the rows of bytes that `count` rows of codes take; for one or two rows, which
    take the same, as the config says.
    """
    fitting = [bits for bits in (4, 2) if height == -(-count * bits // 8)]
    if len(fitting) == 2:
        told = _told(checkpoint, name)
        fitting = [bits for bits in fitting if told.endswith(f"int{bits}")]
    if len(fitting) != 1:
        raise UsageError(
            f"{checkpoint.source}: '{name}._data._data': {height} rows of bytes for {count} groups "
            f"are neither int4 nor int2 for sure. Give the config.json or the {MAP} that belongs "
            "to it."
        )
    return fitting[0]


def _told(checkpoint: Checkpoint, name: str) -> str:
    component, _, own = name.rpartition(":")
    config = quantization_config(checkpoint, name)
    told = config.get("weights_dtype") or config.get("weights")
    part = checkpoint.components.get(component, checkpoint)
    file = (part.path if part.path.is_dir() else part.path.parent) / MAP
    if told is None and file.is_file():
        try:
            modules = json.loads(file.read_bytes())
        except ValueError as error:
            raise UsageError(f"{file}: is no JSON: {error}. Download it again.") from error
        module = modules.get(own.removesuffix(".weight")) if isinstance(modules, dict) else None
        told = module.get("weights") if isinstance(module, dict) else None
    return str(told)


def weight_shape(
    checkpoint: Checkpoint, name: str, count: int, of_codes: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of a weight with `count` groups of codes of a shape. UnsupportedError when
    nothing tells it.
    """
    if len(of_codes) != 1 or of_codes[0] not in SIZES:
        return (count, *of_codes)
    size = of_codes[0]
    component, _, own = name.rpartition(":")
    config = checkpoint.configs.get(component) if component else checkpoint.config
    module = own.removesuffix(".weight")
    bias = f"{name.removesuffix('.weight')}.bias"
    sizes = _sizes(config or {})
    rows = 0
    if bias in checkpoint and len(checkpoint[bias].shape) == 1:
        rows = checkpoint[bias].shape[0]
    elif (layer := LAYERS.get(module.rpartition(".")[2])) is not None:
        outputs, inputs = (sizes.get(side, 0) for side in layer)
        rows = outputs if outputs * inputs == count * size else 0
    if not rows or count % rows or group_of(count * size // rows) != size:
        raise UnsupportedError(
            f"{checkpoint.source}: '{name}._data._data': {count} groups of {size} codes, and "
            "neither a bias nor config.json says how many outputs these are. Give the "
            "config.json, or merge into the original and quantize the result."
        )
    columns = count * size // rows
    if columns > size and _may_be_kernel(module, config or {}):
        raise UnsupportedError(
            f"{checkpoint.source}: '{name}._data._data': may be a convolution, whose kernel size "
            "is not stored. Merge into the original and quantize the result."
        )
    return rows, columns


def _may_be_kernel(module: str, config: Mapping[str, object]) -> bool:
    if "conv" in module or "patch_embed" in module:
        return True
    unet = "down_block_types" in config and not config.get("use_linear_projection")
    return unet and module.endswith((".proj_in", ".proj_out"))


def _sizes(config: Mapping[str, object]) -> dict[str, int]:
    inner = config.get("text_config")
    merged = {**config, **(inner if isinstance(inner, dict) else {})}

    def of(*keys: str) -> int:
        return next((v for k in keys if isinstance(v := merged.get(k), int)), 0)

    hidden, heads = of("hidden_size", "d_model"), of("num_attention_heads", "num_heads")
    head = of("head_dim", "d_kv") or (hidden // heads if heads else 0)
    return {
        "hidden": hidden,
        "inner": of("intermediate_size", "d_ff"),
        "vocabulary": of("vocab_size"),
        "heads": heads * head,
        "shared": (of("num_key_value_heads") or heads) * head,
    }
