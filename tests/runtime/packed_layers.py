"""One linear layer in every packed form that has a package running on a CPU, and a model of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from gguf import GGMLQuantizationType
from gguf.quants import quantize as to_gguf
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from optimum.quanto import freeze, qtypes, quantize
from torch import Generator, Tensor, nn
from torchao.quantization import (
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    quantize_,
)

WIDTHS = (64, 192, 128)  # multiples of 64: see test_rows_that_bitsandbytes_reads_wrongly


def _four_bits(quant_type: str, nested: bool) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        layer = Linear4bit(
            plain.in_features,
            plain.out_features,
            compute_dtype=torch.float32,
            compress_statistics=nested,
            quant_type=quant_type,
        )
        layer.load_state_dict(plain.state_dict())
        return layer.to("cpu")

    return make


def _eight_bits(plain: nn.Linear) -> nn.Module:
    layer = Linear8bitLt(plain.in_features, plain.out_features, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def _hqq(plain: nn.Linear) -> nn.Module:
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    return HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu", del_orig=False)


def _quanto(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        model = nn.Sequential(plain)
        quantize(model, weights=qtypes[kind])
        freeze(model)
        return model[0]

    return make


def _torchao(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        four = IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # pyright: ignore[reportAttributeAccessIssue]
            granularity=PerGroup(32),
            mapping_type=MappingType.ASYMMETRIC,
        )
        quantize_(plain, Int8WeightOnlyConfig() if bits == 8 else four)
        return plain

    return make


def _gguf(plain: nn.Linear) -> nn.Module:
    kind = GGMLQuantizationType.Q8_0
    layer = GGUFLinear(plain.in_features, plain.out_features, True, compute_dtype=torch.float32)
    raw = torch.from_numpy(to_gguf(plain.weight.detach().numpy(), kind))
    layer.weight = GGUFParameter(raw, quant_type=kind)  # pyright: ignore[reportCallIssue]
    layer.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)
    return layer


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": _four_bits("nf4", nested=False),
    "nf4 nested": _four_bits("nf4", nested=True),
    "fp4": _four_bits("fp4", nested=False),
    "int8": _eight_bits,
    "hqq": _hqq,
    "quanto int8": _quanto("qint8"),
    "quanto int4": _quanto("qint4"),
    "torchao int8": _torchao(8),
    "torchao int4": _torchao(4),
    "gguf": _gguf,
}
WRITTEN = ("nf4", "nf4 nested", "fp4", "int8")  # that merging packs again


class Two(nn.Module):
    """Two packed layers, with a nonlinearity between them."""

    def __init__(self, kind: str, rng: Generator) -> None:
        super().__init__()
        layers = [KINDS[kind](plain_layer(WIDTHS[n], WIDTHS[n + 1], rng)) for n in range(2)]
        self.first, self.second = (cast(nn.Linear, layer) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def plain_layer(inner: int, outer: int, rng: Generator) -> nn.Linear:
    layer = nn.Linear(inner, outer)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outer, inner, generator=rng) * inner**-0.5)
        layer.bias.copy_(torch.randn(outer, generator=rng) * 0.1)
    return layer


def inputs(rng: Generator, rows: int = 5) -> Tensor:
    return torch.randn(rows, WIDTHS[0], generator=rng)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every plain tensor of the base, those of the parts of packed tensors too."""
    found: dict[str, Tensor] = {}

    def add(name: str, value: object) -> None:
        if not isinstance(value, Tensor):
            return
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is not None and type(value) is not Tensor:
            for part in inner()[0]:
                add(f"{name}/{part}", getattr(value, part))
        else:
            found[name] = value.detach().as_subclass(Tensor).clone()

    for path, module in model.named_modules():
        if "adapters" in path.split("."):
            continue
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            add(f"{path}.{name}", value)
        weight = module._parameters.get("weight")
        quant = getattr(weight, "quant_state", None)
        add(f"{path}.absmax", getattr(quant, "absmax", None))
        add(f"{path}.nested", getattr(getattr(quant, "state2", None), "absmax", None))
        add(f"{path}.offset", getattr(quant, "offset", None))
        for owner in (weight, getattr(module, "state", None)):  # it moves at the first call
            add(f"{path}.SCB", getattr(owner, "SCB", None))
        for name, value in (getattr(module, "meta", None) or {}).items():
            add(f"{path}.meta.{name}", value)
    return found
