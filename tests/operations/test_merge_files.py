"""Files: what is copied, rewritten and left out; names, links, determinism; dry runs; refusals that
write nothing.
"""

# pyright: reportArgumentType=false
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery.checkpoint import LazyTensor
from peftsurgery.cli import main
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from tests.operations.merging import GOLDEN, random, saved, state, write

LORA = GOLDEN / "peft_llama_lora"
SHARDED = "60KB"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sharded model folder with what lies beside weights in the wild."""
    folder = tmp_path / "model"
    shutil.copytree(saved("tiny_llama", shard=SHARDED), folder)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("# model")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"a": "pytorch_model.bin"}}'
    )
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "consolidated.safetensors").write_bytes(
        (saved("tiny_llama") / "model.safetensors").read_bytes()
    )
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    (folder / "assets").mkdir()
    (folder / "assets" / "voice.json").write_text("{}")
    return folder


def test_side_files_are_copied_and_stale_weights_are_not(tmp_path: Path, model: Path) -> None:
    ps.merge(model, [(LORA, 1.0)], tmp_path / "out")
    left = {
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.gguf",
        "consolidated.safetensors",
        ".cache/x",
    }
    assert names(tmp_path / "out") == names(model) - left
    changed = {"model.safetensors.index.json"}
    for name in names(tmp_path / "out"):
        if not name.endswith(".safetensors") and name not in changed:
            assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes(), name


def test_the_index_keeps_the_shards_and_counts_bytes(tmp_path: Path, model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] = 12345  # wrong, as they often are
    index["metadata"]["by"] = "somebody"
    path.write_text(json.dumps(index))
    ps.merge(model, [(LORA, 1.0)], tmp_path / "out")
    written = json.loads((tmp_path / "out" / path.name).read_text())
    assert written["weight_map"] == index["weight_map"]
    assert list(written["weight_map"]) == list(index["weight_map"])
    shards = set(index["weight_map"].values())
    tensors = [t for shard in shards for t in load_file(tmp_path / "out" / shard).values()]
    assert written["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    assert written["metadata"]["by"] == "somebody"
    if "total_parameters" in index["metadata"]:
        assert written["metadata"]["total_parameters"] == sum(t.numel() for t in tensors)
    ps.merge(model, [(LORA, 1.0)], tmp_path / "half", dtype="bf16")
    half = json.loads((tmp_path / "half" / path.name).read_text())
    assert half["metadata"]["total_size"] == sum(t.nbytes for t in tensors) // 2


def test_a_sharded_index_as_base(tmp_path: Path, model: Path) -> None:
    index = model / "model.safetensors.index.json"
    ps.merge(index, [(LORA, 1.0)], tmp_path / "out", verify="full")
    shards = set(json.loads(index.read_text())["weight_map"].values())
    assert names(tmp_path / "out") == {index.name, *shards}
    ps.merge(model, [(LORA, 1.0)], tmp_path / "folder")
    for shard in shards:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "folder" / shard).read_bytes()


def test_two_runs_are_byte_identical(tmp_path: Path, model: Path) -> None:
    for out in ("one", "two"):
        ps.merge(model, [(LORA, 0.7), (GOLDEN / "peft_llama_dora", 0.4)], tmp_path / out)
    assert names(tmp_path / "one") == names(tmp_path / "two")
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), (
            name
        )


def test_a_hub_cache_of_links_as_base(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(saved("tiny_llama").iterdir())):
        (blobs / f"{number:040x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    ps.merge(snapshot, [(LORA, 1.0)], tmp_path / "out", verify="full")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    ps.merge(saved("tiny_llama"), [(LORA, 1.0)], tmp_path / "plain")
    assert names(tmp_path / "out") == names(tmp_path / "plain")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    assert (blobs / f"{0:040x}").read_bytes() == sorted(saved("tiny_llama").iterdir())[
        0
    ].read_bytes()


def test_pipeline_folders_are_copied_whole(tmp_path: Path) -> None:
    base = saved("tiny_sdxl_pipeline")
    ps.merge(base, [(GOLDEN / "diffusers_sdxl_lora.safetensors", 1.0)], tmp_path / "out")
    assert names(tmp_path / "out") == names(base)
    for name in names(base):
        same = (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
        touched = name.startswith(("unet/", "text_encoder")) and name.endswith(".safetensors")
        assert same != touched, name


def test_strength_zero_leaves_the_bytes_as_they_are(tmp_path: Path) -> None:
    base = saved("tiny_llama")
    report = ps.merge(base, [(LORA, 0.0)], tmp_path / "out", verify="full")
    assert any(finding.code == "strength-zero" for finding in report.findings)
    assert report.summary["tensors touched"] == 0
    for name in names(base):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    ps.merge(base, [(GOLDEN / "peft_llama_dora", 0.0), (LORA, 1.0)], tmp_path / "mixed")
    ps.merge(base, [(LORA, 1.0)], tmp_path / "alone")
    assert all(
        torch.equal(t, state(tmp_path / "alone")[n]) for n, t in state(tmp_path / "mixed").items()
    )


def test_negative_strength_takes_away(tmp_path: Path) -> None:
    base = saved("tiny_llama")
    ps.merge(base, [(LORA, -1.0)], tmp_path / "minus")
    ps.merge(base, [(LORA, 1.0)], tmp_path / "plus")
    before, minus, plus = state(base), state(tmp_path / "minus"), state(tmp_path / "plus")
    for name, weight in before.items():
        torch.testing.assert_close(plus[name] - weight, weight - minus[name], rtol=1e-3, atol=1e-6)


def test_metadata_says_what_was_merged(tmp_path: Path) -> None:
    ps.merge(saved("tiny_llama"), [(LORA, 0.7)], tmp_path / "out")
    metadata = ps.open_checkpoint(tmp_path / "out").metadata
    assert metadata["format"] == "pt"
    assert metadata["peftsurgery.operation"] == "merge"
    assert metadata["peftsurgery.adapters"] == "peft_llama_lora=0.7"


# dry runs and refusals
# --------------------------------------------------------------------------------------


def test_a_dry_run_reads_headers_only_and_prints_the_plan(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = LazyTensor.read

    def refuse(self: LazyTensor) -> memoryview:
        assert not self.path.is_relative_to(model), f"{self.name} was read"
        return read(self)

    monkeypatch.setattr(LazyTensor, "read", refuse)
    report = ps.merge(
        model, [(LORA, 0.5), (GOLDEN / "peft_llama_loha", 1.0)], tmp_path / "out", dry_run=True
    )
    assert not (tmp_path / "out").exists()
    assert report.summary["bytes"] == sum(t.nbytes for t in state(saved("tiny_llama")).values())
    assert "peft_llama_lora=0.5 then peft_llama_loha=1" in str(report.summary["adapters"])
    assert int(str(report.summary["estimated peak memory bytes"])) > 0
    rows = {row["tensor"]: row for row in report.tables["plan"]}
    assert rows["model.layers.0.self_attn.q_proj.weight"]["edits"] == 2
    assert rows["model.layers.0.self_attn.q_proj.weight"]["shape"] == "64x64"


def test_the_command_prints_order_and_sizes(tmp_path: Path) -> None:
    base, out = saved("tiny_llama"), tmp_path / "out"
    arguments = [
        "merge",
        str(base),
        "-a",
        f"{LORA}=0.5",
        "-a",
        str(GOLDEN / "peft_llama_dora"),
        "-o",
        str(out),
    ]
    result = CliRunner().invoke(main, [*arguments, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert "composed in this order" in data["summary"]["adapters"]
    assert not out.exists()
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert out.is_dir()
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    tied = CliRunner().invoke(
        main, [*arguments, "--overwrite", "--tied", "untie", "--residual-base"]
    )
    assert tied.exit_code == 0, tied.output


def test_a_module_that_does_not_land_names_the_nearest(tmp_path: Path) -> None:
    normal = random(1)
    file = {}
    for module in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.wq",
        "model.layers.7.mlp.down_proj",
    ):
        file |= {
            f"base_model.model.{module}.lora_A.weight": normal(2, 64),
            f"base_model.model.{module}.lora_B.weight": normal(64, 2),
        }
    adapter = write(tmp_path / "a.safetensors", file)
    with pytest.raises(CheckFailed) as caught:
        ps.merge(saved("tiny_llama"), [(adapter, 1.0)], tmp_path / "out")
    text = str(caught.value)
    assert text.startswith("2 of 3 modules do not land")
    assert "model.layers.0.self_attn.wq.weight' (closest: " in text
    assert "model.layers.1.mlp.down_proj.weight" in text
    assert caught.value.exit_code == 1
    assert names(tmp_path) == {"a.safetensors"}


def test_a_module_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    normal = random(1)
    key = "base_model.model.model.layers.0.self_attn.k_proj"
    adapter = write(
        tmp_path / "a.safetensors",
        {f"{key}.lora_A.weight": normal(2, 64), f"{key}.lora_B.weight": normal(64, 2)},
    )
    with pytest.raises(
        CheckFailed, match=r"k_proj: the change has shape \[64, 64\], the base \[32, 64\]"
    ):
        ps.merge(saved("tiny_llama"), [(adapter, 1.0)], tmp_path / "out")
    with pytest.raises(CheckFailed):  # a strength of 0 does not hide it
        ps.merge(saved("tiny_llama"), [(adapter, 0.0)], tmp_path / "out")


def test_outputs_that_would_destroy_something_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    shutil.copyfile(saved("tiny_llama") / "model.safetensors", base)
    for dst, why in ((base, "is the base itself"), (tmp_path, "exists")):
        with pytest.raises(UsageError, match=why):
            ps.merge(base, [(LORA, 1.0)], dst)
    with pytest.raises(UsageError, match="folder"):
        ps.merge(saved("tiny_llama"), [(LORA, 1.0)], tmp_path / "x.safetensors")
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists"):
        ps.merge(saved("tiny_llama"), [(LORA, 1.0)], tmp_path / "there")
    for option in (
        {"relative_to": "x"},
        {"dtype": "fp8"},
        {"rounding": "up"},
        {"verify": "no"},
        {"tied": "x"},
    ):
        with pytest.raises(UsageError, match="not known"):
            ps.merge(base, [(LORA, 1.0)], tmp_path / "y.safetensors", **option)
    with pytest.raises(UsageError, match="no adapter"):
        ps.merge(base, [], tmp_path / "y.safetensors")
    assert names(tmp_path) == {"base.safetensors"}


def test_a_quantized_base_is_refused_by_its_method(tmp_path: Path) -> None:
    folder = tmp_path / "q"
    shutil.copytree(saved("tiny_llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="gptq"):
        ps.merge(folder, [(LORA, 1.0)], tmp_path / "out")


def test_a_lone_file_of_a_model_and_integers_beside_it(tmp_path: Path) -> None:
    tensors = load_file(saved("tiny_llama") / "model.safetensors")
    tensors["position_ids"] = torch.arange(64)
    tensors["scalar"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "base.safetensors", {"format": "pt"})
    ps.merge(
        tmp_path / "base.safetensors",
        [(LORA, 1.0)],
        tmp_path / "out.safetensors",
        dtype="bf16",
        verify="full",
    )
    after = load_file(tmp_path / "out.safetensors")
    assert torch.equal(after["position_ids"], tensors["position_ids"])
    assert after["scalar"].dtype == torch.bfloat16
    assert after["scalar"].shape == ()


def test_an_interrupted_merge_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftsurgery.operations import merge as operation

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(operation, "differences", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ps.merge(saved("tiny_llama"), [(LORA, 1.0)], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_thousand_modules_that_do_not_land_are_reported_at_once(tmp_path: Path) -> None:
    normal = random(1)
    down, up = normal(1, 8), normal(8, 1)
    file, base = {}, {}
    for number in range(1500):
        base[f"model.layers.{number}.self_attn.q_proj.weight"] = torch.zeros(8, 8)
        key = f"base_model.model.model.blocks.{number}.attention.query"
        file |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    save_file({n: t.clone() for n, t in base.items()}, tmp_path / "base.safetensors")
    adapter = write(tmp_path / "a.safetensors", file)
    with pytest.raises(CheckFailed, match="1500 of 1500 modules do not land") as caught:
        ps.merge(
            tmp_path / "base.safetensors",
            [(adapter, 1.0)],
            tmp_path / "out.safetensors",
            architecture="llm",
        )
    assert "… and 1492 more" in str(caught.value)
    assert str(caught.value).count("closest") == 8  # looking for nearest names is slow


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_weights_of_other_types_are_refused_where_they_would_change(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = load_file(saved("tiny_llama") / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(UnsupportedError, match=f"'{name}' is stored as"):
        ps.merge(tmp_path / "base.safetensors", [(LORA, 1.0)], tmp_path / "out.safetensors")


def test_tensors_that_cannot_be_merged_are_named(tmp_path: Path) -> None:
    normal = random(2)
    key = "lora_unet_input_blocks_4_1_proj_in"
    file = {
        f"{key}.lora_down.weight": normal(2, 32, 1, 1),
        f"{key}.lora_up.weight": normal(32, 2, 1, 1),
        "bundle_emb.token.clip_l": normal(2, 32),
    }
    weight = state(saved("tiny_sd_pipeline"))["unet:down_blocks.1.attentions.0.proj_in.weight"]
    file[f"{key}.lora_down.weight"] = normal(2, weight.shape[1], 1, 1)
    file[f"{key}.lora_up.weight"] = normal(weight.shape[0], 2, 1, 1)
    adapter = write(tmp_path / "a.safetensors", file)
    report = ps.merge(
        saved("tiny_sd_pipeline"), [(adapter, 1.0)], tmp_path / "out", architecture="sd1"
    )
    assert any(f.code == "not-merged" and "bundle_emb" in str(f.key) for f in report.findings)
