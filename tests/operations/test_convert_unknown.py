"""convert --keep-unknown: what nothing explains is refused by name, or carried bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftsurgery.cli import main
from peftsurgery.codec import load_adapter
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from peftsurgery.operations import proving
from peftsurgery.operations.convert import convert
from tests.codec.build import write
from tests.codec.parts import Maker

NAME = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
ODD = "lora_unet_foo_bar"
UNKNOWN = ["emphasis", f"{ODD}.alpha", f"{ODD}.lora_down.weight", f"{ODD}.lora_up.weight"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One known module, one that no table has, and a key without any suffix."""
    maker = Maker(3)
    tensors = {**maker.lora(NAME, 320, 768, 4, alpha=3), **maker.lora(ODD, 7, 5, 2, alpha=1)}
    return write(
        tmp_path / "in.safetensors", {**tensors, "emphasis": torch.tensor([float("nan"), 2])}
    )


def test_refused_unless_asked_for(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'emphasis'.*--keep-unknown"):
        convert(source, tmp_path / "o.safetensors", to="kohya")
    with pytest.raises(UsageError, match=r"foo_bar.*no module of(.|\n)*--keep-unknown"):
        convert(source, tmp_path / "o.safetensors", to="kohya", drop=["emphasis"])
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("to", ["kohya", "kohya-ldm", "diffusers", "comfy", "peft"])
@pytest.mark.parametrize("architecture", [None, "sd1"])
def test_carried_bit_for_bit(
    to: str, architecture: str | None, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / ("o" if to == "peft" else "o.safetensors")
    report = convert(source, out, to=to, architecture=architecture, keep_unknown=True)
    (finding,) = (f for f in report.findings if f.code == "kept-unknown")
    assert finding.message.startswith("4 keys")
    before = load_file(source)
    found = load_file(out / "adapter_model.safetensors" if to == "peft" else out)
    for key in UNKNOWN:
        assert torch.equal(
            found[key].view(-1).view(torch.uint8), before[key].view(-1).view(torch.uint8)
        )
    assert len(report.modules) == 1
    assert report.keys == {"read": 7, "dropped": 0, "written": len(found)}
    back = tmp_path / "back.safetensors"
    convert(out, back, to="kohya", keep_unknown=True, architecture=architecture)
    assert set(load_file(back)) == set(before)


def test_other_options_reach_them(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    convert(source, out, to="kohya", keep_unknown=True, dtype="bf16", drop=["emphasis"])
    found = load_file(out)
    assert "emphasis" not in found
    assert found[f"{ODD}.lora_up.weight"].dtype == torch.bfloat16
    assert load_adapter(convert_known(out, tmp_path)).modules


def convert_known(path: Path, folder: Path) -> Path:
    convert(path, folder / "known.safetensors", to="kohya", drop=[f"{ODD}*"])
    return folder / "known.safetensors"


def test_a_folder_of_folders_has_no_place_for_them(source: Path, tmp_path: Path) -> None:
    both = write(
        tmp_path / "both.safetensors", {**load_file(source), **Maker(5).lora(TEXT, 768, 768)}
    )
    with pytest.raises(UnsupportedError, match=r"no place for a key that nothing explains"):
        convert(both, tmp_path / "o", to="peft", keep_unknown=True)


def test_nothing_that_is_explained(tmp_path: Path) -> None:
    lone = write(tmp_path / "lone.safetensors", Maker(1).lora(ODD, 7, 5, 2, alpha=1))
    with pytest.raises(UsageError, match="not every key could be explained"):
        convert(lone, tmp_path / "o.safetensors", to="kohya", keep_unknown=True)


def test_a_carried_tensor_that_changed_is_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = proving.decode

    def other(*arguments: object, **options: object) -> object:
        adapter = original(*arguments, **options)  # type: ignore[arg-type]
        adapter.extras["emphasis"] = adapter.extras["emphasis"] + 1
        return adapter

    monkeypatch.setattr(proving, "decode", other)
    with pytest.raises(CheckFailed, match=r"1 carried tensors are missing or changed.*emphasis"):
        convert(source, tmp_path / "o.safetensors", to="kohya", keep_unknown=True)
    assert not (tmp_path / "o.safetensors").exists()


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.safetensors"
    command = ["convert", str(source), "-o", str(out), "--to", "comfy"]
    for more, code in ((["--keep-unknown", "--dry-run"], 0), (["--keep-unknown"], 0), ([], 2)):
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert stop.value.code == code
    assert "nothing explains" in capsys.readouterr().out
