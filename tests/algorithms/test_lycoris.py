"""Parity with the forward pass of LyCORIS's modules. Its merge is no reference: it scales twice."""

from typing import Any

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Generator, Tensor, nn

from peftsurgery.algorithms import LoHa, LoKr, LoRA, WeightAdapter
from tests.algorithms.cases import close, draw

LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(10, 12), (5, 10)),
    "conv1d": (lambda: nn.Conv1d(10, 12, 3), (2, 10, 7)),
    "conv1x1": (lambda: nn.Conv2d(10, 12, 1), (2, 10, 4, 5)),
    "conv3x3": (lambda: nn.Conv2d(10, 12, 3, padding=1), (2, 10, 4, 5)),
}
MODULES: dict[str, Any] = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}
PREFIX = {"locon": "lora_", "loha": "hada_", "lokr": "lokr_"}


def build(algorithm: str, layer: nn.Module, rng: Generator, **options: Any) -> Any:
    module = MODULES[algorithm]("name", layer, 1.0, alpha=3, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(PREFIX[algorithm]):
                parameter.copy_(draw(rng, *parameter.shape))
            elif name == "dora_scale":
                parameter.copy_(draw(rng, *parameter.shape).abs() + 0.1)
    module.apply_to()
    return module.eval()


def read(algorithm: str, module: Any) -> WeightAdapter:
    """What a reader of the saved file would make of it."""
    saved: dict[str, Tensor] = {n: t.detach() for n, t in module.custom_state_dict().items()}
    alpha = float(saved.pop("alpha"))
    dora = saved.pop("dora_scale", None)
    fields = {
        n.removeprefix(PREFIX[algorithm]).removesuffix(".weight"): t for n, t in saved.items()
    }
    cls: Any = {"locon": LoRA, "loha": LoHa, "lokr": LoKr}[algorithm]
    adapter = cls(**fields)
    whole = adapter.rank is None
    adapter = adapter.with_tensors(scale=1.0 if whole else alpha / adapter.rank)
    if dora is not None:
        axis = "out" if dora.shape[0] == adapter.shape[0] else "in"
        adapter = adapter.with_tensors(magnitude=dora, magnitude_axis=axis)
    return adapter


def run(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)


def compare(algorithm: str, kind: str, rng: Generator, **options: Any) -> WeightAdapter:
    make, shape = LAYERS[kind]
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draw(rng, *parameter.shape))
    module = build(algorithm, layer, rng, **options)
    adapter = read(algorithm, module)
    x = draw(rng, *shape)
    with torch.no_grad():
        close(run(layer, x, adapter.merged(layer.weight)[0]), layer(x), 5e-6)
    return adapter


kinds = pytest.mark.parametrize("kind", LAYERS)


@kinds
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_locon(kind: str, tucker: bool, rslora: bool, rng: Generator) -> None:
    adapter = compare("locon", kind, rng, lora_dim=4, use_tucker=tucker, rs_lora=rslora)
    assert ("mid" in adapter.tensors()) == (tucker and kind in ("conv1d", "conv3x3"))


@kinds
@pytest.mark.parametrize("tucker", [False, True])
def test_loha(kind: str, tucker: bool, rng: Generator) -> None:
    adapter = compare("loha", kind, rng, lora_dim=4, use_tucker=tucker)
    assert ("t1" in adapter.tensors()) == (tucker and kind in ("conv1d", "conv3x3"))


@kinds
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dim", [1, 64])
def test_lokr(kind: str, tucker: bool, both: bool, dim: int, rng: Generator) -> None:
    options = {"lora_dim": dim, "use_tucker": tucker, "decompose_both": both, "factor": -1}
    adapter = compare("lokr", kind, rng, **options)
    assert (adapter.rank is None) == (dim == 64)


@pytest.mark.parametrize("factor", [2, 4])
def test_lokr_unbalanced(factor: int, rng: Generator) -> None:
    compare("lokr", "linear", rng, lora_dim=1, factor=factor, unbalanced_factorization=True)


@kinds
@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr"])
@pytest.mark.parametrize("on_output", [False, True])
def test_dora(kind: str, algorithm: str, on_output: bool, rng: Generator) -> None:
    adapter = compare(algorithm, kind, rng, lora_dim=2, weight_decompose=True, wd_on_out=on_output)
    assert adapter.magnitude_axis == ("out" if on_output else "in")


def test_its_merge_is_still_no_reference(rng: Generator) -> None:
    """LohaModule.get_diff_weight applies alpha / dim twice; fails once that is repaired."""
    layer = nn.Linear(10, 12)
    module = build("loha", layer, rng, lora_dim=4)
    adapter = read("loha", module)
    close(module.get_diff_weight()[0], adapter.delta() * adapter.scale)
