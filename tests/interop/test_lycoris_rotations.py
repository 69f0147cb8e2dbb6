"""LyCORIS's diag-oft, boft, ia3 and glora: the outputs of its modules against our merged weights,
from files in its own spelling, and back into them."""

# lycoris is not typed
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftsurgery import load_adapter, save_adapter
from peftsurgery.algorithms import WeightAdapter

WITHIN = 3e-6
MODULES: dict[str, Any] = {
    "oft": DiagOFTModule,
    "boft": ButterflyOFTModule,
    "ia3": IA3Module,
    "glora": GLoRAModule,
}
LAYERS: dict[str, Any] = {
    "linear": (lambda o: nn.Linear(10, o), (5, 10)),
    "conv1d": (lambda o: nn.Conv1d(10, o, 3), (2, 10, 7)),
    "conv1x1": (lambda o: nn.Conv2d(10, o, 1, bias=False), (2, 10, 4, 5)),
    "conv3x3": (lambda o: nn.Conv2d(10, o, 3, padding=1), (2, 10, 4, 5)),
}


def _cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for dim in (3, 4, 6):
        for constraint in (0, 0.02):
            for rescaled in (False, True):
                options = {"lora_dim": dim, "constraint": constraint, "rescaled": rescaled}
                yield f"oft-{dim}-{constraint}-{rescaled}", "oft", options
    for dim in (2, 4, 8, 16):
        for constraint in (0, 0.02):
            options = {"lora_dim": dim, "constraint": constraint, "rescaled": dim == 4}
            yield f"boft-{dim}-{constraint}", "boft", options
    for inputs in (False, True):
        yield f"ia3-{inputs}", "ia3", {"train_on_input": inputs}
    yield "glora", "glora", {"lora_dim": 3, "alpha": 2}


CASES = {name: (algorithm, options) for name, algorithm, options in _cases()}
OUTPUTS = {"boft": 32}  # LyCORIS wants powers of two
every = pytest.mark.parametrize("layer", LAYERS)


def trained(name: str, layer: nn.Module, seed: int = 1) -> Any:
    algorithm, options = CASES[name]
    module = MODULES[algorithm]("lycoris_block_to_q", layer, 1.0, **options)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.startswith("org_module"):
                continue
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(parameter + 0.4 * noise if "rescale" in key else 0.4 * noise)
    return module.eval()


def written(module: Any, path: Path, base: nn.Module) -> tuple[Path, Path]:
    """The module's file and a base that has its layer, by which its flattened name is known."""
    tensors = {
        f"lycoris_block_to_q.{k}": t.detach().clone().contiguous()
        for k, t in module.state_dict().items()
        if not k.startswith("org_module")
    }
    tensors = {k: t for k, t in tensors.items() if "dropout" not in k}
    save_file(tensors, path / "a.safetensors")
    save_file({"block.to_q.weight": base.weight.detach()}, path / "base.safetensors")
    return path / "a.safetensors", path / "base.safetensors"


def only(file: Path, base: Path) -> WeightAdapter:
    modules = load_adapter(file, base=base).modules
    assert len(modules) == 1
    return next(iter(modules.values()))


def run(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)


@every
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_lycoris(name: str, layer: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    build, shape = LAYERS[layer]
    outputs = OUTPUTS.get(CASES[name][0], 24)
    base, x, plain = build(outputs), torch.randn(shape), build(outputs)
    plain.load_state_dict(base.state_dict())
    module = trained(name, base)
    file, known = written(module, tmp_path, base)
    adapter = only(file, known)
    module.apply_to()
    with torch.no_grad():
        wanted = base(x)
        bias = plain.bias
        weight, new_bias = adapter.merged(plain.weight, bias)
        assert bias is None or torch.equal(new_bias, bias)
        found = run(plain, x, weight)
        untouched = plain(x)
    assert float((found - wanted).norm() / (wanted - untouched).norm()) < WITHIN * 5
    assert float((wanted - untouched).norm() / untouched.norm()) > 0.01
    half = adapter.merged(plain.weight, None, 0.5)[0]
    assert float((half - (plain.weight + weight) / 2).norm() / weight.norm()) < WITHIN


@every
@pytest.mark.parametrize("name", CASES)
def test_files_come_back_byte_for_byte(name: str, layer: str, tmp_path: Path) -> None:
    base = LAYERS[layer][0](OUTPUTS.get(CASES[name][0], 24))
    file, known = written(trained(name, base), tmp_path, base)
    out = tmp_path / "b.safetensors"
    save_adapter(load_adapter(file, base=known), out, layout="lycoris")
    before, after = load_file(file), load_file(out)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if not key.endswith((".alpha", ".on_input")):
            assert torch.equal(tensor, after[key]), key
        else:
            assert float(tensor) == pytest.approx(float(after[key]), rel=1e-6), key


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("oft", "boft", "glora"))])
def test_lycoris_builds_its_module_from_what_we_write(name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    base = nn.Linear(10, OUTPUTS.get(CASES[name][0], 24))
    module = trained(name, base)
    file, known = written(module, tmp_path, base)
    out = tmp_path / "b.safetensors"
    save_adapter(load_adapter(file, base=known), out, layout="lycoris")
    tensors = {k.partition(".")[2]: t for k, t in load_file(out).items()}
    kind = MODULES[CASES[name][0]]
    assert kind.algo_check({f"n.{k}": t for k, t in tensors.items()}, "n")
    arguments = [tensors.get(key) for key in kind.weight_list]
    with torch.no_grad():
        again = kind.make_module_from_state_dict("n", base, *arguments)
        found, wanted = again.get_diff_weight()[0], module.get_diff_weight()[0]
    assert float((found - wanted).norm() / wanted.norm()) < WITHIN


def test_the_first_generation_of_glora_has_its_factors_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 10)
    a1, a2, b1, b2 = torch.randn(3, 10), torch.randn(10, 3), torch.randn(3, 10), torch.randn(24, 3)
    name = "lycoris_block_to_q"
    tensors = {
        f"{name}.{n}.weight": t
        for n, t in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2), strict=True)
    }
    save_file({**tensors, f"{name}.alpha": torch.tensor(1.5)}, tmp_path / "a.safetensors")
    save_file({"block.to_q.weight": weight}, tmp_path / "base.safetensors")
    adapter = only(tmp_path / "a.safetensors", tmp_path / "base.safetensors")
    wanted = 0.5 * (weight @ a2 @ a1 + b2 @ b1)
    found = adapter.delta(weight)
    assert float((found - wanted).norm() / wanted.norm()) < WITHIN
