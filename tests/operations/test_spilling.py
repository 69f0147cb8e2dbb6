"""What a combination puts aside in a file while it works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftsurgery.algorithms import LoRA
from peftsurgery.errors import UsageError
from peftsurgery.operations import combine as combining
from peftsurgery.operations import spilling
from peftsurgery.operations.combine import combine
from peftsurgery.operations.spilling import Spill
from tests.codec.parts import Maker

NAMES = ("to_q", "to_k", "to_v", "to_out_0")
BLOCK = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2"


def lora(rng: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> LoRA:
    up, down = torch.randn(rows, 40, generator=rng), torch.randn(40, columns, generator=rng)
    return LoRA(up.to(dtype), down.to(dtype), scale=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_beyond_the_room_are_the_same_and_stay_so_when_released(
    dtype: torch.dtype, tmp_path: Path, rng: torch.Generator
) -> None:
    modules = [lora(rng, 1111, 977 + n, dtype) for n in range(4)]
    room = modules[0].up.nbytes + modules[0].down.nbytes
    with Spill(tmp_path, room) as spill:
        kept = [spill.keep(module) for module in modules]
        assert kept[0] is modules[0]
        for module, moved in zip(modules[1:], kept[1:], strict=True):
            spill.release()
            for name, tensor in module.tensors().items():
                assert moved.tensors()[name].data_ptr() != tensor.data_ptr()
                assert torch.equal(moved.tensors()[name], tensor)
            assert float(moved.scale) == float(module.scale)
        assert list(tmp_path.iterdir()) == []  # the file has no name
    spill.release()
    assert torch.equal(kept[3].tensors()["down"], modules[3].down)  # as long as somebody holds it


def test_small_tensors_and_a_room_that_is_enough_make_no_file(
    tmp_path: Path, rng: torch.Generator
) -> None:
    folder = tmp_path / "never"
    with Spill(folder, 0) as spill:
        small = lora(rng, 20, 30, torch.float32)
        assert spill.keep(small) is small
    with Spill(folder) as spill:
        large = lora(rng, 700, 900, torch.float32)
        assert spill.keep(large) is large
    assert not folder.exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, rng: torch.Generator) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with (
        Spill(blocked / "inner", 0) as spill,
        pytest.raises(UsageError, match="temporary file cannot be written"),
    ):
        spill.keep(lora(rng, 700, 900, torch.float32))


@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
def test_a_combination_does_not_depend_on_where_its_parts_lie(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for seed in range(3):
        maker = Maker(seed)
        tensors: dict[str, torch.Tensor] = {}
        for name in NAMES:
            tensors |= maker.lora(f"{BLOCK}_{name}", 160, 160 if "q" in name else 96, 8, alpha=4)
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors, files[-1], {"ss_network_dim": "8"})  # so that hashes are written too
    written = []
    for room in (1 << 28, 0):
        out = tmp_path / f"room{room}.safetensors"
        monkeypatch.setattr(spilling, "LEAST", 1)
        monkeypatch.setattr(combining, "Spill", lambda folder, room=room: Spill(folder, room))
        monkeypatch.setattr("peftsurgery.codec.files.STEP", 1)
        report = combine([(f, 0.5) for f in files], out, method=method, architecture="sd1")
        assert report.ok
        written.append(out.read_bytes())
    assert written[0] == written[1]
