"""Linears with a packed weight: which they are, and the one door to the weight they stand for.

They keep their own forward, and additive adapters run beside it. What has to know the weight (DoRA,
multiplicative algorithms, PiSSA …) gets it dequantized, for as long as it is needed.

Told by what the module holds, so that no library is imported that the model does not use:

bitsandbytes   `Linear4bit` (weight `Params4bit`), `Linear8bitLt` (weight `Int8Params`, int8)
HQQ            `HQQLinear`: `W_q`, `meta`, `dequantize()`
diffusers      `GGUFLinear` (weight `GGUFParameter`)
tensors        torchao's and quanto's tensor classes as `weight`: they have a `dequantize` of their
               own
others         linears whose weight is made of whole numbers or 8-bit floats with scales beside it,
               or missing (`qweight`): what they stand for is not known, additive adapters only
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftsurgery.errors import UnsupportedError
from peftsurgery.quantizers.bitsandbytes8 import FACTOR

SCALES = ("weight_scale", "weight_scale_inv", "scale_weight")  # beside weights of 8-bit floats
PARTS = ("qweight", "weight_packed", "W_q")  # in the place of a weight


@dataclass(frozen=True)
class Kind:
    """A way to hold a packed weight; dense: module -> (out, in), None where it is not known."""

    title: str
    dense: Callable[[nn.Module], Tensor] | None = None


def is_packed(module: nn.Module) -> bool:
    """Whether this is a linear layer whose `weight` does not hold the weights as numbers."""
    return kind_of(module) is not None


def kind_of(module: nn.Module) -> Kind | None:
    """How a module holds its packed weight; None for any other module."""
    if not isinstance(getattr(module, "in_features", None), int):
        return None
    weight = module._parameters.get("weight")
    if weight is None:
        return _without_weight(module)
    names = {cls.__name__ for cls in type(weight).__mro__}
    for name, kind in _WEIGHTS.items():
        if name in names:
            return None if weight.is_floating_point() and name == "Int8Params" else kind
    if type(weight).dequantize is not Tensor.dequantize:
        return _TENSOR
    scaled = any(isinstance(getattr(module, name, None), Tensor) for name in SCALES)
    whole = not weight.is_floating_point() and not weight.is_complex()
    return _UNKNOWN if whole or (weight.itemsize == 1 and scaled) else None


def _without_weight(module: nn.Module) -> Kind | None:
    if any(cls.__name__ == "HQQLinear" for cls in type(module).__mro__):
        return _HQQ if getattr(module, "meta", None) is not None else None
    known = {*module._parameters, *module._buffers}
    return _UNKNOWN if known & set(PARTS) else None


def logical_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a packed linear."""
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    assert isinstance(sizes[0], int)
    assert isinstance(sizes[1], int)
    return sizes[0], sizes[1]


def device_of(module: nn.Module) -> torch.device:
    """Where the parts of a packed weight lie."""
    parts = (*module._parameters.values(), *module._buffers.values())
    return next((part.device for part in parts if part is not None), torch.device("cpu"))


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor:
    """What the packed weight of a linear stands for, (out, in), in the dtype that its library
    dequantizes to; the module is left as it is.

    UnsupportedError where the library's layout is not known.
    """
    kind = kind_of(module)
    assert kind is not None
    name = type(module).__name__
    if kind.dense is None:
        raise UnsupportedError(
            f"{name}.weight holds {_held(module)}: the composed weight is needed here, and what "
            "it stands for is not known. Use an additive algorithm without DoRA (lora, loha, "
            "lokr), or dequantize the layer first."
        )
    weight = kind.dense(module)
    if tuple(weight.shape) != logical_shape(module):
        raise UnsupportedError(
            f"{name}: its {kind.title} weight dequantizes to {list(weight.shape)}, expected "
            f"{list(logical_shape(module))} (out_features, in_features)."
        )
    return weight


def _held(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    if weight is not None:
        return str(weight.dtype)
    return ", ".join(sorted({*module._parameters, *module._buffers} & set(PARTS)))


# --- libraries ------------------------------------------------------------------------------------


def _four_bits(module: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = module._parameters["weight"]
    assert weight is not None
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise UnsupportedError(
            f"{type(module).__name__}: its weight is not quantized yet; move the model to its "
            "device first (model.to('cpu') does)."
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedError(REORDERED.format(type(module).__name__))
    found = dequantize_4bit(weight.data, state)
    return found if tuple(found.shape) == logical_shape(module) else found.t()


REORDERED = (
    "{}: bitsandbytes has re-ordered its weight for inference on this CPU, which has no gradients "
    "and cannot be undone exactly. Attach adapters before the model is first run in eval mode "
    "(attached layers keep their order), or load the model again."
)


def _eight_bits(module: nn.Module) -> Tensor:
    codes, largest = int8_parts(module)
    return codes.float() * largest.float()[:, None] * FACTOR


def int8_parts(module: nn.Module) -> tuple[Tensor, Tensor]:
    """(codes (out, in) int8, largest magnitudes (out,)) of a Linear8bitLt, not copied; the latter
    move from the weight to the module's state at its first forward.
    """
    weight, state = module._parameters["weight"], getattr(module, "state", None)
    scale = getattr(weight, "SCB", None)
    scale = getattr(state, "SCB", None) if scale is None else scale
    if weight is None or not isinstance(scale, Tensor):
        raise UnsupportedError(f"{type(module).__name__}: its int8 weight has no scales (SCB).")
    return weight.data, scale


def _gguf(module: nn.Module) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    weight = module._parameters["weight"]
    assert weight is not None
    return dequantize_gguf_tensor(weight).as_subclass(Tensor)


def _own(owner: object) -> Tensor:
    """By the `dequantize` of a layer or of a tensor."""
    dequantize = getattr(owner, "dequantize", None)
    assert callable(dequantize)
    found = dequantize()
    assert isinstance(found, Tensor)
    return found


_WEIGHTS = {  # class of the weight -> kind
    "Params4bit": Kind("bitsandbytes 4-bit", _four_bits),
    "Int8Params": Kind("bitsandbytes 8-bit", _eight_bits),
    "GGUFParameter": Kind("GGUF", _gguf),
}
_HQQ = Kind("HQQ", lambda module: _own(module).detach())
_TENSOR = Kind("tensor subclass", lambda module: _own(module._parameters["weight"]).detach())
_UNKNOWN = Kind("packed")
