"""A packed base where adapters look weights up, and packed checkpoints combined."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftsurgery as ps
from peftsurgery.errors import UnsupportedError
from tests.operations.packed_llm import deltas, state, unpacked, write_lora, write_plain

torch.set_num_threads(1)
FORMATS = ("nf4", "int8")
ALL = 10_000  # a rank that every weight is below


def write_dora(folder: Path, seed: int, plain: Path) -> Path:
    """A PEFT folder of LoRAs with magnitudes that are not the norms of the base."""
    write_lora(folder, seed, size=0.2, plain=plain)
    random = torch.Generator().manual_seed(seed)
    file = load_file(folder / "adapter_model.safetensors")
    for name in deltas(folder):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        rows = file[f"{key}.lora_B.weight"].shape[0]
        file[f"{key}.lora_magnitude_vector"] = 0.3 + torch.rand(rows, generator=random)
    save_file(file, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return folder


def baked(adapter: Path, base: Path) -> dict[str, Tensor]:
    """m (W + ΔW) / ||W + ΔW|| - W by the definition, of what a base stands for."""
    file, weights = load_file(adapter / "adapter_model.safetensors"), unpacked(base)
    found: dict[str, Tensor] = {}
    for name, delta in deltas(adapter).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"
        whole = weights[name] + delta
        scale = file[key] / whole.norm(dim=1)
        found[name] = scale[:, None] * whole - weights[name]
    return found


def held(adapter: Path) -> dict[str, Tensor]:
    modules = ps.load_adapter(adapter).modules
    return {f"{path.partition(':')[2]}.weight": m.delta().float() for path, m in modules.items()}


@pytest.fixture(params=FORMATS)
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """tmp_path/plain, and the same packed."""
    write_plain(tmp_path / "plain", 5)
    ps.quantize(tmp_path / "plain", tmp_path / "packed", format=request.param)
    return tmp_path / "packed"


def test_dora_is_baked_against_what_a_packed_base_stands_for(packed: Path, tmp_path: Path) -> None:
    dora = write_dora(tmp_path / "dora", 6, tmp_path / "plain")
    ps.convert(
        dora,
        tmp_path / "out",
        to="peft",
        base=packed,
        algorithm="lora",
        rank=str(ALL),
        dtype="fp32",
    )
    wanted, found = baked(dora, packed), held(tmp_path / "out")
    other = baked(dora, tmp_path / "plain")
    assert found.keys() == wanted.keys()
    for name, delta in found.items():
        gap = (delta - wanted[name]).norm() / wanted[name].norm()
        assert float(gap) < 1e-4, name
        assert float((delta - other[name]).norm()) > 10 * float((delta - wanted[name]).norm())


def test_adapters_are_combined_over_a_packed_base(packed: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    lora = write_lora(tmp_path / "lora", 9, size=0.1, plain=plain)
    ps.combine([(lora, 2.0)], tmp_path / "out", method="linear", base=packed)
    wanted = deltas(lora)
    for name, delta in held(tmp_path / "out").items():
        torch.testing.assert_close(delta, 2 * wanted[name], rtol=1e-4, atol=1e-5)


def test_packed_checkpoints_are_not_combined(packed: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    lora = write_lora(tmp_path / "lora", 7, size=0.3, plain=plain)
    ps.merge(packed, [(lora, 1.0)], tmp_path / "tuned")
    touched = r"'model\.layers\.\d\.(mlp\.down|self_attn\.q)_proj\.weight'"
    for one, base in (("tuned", packed), ("tuned", plain), ("plain", packed)):
        with pytest.raises(UnsupportedError, match="peftsurgery dequantize") as caught:
            ps.combine([(tmp_path / one, 0.5)], tmp_path / "out", base=base)
        assert not (tmp_path / "out").exists()
        if (one, base) == ("tuned", packed):
            assert caught.match(touched)


def test_what_is_packed_alike_everywhere_stays_as_it_is(packed: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    name = "model.layers.0.input_layernorm.weight"
    for file in sorted(packed.iterdir()):
        tuned.mkdir(exist_ok=True)
        (tuned / file.name).write_bytes(file.read_bytes())
        if file.suffix == ".safetensors" and name in (tensors := load_file(file)):
            tensors[name] = tensors[name] + 1
            save_file(tensors, tuned / file.name, {"format": "pt"})
    ps.combine([(tuned, 0.5)], tmp_path / "out", base=packed)
    before, after = state(packed), state(tmp_path / "out")
    assert before.keys() == after.keys()
    torch.testing.assert_close(after[name].float(), before[name].float() + 0.5, rtol=0.01, atol=0)
    assert all(torch.equal(before[k], after[k]) for k in before if k != name)
