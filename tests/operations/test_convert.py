"""convert leaves either a checked file or nothing; options do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftsurgery import checkpoint
from peftsurgery.codec import load_adapter
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from peftsurgery.layouts import LAYOUT_NAMES
from peftsurgery.operations import convert as reading
from peftsurgery.operations import writing_adapter as writing
from peftsurgery.operations.convert import convert
from tests.codec.build import dense, filled, gap, narrowed, read, shapes_of, thinned, write
from tests.codec.parts import Maker

NAME = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
HOME = "unet:down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    maker = Maker(3)
    tensors = {**maker.lora(NAME, 320, 768, 4, alpha=3), **maker.lora(TE, 768, 768, 2, alpha=1)}
    return write(tmp_path / "in.safetensors", tensors)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# nothing is left behind ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
@pytest.mark.parametrize("step", ["write_encoded", "prove", "publish", "encode", "decode"])
def test_a_failure_at_any_step_leaves_nothing(
    step: str, error: type, layout: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = reading if step == "decode" else writing
    original = getattr(module, step)
    before = names(source.parent)

    def failing(*args, **kwargs):
        if step in ("write_encoded", "prove"):
            original(*args, **kwargs)  # the file is there, and then it happens
        raise error("now")

    monkeypatch.setattr(module, step, failing)
    with pytest.raises(error):
        convert(source, source.parent / ("out" if layout == "peft" else "o.safetensors"), to=layout)
    assert names(source.parent) == before


def test_an_old_file_survives_a_failed_overwrite(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(source.parent / "out.safetensors", {"old": torch.ones(3)})
    before = out.read_bytes()

    def failing(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "prove", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, to="comfy", overwrite=True)
    assert out.read_bytes() == before
    assert names(source.parent) == {"in.safetensors", "out.safetensors"}


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_refusals_write_nothing(layout: str, tmp_path: Path) -> None:
    shapes = narrowed(thinned(shapes_of("published__flux_control_lora_format"), 2))
    source = write(tmp_path / "in.safetensors", filled(shapes))
    out = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    if layout in ("peft", "diffusers", "comfy", "bfl"):
        convert(source, out, to=layout, architecture="flux")
        assert names(tmp_path) == {"in.safetensors", out.name}
        return
    with pytest.raises(UnsupportedError) as caught:
        convert(source, out, to=layout, architecture="flux")
    assert caught.value.exit_code == 3
    assert names(tmp_path) == {"in.safetensors"}


def test_a_file_that_reads_back_differently_is_not_kept(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof can fail: a factor is changed between encoding and writing."""
    original = writing.encode

    def wrong(*args, **kwargs):
        encoded = original(*args, **kwargs)
        key = f"{NAME}.lora_up.weight"
        encoded.tensors[""][key] = encoded.tensors[""][key] * 1.001
        return encoded

    monkeypatch.setattr(writing, "encode", wrong)
    with pytest.raises(CheckFailed, match=r"ΔW of 1 modules moved .*attn2.to_k.*Nothing was kept"):
        convert(source, source.parent / "out.safetensors", to="kohya")
    assert names(source.parent) == {"in.safetensors"}


def test_a_lost_module_fails_the_check(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = writing.encode

    def without(*args, **kwargs):
        encoded = original(*args, **kwargs)
        kept = {k: t for k, t in encoded.tensors[""].items() if not k.startswith(TE)}
        encoded.tensors[""] = kept
        return encoded

    monkeypatch.setattr(writing, "encode", without)
    with pytest.raises(CheckFailed, match=r"worst 'text_encoder:.*by inf"):
        convert(source, source.parent / "out.safetensors", to="kohya")


# targets and options ---------------------------------------------------------------------------


def test_overwriting_and_the_input_itself(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    convert(source, out, to="comfy")
    with pytest.raises(UsageError, match=r"exists\. Pass --overwrite"):
        convert(source, out, to="kohya")
    assert convert(source, out, to="kohya", overwrite=True).summary["to"] == "kohya"
    for same in (source, tmp_path / "." / "in.safetensors"):
        with pytest.raises(UsageError, match="is the input"):
            convert(source, same, to="comfy", overwrite=True)
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    with pytest.raises(UsageError, match="is the input"):
        convert(source, link, to="comfy", overwrite=True)
    with pytest.raises(UsageError, match="is a folder; Comfy"):
        convert(out, tmp_path, to="comfy", overwrite=True)
    with pytest.raises(UsageError, match="give a folder name"):
        convert(source, tmp_path / "x.safetensors", to="peft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "koyha"}, "layout 'koyha' is not known"),
        ({"dtype": "fp12"}, "dtype 'fp12' is not known"),
        ({"algorithm": "loha"}, "algorithm 'loha' is not known"),
        ({"rank": "8"}, "--rank goes with --algorithm lora"),
        ({"only": ["vae"]}, "has no such component; it has text_encoder, unet"),
        ({"drop": ["nothing*"]}, "matches no key and no module"),
        ({"drop": ["*"]}, "no adapter tensors found"),
        ({"dry_run": True, "algorithm": "lora"}, "needs the values"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str, source: Path) -> None:
    with pytest.raises(UsageError, match=message):
        convert(source, source.parent / "out.safetensors", **{"to": "comfy", **options})
    assert names(source.parent) == {"in.safetensors"}


def test_drop_and_only_are_accounted_for(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "a.safetensors", to="kohya", drop=[f"{TE}*"])
    assert (report.keys["read"], report.keys["dropped"], report.keys["written"]) == (6, 3, 3)
    assert report.summary["keys left out on request"] == 3
    report = convert(source, tmp_path / "b.safetensors", to="kohya", only=["text_encoder"])
    assert [str(r["module"]).partition(":")[0] for r in report.modules] == ["text_encoder"]
    assert [f.key for f in report.findings if f.code == "left-out"] == [HOME]
    report = convert(source, tmp_path / "c.safetensors", to="kohya", drop=["text_encoder:*"])
    assert {k.split(".")[0] for k in read(tmp_path / "c.safetensors")} == {NAME}


@pytest.mark.parametrize(("dtype", "eps"), [("fp32", 0), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_dtype_states_its_error(dtype: str, eps: float, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    report = convert(source, out, to="kohya", dtype=dtype)
    pairs = zip(*(load_adapter(p).modules.values() for p in (source, out)), strict=True)
    worst = max(gap(dense(a), dense(b)) for a, b in pairs)
    assert worst <= eps
    assert report.largest_error == pytest.approx(worst, rel=1e-3, abs=1e-9)
    assert checkpoint.open_checkpoint(out)[f"{NAME}.alpha"].dtype == "F32"


def test_a_dtype_that_overflows_is_refused(tmp_path: Path) -> None:
    tensors = Maker(1).lora(NAME, 320, 768)
    tensors[f"{NAME}.lora_up.weight"] *= 1e6
    source = write(tmp_path / "in.safetensors", tensors)
    with pytest.raises(CheckFailed, match="A wider --dtype"):
        convert(source, tmp_path / "out.safetensors", to="kohya", dtype="fp16")
    assert names(tmp_path) == {"in.safetensors"}


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "comfy", "peft"])
def test_alpha_can_be_folded(layout: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    report = convert(source, out, to=layout, alpha="fold")
    assert report.largest_error < 2e-7
    adapter = load_adapter(out)
    assert all(float(m.scale) == 1 for m in adapter.modules.values())
    assert "lora_adapter_metadata" not in adapter.metadata
    assert not any(key.endswith("alpha") for key in read(out))


# dry run ---------------------------------------------------------------------------------------

DRY = {
    "lora": Maker(1).lora("lora_unet_double_blocks_0_img_attn_qkv", 144, 48, alpha=2),
    "loha": Maker(1).loha("lora_unet_double_blocks_0_img_attn_qkv", 144, 48, alpha=2),
    "lokr": Maker(1).lokr("lora_unet_double_blocks_0_img_attn_qkv", (4, 4), (36, 12)),
    "dora": Maker(1).dora("lora_unet_double_blocks_0_img_attn_qkv", 144, 48, "out"),
    "full": {"lora_unet_double_blocks_0_img_attn_qkv.diff": torch.ones(144, 48)},
    "swap": Maker(1).lora("lora_unet_final_layer_adaLN_modulation_1", 96, 48),
}
DRY_REFUSED = {
    "loha": ("diffusers", "ai-toolkit"),
    "lokr": ("diffusers", "peft"),
    "full": ("diffusers", "peft", "ai-toolkit"),
}


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft", "ai-toolkit"])
@pytest.mark.parametrize("kind", DRY)
def test_dry_run_plans_from_headers_what_is_then_written(
    kind: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.safetensors", DRY[kind])
    out = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    read_names: list[str] = []
    original = checkpoint.LazyTensor.torch
    monkeypatch.setattr(
        checkpoint.LazyTensor,
        "torch",
        lambda self: read_names.append(self.name) or original(self),
    )
    if layout in DRY_REFUSED.get(kind, ()):
        with pytest.raises(UnsupportedError) as planned:
            convert(source, out, to=layout, architecture="flux", dry_run=True)
        with pytest.raises(UnsupportedError) as run:
            convert(source, out, to=layout, architecture="flux")
        assert str(planned.value) == str(run.value)
        return
    plan = convert(source, out, to=layout, architecture="flux", dry_run=True)
    assert not [name for name in read_names if not name.endswith("alpha")]
    assert names(tmp_path) == {"in.safetensors"}
    monkeypatch.undo()
    convert(source, out, to=layout, architecture="flux")
    files = [out / "adapter_model.safetensors"] if layout == "peft" else [out]
    written = {k: t for f in files for k, t in checkpoint.open_checkpoint(f).items()}
    planned = {str(row["key"]): row["bytes"] for row in plan.tables["plan"]}
    assert planned == {key: tensor.nbytes for key, tensor in written.items()}


def test_dry_run_says_that_fused_ranks_may_come_out_smaller(tmp_path: Path) -> None:
    """A diffusers file whose parts share one down: only their values tell."""
    maker, flat = Maker(1, style="peft"), "transformer.transformer_blocks.0.attn."
    tensors = {k: t for n in "qkv" for k, t in maker.lora(f"{flat}to_{n}", 48, 48, 4).items()}
    for n in "kv":
        tensors[f"{flat}to_{n}.lora_A.weight"] = tensors[f"{flat}to_q.lora_A.weight"]
    source = write(tmp_path / "in.safetensors", tensors)
    plan = convert(source, tmp_path / "o", to="kohya", architecture="flux", dry_run=True)
    assert "ranks-not-read" in [f.code for f in plan.findings]
    convert(source, tmp_path / "o.safetensors", to="kohya", architecture="flux")
    down = read(tmp_path / "o.safetensors")[
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    ]
    assert down.shape == (4, 48)
