"""Several adapters of different algorithms: the order law, `--relative-to base`, DoRA in both axes,
everything an adapter holds.

The expected weights are computed here in fp64 from the tensors written, by formulas written out
here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftsurgery as ps
from peftsurgery.errors import CheckFailed
from tests.operations.merging import Tensors, check, flux_single, random, saved, state, write

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.1.resnets.0.conv1"
NORM = "down_blocks.1.resnets.0.norm1"
BIASED = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
Map = Callable[[Tensor], Tensor]  # W -> W_1, fp64


def key(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def lora(module: str, weight: Tensor, seed: int, alpha: float = 2.0) -> tuple[Tensors, Map]:
    normal = random(seed)
    down, up = (
        normal(3, *weight.shape[1:]) * 0.2,
        normal(weight.shape[0], 3, *[1] * (weight.ndim - 2)) * 0.2,
    )
    tensors = {
        f"{key(module)}.lora_down.weight": down,
        f"{key(module)}.lora_up.weight": up,
        f"{key(module)}.alpha": torch.tensor(alpha),
    }
    product = (up.double().flatten(1) @ down.double().flatten(1)).reshape(weight.shape)
    return tensors, lambda w: w + alpha / 3 * product


def loha(module: str, weight: Tensor, seed: int) -> tuple[Tensors, Map]:
    normal = random(seed)
    columns = weight[0].numel()
    parts = {
        "hada_w1_a": normal(weight.shape[0], 2) * 0.3, "hada_w1_b": normal(2, columns) * 0.3,
        "hada_w2_a": normal(weight.shape[0], 2) * 0.3, "hada_w2_b": normal(2, columns) * 0.3,
    }  # fmt: skip
    d = {n: t.double() for n, t in parts.items()}
    product = (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"])
    tensors = {f"{key(module)}.{n}": t for n, t in parts.items()} | {
        f"{key(module)}.alpha": torch.tensor(1.0)
    }
    return tensors, lambda w: w + product.reshape(weight.shape) / 2


def lokr(module: str, weight: Tensor, seed: int) -> tuple[Tensors, Map]:
    normal = random(seed)
    w1, w2 = (
        normal(4, 2) * 0.3,
        normal(weight.shape[0] // 4, weight.shape[1] // 2, *weight.shape[2:]) * 0.3,
    )
    product = torch.kron(w1.double().reshape(4, 2, *[1] * (weight.ndim - 2)), w2.double())
    return {f"{key(module)}.lokr_w1": w1, f"{key(module)}.lokr_w2": w2}, lambda w: w + product


def full(module: str, weight: Tensor, seed: int) -> tuple[Tensors, Map]:
    diff = random(seed)(*weight.shape) * 0.1
    return {f"{key(module)}.diff": diff}, lambda w: w + diff.double()


def dora(module: str, weight: Tensor, seed: int, *, axis: int) -> tuple[Tensors, Map]:
    tensors, moved = lora(module, weight, seed)
    others = [d for d in range(weight.ndim) if d != axis]
    magnitude = torch.linalg.vector_norm(weight, dim=others, keepdim=True) * (
        1 + 0.2 * random(seed + 1)(1).abs()
    )
    tensors[f"{key(module)}.dora_scale"] = magnitude

    def replaced(w: Tensor) -> Tensor:
        v = moved(w)
        norm = torch.linalg.vector_norm(v, dim=others, keepdim=True)
        return magnitude.double() * v / norm

    return tensors, replaced


KINDS = {
    "lora": lora, "loha": loha, "lokr": lokr, "full": full,
    "dora-out": partial(dora, axis=0), "dora-in": partial(dora, axis=1),
}  # fmt: skip
STACKS = [
    ("lora", "loha", "lokr", "full"),
    ("dora-out", "lora"),
    ("lora", "dora-out", "lokr"),
    ("dora-in", "loha"),
    ("lora", "dora-in", "dora-out"),
    ("dora-out", "dora-out"),
    ("dora-in", "full", "dora-in"),
]
STRENGTHS = (0.7, -0.4, 1.0, 0.3)


@pytest.fixture
def base() -> Path:
    return saved("tiny_sd_pipeline")


def stack(
    folder: Path, base: Path, kinds: tuple[str, ...]
) -> tuple[list[tuple[Path, float]], dict[str, list[Map]]]:
    weights = state(base)
    files: list[tuple[Path, float]] = []
    maps: dict[str, list[Map]] = {}
    for place, kind in enumerate(kinds):
        tensors: Tensors = {}
        for number, module in enumerate((LINEAR, CONV)):
            name = f"unet:{module}.weight"
            own, change = KINDS[kind](module, weights[name], 10 * place + number)
            tensors |= own
            maps.setdefault(name, []).append(change)
        files.append((write(folder / f"{place}-{kind}.safetensors", tensors), STRENGTHS[place]))
    return files, maps


@pytest.mark.parametrize("kinds", STACKS)
@pytest.mark.parametrize("relative_to", ["current", "base"])
def test_a_stack_is_the_composition_of_its_maps(
    tmp_path: Path, base: Path, kinds: tuple[str, ...], relative_to: str
) -> None:
    files, maps = stack(tmp_path, base, kinds)
    weights = state(base)
    report = ps.merge(
        base, files, tmp_path / "out", architecture="sd1", relative_to=relative_to, verify="full"
    )
    if len(kinds) > 1:
        said = str(report.summary["adapters"])
        assert [said.index(file.name) for file, _ in files] == sorted(
            said.index(file.name) for file, _ in files
        )
        assert ("in this order" in said) == (relative_to == "current")
    deltas = {}
    for name, changes in maps.items():
        current = start = weights[name].double()
        for change, (_, t) in zip(changes, files, strict=True):
            source = start if relative_to == "base" else current
            current = current + t * (change(source) - source)
        deltas[name] = current - start
    check(weights, state(tmp_path / "out"), deltas, tolerance=2e-6)


def test_relative_to_base_is_free_of_order(tmp_path: Path, base: Path) -> None:
    files, _ = stack(tmp_path, base, ("dora-out", "lora", "dora-in"))
    outs = []
    for place, order in enumerate((files, files[::-1])):
        out = tmp_path / f"out{place}"
        ps.merge(base, order, out, architecture="sd1", relative_to="base")
        outs.append(state(out)[f"unet:{LINEAR}.weight"])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-7)
    for place, order in enumerate((files, files[::-1])):
        ps.merge(base, order, tmp_path / f"ordered{place}", architecture="sd1")
    first, second = (state(tmp_path / f"ordered{n}")[f"unet:{LINEAR}.weight"] for n in (0, 1))
    assert float((first - second).abs().max()) > 1e-3


def test_biases_norms_and_values(tmp_path: Path, base: Path) -> None:
    weights, normal = state(base), random(3)
    shape = weights[f"unet:{BIASED}.bias"].shape
    norm = weights[f"unet:{NORM}.weight"].shape
    delta_b, w_norm, b_norm, value = normal(*shape), normal(*norm), normal(*norm), normal(*norm)
    changed = write(
        tmp_path / "kohya.safetensors",
        {
            f"{key(BIASED)}.diff": torch.zeros(shape[0], shape[0]),
            f"{key(BIASED)}.diff_b": delta_b,
            f"{key(NORM)}.w_norm": w_norm,
            f"{key(NORM)}.b_norm": b_norm,
        },
    )
    ps.merge(base, [(changed, 0.5)], tmp_path / "out", architecture="sd1", verify="full")
    expected = {
        f"unet:{BIASED}.bias": 0.5 * delta_b.double(),
        f"unet:{NORM}.weight": 0.5 * w_norm.double(),
        f"unet:{NORM}.bias": 0.5 * b_norm.double(),
    }
    check(weights, state(tmp_path / "out"), expected)
    module = "down_blocks.2.resnets.0.norm1"
    native = "diffusion_model.input_blocks.7.0.in_layers.0"
    size = weights[f"unet:{module}.weight"].shape
    value = normal(*size)
    lora_key = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    down, up = normal(2, 64), normal(64, 2)
    comfy = write(
        tmp_path / "comfy.safetensors",
        {
            f"{native}.set_weight": value,
            f"{lora_key}.lora_down.weight": down,
            f"{lora_key}.lora_up.weight": up,
        },
    )
    for t in (1.0, 0.25):
        out = tmp_path / f"comfy{t}"
        ps.merge(base, [(comfy, t)], out, architecture="sd1", verify="full")
        before = weights[f"unet:{module}.weight"].double()
        check(
            weights,
            state(out),
            {
                f"unet:{module}.weight": t * (value.double() - before),
                "unet:down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": t
                * (up.double() @ down.double()),
            },
        )
    assert torch.equal(state(tmp_path / "comfy1.0")[f"unet:{module}.weight"], value)


def test_a_bias_change_without_a_bias_in_the_base_is_refused(tmp_path: Path, base: Path) -> None:
    weight = state(base)[f"unet:{LINEAR}.weight"]
    tensors, _ = lora(LINEAR, weight, 1)
    file = write(
        tmp_path / "a.safetensors",
        {**tensors, f"{key(LINEAR)}.diff_b": torch.ones(weight.shape[0])},
    )
    with pytest.raises(CheckFailed, match=r"has no .*to_q\.bias"):
        ps.merge(base, [(file, 1.0)], tmp_path / "out", architecture="sd1")


# widened inputs
# ----------------------------------------------------------------------------------------


@pytest.fixture
def wide_base(tmp_path: Path) -> Path:
    """A BFL file whose img_in has the 64 inputs of the release."""
    tensors = load_file(flux_single())
    tensors["img_in.weight"] = random(20)(32, 64)
    path = tmp_path / "flux.safetensors"
    save_file(tensors, path)
    return path


def control(folder: Path) -> tuple[Path, Tensor, Tensor]:
    normal = random(21)
    down, up, bias = normal(4, 128) * 0.2, normal(32, 4) * 0.2, normal(32) * 0.2
    file = {
        "img_in.lora_A.weight": down,
        "img_in.lora_B.weight": up,
        "img_in.lora_B.bias": bias,
    }
    for number in (0, 1):  # enough of the model that the file is recognised
        file[f"double_blocks.{number}.img_attn.proj.lora_A.weight"] = normal(4, 32) * 0.1
        file[f"double_blocks.{number}.img_attn.proj.lora_B.weight"] = normal(32, 4) * 0.1
    return write(folder / "control.safetensors", file), up.double() @ down.double(), bias.double()


def padded(weight: Tensor) -> Tensor:
    return torch.cat([weight.double(), torch.zeros(32, 64, dtype=torch.float64)], dim=1)


def test_flux_control_widens_img_in(tmp_path: Path, wide_base: Path) -> None:
    file, delta, bias = control(tmp_path)
    ps.merge(
        wide_base, [(file, 1.0)], tmp_path / "out.safetensors", architecture="flux", verify="full"
    )
    before, after = load_file(wide_base), load_file(tmp_path / "out.safetensors")
    assert after["img_in.weight"].shape == (32, 128)
    expected = padded(before["img_in.weight"]) + delta
    assert float((after["img_in.weight"].double() - expected).abs().max()) < 1e-6
    assert (
        float((after["img_in.bias"].double() - before["img_in.bias"].double() - bias).abs().max())
        < 1e-6
    )


@pytest.mark.parametrize("first", ["plain", "control"])
def test_a_plain_adapter_beside_one_that_widens(
    tmp_path: Path, wide_base: Path, first: str
) -> None:
    file, delta, _ = control(tmp_path)
    normal = random(22)
    down, up = normal(2, 64) * 0.2, normal(32, 2) * 0.2
    plain = write(
        tmp_path / "plain.safetensors",
        {"diffusion_model.img_in.lora_A.weight": down, "diffusion_model.img_in.lora_B.weight": up},
    )
    order = [(plain, 1.0), (file, 1.0)] if first == "plain" else [(file, 1.0), (plain, 1.0)]
    ps.merge(wide_base, order, tmp_path / "out.safetensors", architecture="flux", verify="full")
    before, after = load_file(wide_base), load_file(tmp_path / "out.safetensors")
    expected = padded(before["img_in.weight"]) + delta
    expected[:, :64] += up.double() @ down.double()
    assert float((after["img_in.weight"].double() - expected).abs().max()) < 1e-6


def test_reshape_weight_of_comfyui(tmp_path: Path) -> None:
    normal = random(23)
    base = load_file(flux_single())
    columns = base["img_in.weight"].shape[1]
    down, up = normal(2, columns + 5), normal(32, 2)
    file = write(
        tmp_path / "a.safetensors",
        {
            "diffusion_model.img_in.lora_down.weight": down,
            "diffusion_model.img_in.lora_up.weight": up,
            "diffusion_model.img_in.reshape_weight": torch.tensor([32, columns + 5]),
        },
    )
    ps.merge(
        flux_single(),
        [(file, 0.5)],
        tmp_path / "out.safetensors",
        architecture="flux",
        verify="full",
    )
    after = load_file(tmp_path / "out.safetensors")["img_in.weight"].double()
    expected = 0.5 * (up.double() @ down.double())
    expected[:, :columns] += base["img_in.weight"].double()
    assert float((after - expected).abs().max()) < 1e-5
