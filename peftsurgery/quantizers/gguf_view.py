"""A GGUF file seen as the model it was made from: names, row order and values of transformers.

Every tensor becomes a Packed whose one part is the stored tensor, so that what is changed finds its
way back into the file and what is not is copied. Stacks of experts are taken apart: transformers
keeps a Mixtral's experts one by one in its files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from peftsurgery.checkpoint import LazyTensor
from peftsurgery.checkpoint.gguf import GGUFCheckpoint, GGUFTensor, slice_of
from peftsurgery.errors import UnsafeInputError, UnsupportedError, UsageError
from peftsurgery.quantizers.gguf import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from peftsurgery.quantizers.gguf_blocks import Blocks
from peftsurgery.quantizers.gguf_k import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from peftsurgery.quantizers.gguf_names import FAMILIES, Name, named
from peftsurgery.quantizers.gguf_plain import Opaque, Plain
from peftsurgery.quantizers.packed import Packed, PackedTensor

GGUF_FORMATS: Mapping[str, Blocks] = {
    format.name: format
    for format in (
        Q8_0(), Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K(),
    )
}  # fmt: skip
_PLAIN, _OPAQUE = Plain(), Opaque()
_LANGUAGE = re.compile(r"token_embd\.weight|(enc\.|dec\.)?blk\.\d+\..+")


def gguf_tensors(
    checkpoint: GGUFCheckpoint,
) -> tuple[dict[str, LazyTensor], dict[str, Packed]]:
    """The tensors of a GGUF file by the names that transformers gives them, in the order of the
    file, and the packed weights behind them; of image models, by the names they have.

    What the model has no tensor for (rope_freqs) is left out. Raises UnsupportedError for a
    language model of a family that is not known, UsageError when its head counts are missing.
    """
    family = FAMILIES.get(checkpoint.architecture)
    if family is None and any(_LANGUAGE.fullmatch(name) for name in checkpoint):
        raise UnsupportedError(
            f"{checkpoint.source}: a GGUF file of the architecture {checkpoint.architecture!r}, "
            "whose names in transformers are not known here. Known language models: "
            f"{', '.join(sorted(FAMILIES))}. Merge into the original model and convert the result."
        )
    tensors: dict[str, LazyTensor] = {}
    packed: dict[str, Packed] = {}
    for stored, tensor in checkpoint.items():
        name = named(family, stored) if family else Name(stored, None, None, 0.0)
        if name is None:
            continue
        for path, piece in _pieces(name, tensor):
            weight = _packed(checkpoint, name, path, piece)
            if path in tensors:
                raise UnsafeInputError(f"{checkpoint.source}: two tensors are {path!r}")
            if weight is not None:
                packed[path] = weight
            tensors[path] = piece if weight is None else PackedTensor(weight)
    return tensors, packed


def _pieces(name: Name, tensor: LazyTensor) -> list[tuple[str, LazyTensor]]:
    """A tensor under its name; a stack of experts one by one."""
    if "{}" not in name.path:
        return [(name.path, tensor)]
    count = tensor.shape[0] if len(tensor.shape) == 3 else 0
    return [(name.path.format(i), slice_of(tensor, i)) for i in range(count)]


def _packed(checkpoint: GGUFCheckpoint, name: Name, path: str, tensor: LazyTensor) -> Packed | None:
    heads = _heads(checkpoint, name, tensor) if name.rotated else 0
    if isinstance(tensor, GGUFTensor):
        if tensor.ggml_type not in GGUF_FORMATS:
            return _OPAQUE.packed(path, tensor)
        return GGUF_FORMATS[tensor.ggml_type].packed(path, tensor, heads=heads)
    if tensor.dtype not in ("F32", "F16", "BF16") or not tensor.shape:
        return None
    if path.endswith("mlp.shared_expert_gate.weight") and len(tensor.shape) == 1:
        shape = (1, *tensor.shape)  # llama.cpp drops the dimension of one
        tensor = LazyTensor(tensor.file, tensor.name, tensor.dtype, shape, tensor.begin, tensor.end)
    return _PLAIN.packed(path, tensor, heads=heads, shift=name.shift)


def _heads(checkpoint: GGUFCheckpoint, name: Name, tensor: LazyTensor) -> int:
    """Heads of q, or of k, in one layer."""
    values = checkpoint.header.values
    key = f"{checkpoint.architecture}.attention.head_count"
    count = values.get(key)
    if name.rotated == "attn_k":
        count = values.get(f"{key}_kv", count)
    if isinstance(count, tuple):
        layer = name.layer or 0
        count = count[layer] if layer < len(count) else 0
    rows = tensor.shape[0] if tensor.shape else 0
    if not isinstance(count, int) or count < 1 or rows % (2 * count):
        raise UsageError(
            f"{checkpoint.source}: {tensor.name!r} has {rows} rows and {key} says {count} heads; a "
            "whole number of pairs of rows for each head was expected, which the order of the rows "
            "follows. Convert the model again with a current llama.cpp."
        )
    return count
