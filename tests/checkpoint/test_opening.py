"""open_checkpoint on local files, indexes and folders, and the attacks on them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from peftsurgery.checkpoint import Checkpoint, Limits, open_checkpoint, sha256_of
from peftsurgery.errors import UnsafeInputError, UsageError
from tests.checkpoint.build import raw_file, write_simple


def write_index(
    folder: Path, weight_map: object, name: str = "model.safetensors.index.json"
) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    return path


def write_sharded(folder: Path, stem: str = "model") -> Path:
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write_simple(folder / shards[0], {"b.x": 3, "a.x": 1}, {"format": "pt"})
    write_simple(folder / shards[1], {"c.x": 5})
    weight_map = {"a.x": shards[0], "b.x": shards[0], "c.x": shards[1]}
    return write_index(folder, weight_map, f"{stem}.safetensors.index.json")


def lengths(checkpoint: Checkpoint) -> dict[str, int]:
    for tensor in checkpoint.values():
        assert list(tensor.numpy()) == list(range(tensor.shape[0]))
    return {name: tensor.shape[0] for name, tensor in checkpoint.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".sft"])
def test_file(tmp_path, suffix):
    path = write_simple(tmp_path / f"a{suffix}", {"x": 2, "y": 0}, {"k": "v"})
    found = open_checkpoint(str(path))
    assert (found.kind, found.path, found.source) == ("file", path, str(path))
    assert found.metadata == {"k": "v"}
    assert found.config is None
    assert found.files == (path,)
    assert lengths(found) == {"x": 2, "y": 0}
    assert found.shard_of == {"x": path, "y": path}
    assert found.sha256() == {path.name: sha256_of(path)}
    assert found.nbytes == 8
    assert "x" in found
    assert "z" not in found
    with pytest.raises(KeyError):
        found["z"]


def test_sharded_index_and_transformers_folder(tmp_path):
    index = write_sharded(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "limit": [0.0, Infinity]}')
    by_index = open_checkpoint(index)
    assert by_index.kind == "sharded"
    assert lengths(by_index) == {"a.x": 1, "b.x": 3, "c.x": 5}
    assert by_index.metadata == {"format": "pt"}
    assert [file.name for file in by_index.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert by_index.shard_of["c.x"] == by_index.files[1]
    assert by_index.sha256().keys() == {file.name for file in by_index.files}
    by_folder = open_checkpoint(tmp_path)
    assert by_folder.kind == "transformers"
    assert by_folder.config is not None
    assert by_folder.config["model_type"] == "llama"
    assert list(by_folder) == list(by_index)


def test_pipeline(tmp_path):
    model_index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "transformer": ["diffusers", "X"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "vae": ["diffusers", "AutoencoderKL"],
        "flag": True,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(model_index))
    write_simple(
        tmp_path / "unet/diffusion_pytorch_model.safetensors", {"conv.w": 2}, {"m": "unet"}
    )
    write_simple(tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors", {"conv.w": 1})
    (tmp_path / "unet/config.json").write_text('{"sample_size": 8}')
    write_simple(tmp_path / "text_encoder/model.safetensors", {"emb": 3})
    write_sharded(tmp_path / "transformer", "diffusion_pytorch_model")
    write_simple(tmp_path / "vae/diffusion_pytorch_model.fp16.safetensors", {"conv.w": 4})
    write_simple(tmp_path / "unet_old/diffusion_pytorch_model.safetensors", {"conv.w": 9})
    write_simple(tmp_path / "safety_checker/model.safetensors", {"w": 9})
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text("{}")
    found = open_checkpoint(tmp_path)
    assert found.kind == "pipeline"
    assert lengths(found) == {
        "unet:conv.w": 2,
        "text_encoder:emb": 3,
        "transformer:a.x": 1,
        "transformer:b.x": 3,
        "transformer:c.x": 5,
        "vae:conv.w": 4,
    }
    assert found.config == model_index
    assert found.configs == {"unet": {"sample_size": 8}}
    assert found.metadata == {"m": "unet"}
    assert lengths(found.components["vae"]) == {"conv.w": 4}
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in found.sha256()
    assert len(found.files) == 5


def test_two_variants_are_not_guessed_between(tmp_path):
    write_simple(tmp_path / "model.fp16.safetensors", {"w": 1})
    assert lengths(open_checkpoint(tmp_path)) == {"w": 1}
    write_simple(tmp_path / "model.bf16.safetensors", {"w": 1})
    with pytest.raises(UsageError, match=r"model\.bf16\.safetensors and model\.fp16\.safetensors"):
        open_checkpoint(tmp_path)


def test_sharded_variant(tmp_path):
    write_simple(tmp_path / "model.fp16-00001-of-00001.safetensors", {"w": 1})
    name = "model.safetensors.index.fp16.json"
    write_index(tmp_path, {"w": "model.fp16-00001-of-00001.safetensors"}, name)
    assert lengths(open_checkpoint(tmp_path)) == {"w": 1}
    assert open_checkpoint(tmp_path / name).kind == "sharded"


def test_peft_folder(tmp_path):
    write_simple(tmp_path / "adapter_model.safetensors", {"base_model.model.q.lora_A.weight": 2})
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    (tmp_path / "config.json").write_text('{"not": "this one"}')
    write_simple(tmp_path / "other.safetensors", {"w": 1})
    found = open_checkpoint(tmp_path)
    assert found.kind == "peft"
    assert found.config == {"r": 4}
    assert list(found) == ["base_model.model.q.lora_A.weight"]
    write_simple(tmp_path / "model.safetensors", {"w": 1})
    with pytest.raises(UsageError, match=r"both an adapter and model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"without adapter_model\.safetensors"):
        open_checkpoint(tmp_path)


def test_peft_sub_folders(tmp_path):
    for rank, component in enumerate(["unet", "text_encoder"], start=1):
        write_simple(tmp_path / component / "adapter_model.safetensors", {"q.lora_A.weight": rank})
        (tmp_path / component / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (tmp_path / "logs").mkdir()
    found = open_checkpoint(tmp_path)
    assert found.kind == "peft"
    assert lengths(found) == {"text_encoder:q.lora_A.weight": 2, "unet:q.lora_A.weight": 1}
    assert found.configs == {"unet": {"r": 1}, "text_encoder": {"r": 2}}
    assert found["unet:q.lora_A.weight"].name == "q.lora_A.weight"


def test_training_checkpoints_are_not_components(tmp_path):
    for step in ("checkpoint-100", "checkpoint-200"):
        write_simple(tmp_path / step / "adapter_model.safetensors", {"q": 1})
        (tmp_path / step / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="training checkpoints"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "checkpoint-100").kind == "peft"


def test_folder_with_one_file(tmp_path):
    write_simple(tmp_path / "my_lora.safetensors", {"w": 1})
    (tmp_path / "README.md").write_text("hello")
    assert open_checkpoint(tmp_path).kind == "file"
    write_simple(tmp_path / "other.safetensors", {"w": 1})
    with pytest.raises(
        UsageError, match=r"2 weight files.*my_lora\.safetensors, other\.safetensors"
    ):
        open_checkpoint(tmp_path)
    write_simple(tmp_path / "pytorch_lora_weights.safetensors", {"w": 3})
    assert lengths(open_checkpoint(tmp_path)) == {"w": 3}


def test_folder_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"no weights.*model_index\.json.*adapter_config\.json"):
        open_checkpoint(tmp_path)


def test_file_and_index_of_one_name_are_not_guessed_between(tmp_path):
    write_sharded(tmp_path)
    write_simple(tmp_path / "model.safetensors", {"w": 1})
    with pytest.raises(UsageError, match="give the path of one"):
        open_checkpoint(tmp_path)


def test_missing_says_everything_that_was_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        open_checkpoint("owner/some-model")
    text = str(caught.value)
    assert str(tmp_path / "owner/some-model") in text
    assert "HF_HUB_OFFLINE is set" in text
    assert str(tmp_path / "cache/models--owner--some-model") in text
    with pytest.raises(UsageError, match=r"not of the form owner/repo"):
        open_checkpoint("loras/missing.safetensors")
    with pytest.raises(UsageError, match=r"not of the form owner/repo"):
        open_checkpoint(tmp_path / "missing.safetensors")


def test_devices_pipes_and_dangling_links_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", Path("/dev/zero")):
        with pytest.raises(UsageError, match="not a regular file"):
            open_checkpoint(path)
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot be read"):
        open_checkpoint(tmp_path / "b.safetensors")


# --- attacks on indexes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/x.safetensors",
        "..",
        "C:x.safetensors",
        "a\\x.safetensors",
        "",
        "x\x00.safetensors",
        "x\n.safetensors",
        "x" * 250 + ".safetensors",
    ],
)
def test_shard_names_are_plain_basenames(tmp_path, shard):
    write_simple(tmp_path / "secret.safetensors", {"w": 1})
    index = write_index(tmp_path / "model", {"w": shard})
    with pytest.raises(UnsafeInputError, match="not a plain file name") as caught:
        open_checkpoint(index)
    assert caught.value.exit_code == 4


def test_shard_must_be_a_weights_file(tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    with pytest.raises(UnsafeInputError, match="not the name of a weights file"):
        open_checkpoint(write_index(tmp_path, {"w": "id_rsa"}))
    with pytest.raises(UnsafeInputError, match="a file name was expected"):
        open_checkpoint(write_index(tmp_path, {"w": 1}))
    for empty in ({}, [], None):
        with pytest.raises(UnsafeInputError, match="weight_map is missing or empty"):
            open_checkpoint(write_index(tmp_path, empty))


def test_shard_pickle_needs_the_same_permission(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"\x80\x02}.")
    name = "pytorch_model.bin.index.json"
    index = write_index(tmp_path, {"w": "pytorch_model-00001-of-00001.bin"}, name)
    with pytest.raises(UnsafeInputError, match="--allow-pickle"):
        open_checkpoint(index)


def test_symlinks_out_of_the_folder_are_refused(tmp_path):
    write_simple(tmp_path / "outside/s.safetensors", {"w": 1})
    index = write_index(tmp_path / "model", {"w": "s.safetensors"})
    (tmp_path / "model/s.safetensors").symlink_to(tmp_path / "outside/s.safetensors")
    with pytest.raises(UnsafeInputError, match="a symbolic link out of the folder"):
        open_checkpoint(index)
    index.unlink()
    with pytest.raises(UnsafeInputError, match="a symbolic link out of the folder"):
        open_checkpoint(tmp_path / "model")
    link = tmp_path / "model/s.safetensors"
    assert lengths(open_checkpoint(link)) == {"w": 1}  # named by the user: theirs to decide
    link.unlink()
    write_simple(tmp_path / "model/real.safetensors", {"w": 1})
    link.symlink_to("real.safetensors")
    write_index(tmp_path / "model", {"w": "s.safetensors"})
    assert lengths(open_checkpoint(tmp_path / "model")) == {"w": 1}
    (tmp_path / "secret.json").write_text('{"password": 1}')
    (tmp_path / "model/config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UnsafeInputError, match=r"config\.json: a symbolic link"):
        open_checkpoint(tmp_path / "model")


def test_symlinked_component_folder_is_refused(tmp_path):
    write_simple(tmp_path / "outside/diffusion_pytorch_model.safetensors", {"w": 1})
    root = tmp_path / "pipe"
    root.mkdir()
    (root / "unet").symlink_to(tmp_path / "outside")
    (root / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    with pytest.raises(UnsafeInputError, match="a symbolic link out of the folder"):
        open_checkpoint(root)


def test_component_names_are_plain_basenames(tmp_path):
    write_simple(tmp_path / "outside/model.safetensors", {"w": 1})
    root = tmp_path / "pipe"
    root.mkdir()
    (root / "model_index.json").write_text('{"../outside": ["transformers", "CLIPTextModel"]}')
    with pytest.raises(UnsafeInputError, match="not a plain file name"):
        open_checkpoint(root)


def test_shards_and_weight_map_agree_both_ways(tmp_path):
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_simple(tmp_path / one, {"a": 1, "b": 1})
    write_simple(tmp_path / two, {"c": 1})
    for weight_map, expected in [
        (
            {"a": one, "c": two},
            f"{one}: holds 'b', but model.safetensors.index.json does not name it",
        ),
        ({"a": one, "b": two, "c": two}, f"puts it into '{two}'"),
        ({"a": one, "b": one, "c": two, "d": two}, f"'d' should be in {two}, but is not"),
    ]:
        with pytest.raises(UnsafeInputError) as caught:
            open_checkpoint(write_index(tmp_path, weight_map))
        assert expected in str(caught.value)
    write_simple(tmp_path / two, {"c": 1, "a": 1})
    with pytest.raises(UnsafeInputError, match=f"'a' is in {one} too"):
        open_checkpoint(write_index(tmp_path, {"a": one, "b": one, "c": two}))
    (tmp_path / two).unlink()
    with pytest.raises(UsageError, match=f"{two}: cannot be read"):
        open_checkpoint(write_index(tmp_path, {"a": one, "b": one, "c": two}))


def test_hostile_shard_is_refused_by_name(tmp_path):
    (tmp_path / "s.safetensors").write_bytes(raw_file({}, b"x"))
    with pytest.raises(UnsafeInputError, match=r"s\.safetensors: 1 bytes trail"):
        open_checkpoint(write_index(tmp_path, {"w": "s.safetensors"}))


def test_json_files_are_capped_and_strict(tmp_path):
    write_simple(tmp_path / "model.safetensors", {"w": 1})
    config = tmp_path / "config.json"
    for text, expected in [
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[1]", "a JSON object was expected, found list"),
        ("{", "not valid JSON"),
        ('{"a": ' + "[" * 100_000, "nested too deep"),
    ]:
        config.write_text(text)
        with pytest.raises(UnsafeInputError) as caught:
            open_checkpoint(tmp_path)
        assert expected in str(caught.value)
        assert "config.json" in str(caught.value)
    config.write_text('{"a": "' + "x" * 1000 + '"}')
    with pytest.raises(UnsafeInputError, match="at most 1000 are read"):
        open_checkpoint(tmp_path, limits=Limits(json_bytes=1000))
    assert open_checkpoint(tmp_path).config == {"a": "x" * 1000}


def test_sha256_of_payload_only(tmp_path):
    one = write_simple(tmp_path / "a.safetensors", {"w": 5})
    two = write_simple(tmp_path / "b.safetensors", {"w": 5}, {"note": "other header"})
    assert sha256_of(one) != sha256_of(two)
    assert sha256_of(one, skip_header=True) == sha256_of(two, skip_header=True)
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(UsageError, match="not a safetensors file"):
        sha256_of(tmp_path / "short", skip_header=True)
    with pytest.raises(UsageError, match="cannot be read"):
        sha256_of(tmp_path / "missing")
