"""Parity with PEFT's own layers: get_delta_weight, and the merged weight for DoRA."""

from typing import Any, cast

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import Generator, Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftsurgery.algorithms import LoHa, LoKr, LoRA
from tests.algorithms.cases import close, draw

LAYERS = {
    "linear": lambda: nn.Linear(10, 12),
    "embedding": lambda: nn.Embedding(14, 6),
    "conv1d": lambda: nn.Conv1d(10, 12, 3),
    "conv2d-1x1": lambda: nn.Conv2d(10, 12, 1),
    "conv2d": lambda: nn.Conv2d(10, 12, 3),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "gpt2": lambda: Conv1D(12, 10),
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def wrap(kind: str, config: Any, rng: Generator) -> Any:
    """The PEFT layer around a random base layer, with random adapter parameters."""
    base = LAYERS[kind]()
    wrapped = cast(Any, get_peft_model(cast(Any, Model(base)), config))
    layer = wrapped.base_model.model.layer
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            value = draw(rng, *parameter.shape)
            parameter.copy_(value.abs() + 0.1 if "magnitude" in name else value)
    return layer


def lora_config(kind: str, **options: bool) -> LoraConfig:
    arguments: dict[str, Any] = {"fan_in_fan_out": kind == "gpt2", **options}
    return LoraConfig(r=3, lora_alpha=5, target_modules=["layer"], **arguments)


def state(layer: Any) -> dict[str, Tensor]:
    """Adapter tensors by name, without the adapter's own name."""
    found = {}
    for name, parameter in layer.named_parameters():
        if not name.startswith("base_layer"):
            found[name.replace(".default", "").removesuffix(".weight")] = parameter.detach()
    return found


def as_lora(kind: str, layer: Any) -> LoRA:
    tensors = state(layer)
    scale = layer.scaling["default"]
    if kind == "embedding":
        up, down = tensors["lora_embedding_A"].T, tensors["lora_embedding_B"].T
        adapter = LoRA(up, down, scale=scale, stored="embedding")
    elif kind == "gpt2":
        up, down = tensors["lora_A"].T, tensors["lora_B"].T
        adapter = LoRA(up, down, scale=scale, stored="conv1d")
    else:
        adapter = LoRA(tensors["lora_B"], tensors["lora_A"], scale=scale)
    magnitude = tensors.get("lora_magnitude_vector")
    if magnitude is not None:
        transposed = kind in ("embedding", "gpt2")
        axis = "in" if transposed else "out"
        adapter = adapter.with_tensors(magnitude=magnitude, magnitude_axis=axis)
    if "lora_B.bias" in tensors:
        adapter = adapter.with_tensors(bias=tensors["lora_B.bias"] * scale)
    return adapter


def stored_weight(layer: Any) -> Tensor:
    return layer.get_base_layer().weight.detach()


def stored_delta(kind: str, layer: Any) -> Tensor:
    return layer.get_delta_weight("default").detach()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_delta(kind: str, rslora: bool, rng: Generator) -> None:
    layer = wrap(kind, lora_config(kind, use_rslora=rslora), rng)
    adapter = as_lora(kind, layer)
    close(adapter.delta(stored_weight(layer)), stored_delta(kind, layer))


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_merge(kind: str, rng: Generator) -> None:
    layer = wrap(kind, lora_config(kind, use_dora=True), rng)
    adapter = as_lora(kind, layer)
    weight = stored_weight(layer).clone()
    merged = adapter.merged(weight)[0]
    layer.merge()
    close(merged, stored_weight(layer), 3e-6)


@pytest.mark.parametrize("kind", ["linear", "gpt2", "conv2d"])
def test_lora_bias(kind: str, rng: Generator) -> None:
    layer = wrap(kind, lora_config(kind, lora_bias=True), rng)
    adapter = as_lora(kind, layer)
    base = layer.get_base_layer()
    weight, bias = adapter.merged(base.weight.detach(), base.bias.detach())
    layer.merge()
    assert bias is not None
    close(weight, base.weight)
    close(bias, base.bias)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d-1x1", "conv2d"])
@pytest.mark.parametrize("effective", [False, True])
def test_loha_delta(kind: str, effective: bool, rng: Generator) -> None:
    config = LoHaConfig(r=3, alpha=5, use_effective_conv2d=effective, target_modules=["layer"])
    layer = wrap(kind, config, rng)
    tensors: dict[str, Any] = {n.removeprefix("hada_"): t for n, t in state(layer).items()}
    assert ("t1" in tensors) == (effective and kind in ("conv1d", "conv2d"))
    adapter = LoHa(**tensors, scale=layer.scaling["default"])
    close(adapter.delta(stored_weight(layer)), stored_delta(kind, layer))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d-1x1", "conv2d"])
@pytest.mark.parametrize(
    ("rank", "both", "effective"),
    [(1, False, False), (1, True, False), (2, False, True), (8, False, False)],
)
def test_lokr_delta(kind: str, rank: int, both: bool, effective: bool, rng: Generator) -> None:
    config = LoKrConfig(
        r=rank,
        alpha=3,
        use_effective_conv2d=effective,
        decompose_both=both,
        target_modules=["layer"],
    )
    layer = wrap(kind, config, rng)
    tensors: dict[str, Any] = {n.removeprefix("lokr_"): t for n, t in state(layer).items()}
    adapter = LoKr(**tensors, scale=layer.scaling["default"])
    ours, theirs = adapter.delta(stored_weight(layer)), stored_delta(kind, layer)
    if kind == "conv1d" and "w2" in tensors:
        # PEFT's make_kron gives w1 its trailing dimensions for 4-D factors only: here torch.kron
        # aligns the last dimensions, (1, a, c) ⊗ (b, d, k), and the reshape scrambles them. Such a
        # file means the scrambled matrix, which has no LoKr form.
        w1, w2 = tensors["w1"], tensors["w2"]
        scrambled = torch.kron(w1, w2) * layer.scaling["default"]
        close(theirs, scrambled.reshape(theirs.shape))
        assert float((ours - theirs).norm()) > 0.1 * float(theirs.norm())
        return
    close(ours, theirs)
