"""compressed-tensors, called with what its compressors take."""

from __future__ import annotations

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor


def arguments(strategy: str, bits: int, **options: object) -> QuantizationArgs:
    """Symmetric weights of small floats."""
    said = {"num_bits": bits, "type": "float", "strategy": strategy, **options}
    return QuantizationArgs.model_validate(said)


def compress(
    form: str, weight: Tensor, scale: Tensor, weights: QuantizationArgs, whole: Tensor | None = None
) -> dict[str, Tensor]:
    """The stored parts of a weight, by their names behind the layer's."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    parts: dict[str, Tensor | None] = {"weight": weight, "weight_scale": scale}
    if whole is not None:
        parts["weight_global_scale"] = whole
    made = BaseCompressor.get_value_from_registry(form).compress(parts, scheme)
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, torch.Tensor)}


def decompress(form: str, parts: dict[str, Tensor], weights: QuantizationArgs) -> Tensor:
    """The weight of stored parts."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    made = BaseCompressor.get_value_from_registry(form).decompress(dict(parts), scheme)
    weight = made["weight"]
    assert weight is not None
    return weight
