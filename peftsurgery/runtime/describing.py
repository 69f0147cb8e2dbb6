"""What kind of layer a module is."""

from __future__ import annotations

from torch import Tensor, nn

from peftsurgery.algorithms.layer import Layer

from .packed import is_packed

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, *CONVOLUTIONS, nn.Embedding)


def describe(module: nn.Module) -> Layer | None:
    """The layer of a module whose `weight` adapters can change, or None.

    Recognised by class: Linear and its subclasses and packed linears of any class (which keep
    their forward), Conv1d to Conv3d, Embedding, transformers' Conv1D, and leaves with a 1-D weight
    (norms of any class).
    """
    if isinstance(module, nn.Linear) or is_packed(module):
        return Layer("linear")
    if isinstance(module, CONVOLUTIONS):
        return Layer(
            "conv",
            tuple(module.stride),
            module.padding if isinstance(module.padding, str) else tuple(module.padding),
            tuple(module.dilation),
            module.groups,
            module.padding_mode,
            tuple(module.kernel_size),
        )
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "embed_scale", 1.0)
        return Layer(
            "embedding",
            padding_idx=module.padding_idx,
            max_norm=module.max_norm,
            norm_type=module.norm_type,
            output_scale=scale if isinstance(scale, Tensor) else float(scale),
        )
    if is_hf_conv1d(module):
        return Layer("hf_conv1d")
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 1 and not isinstance(module, TRANSPOSED):
        return Layer("norm")
    return None


def is_hf_conv1d(module: nn.Module) -> bool:
    """transformers.pytorch_utils.Conv1D, told by its shape so that transformers is not imported."""
    weight = module._parameters.get("weight")
    names = {cls.__name__ for cls in type(module).__mro__}
    return "Conv1D" in names and hasattr(module, "nf") and weight is not None and weight.ndim == 2


def runs_plainly(module: nn.Module) -> bool:
    """Whether the module's forward is that of its torch class (so `Layer.apply` is the same)."""
    if is_packed(module):
        return False
    forward = getattr(type(module), "hosted_class", type(module)).forward
    if any(isinstance(module, cls) and forward is cls.forward for cls in _PLAIN):
        return True
    if isinstance(module, nn.Embedding):
        return hasattr(module, "embed_scale")
    return is_hf_conv1d(module)
