"""Hub ids: their grammar, the cache without a network, and which files are asked for with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.checkpoint.hub import HubId, parse
from peftsurgery.errors import UnsafeInputError, UsageError
from tests.checkpoint.build import write_simple

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/repo", HubId("owner/repo")),
        ("owner/My_repo-1.5", HubId("owner/My_repo-1.5")),
        ("owner/repo@v1", HubId("owner/repo", "v1")),
        ("owner/repo:a/b.safetensors", HubId("owner/repo", "main", "a/b.safetensors")),
        ("owner/repo@refs/pr/3:x.sft", HubId("owner/repo", "refs/pr/3", "x.sft")),
        ("hf://owner/repo", HubId("owner/repo")),
        ("hf://owner/repo@v1/sub/x.safetensors", HubId("owner/repo", "v1", "sub/x.safetensors")),
        ("hf://owner/repo@refs/pr/3/x.sft", HubId("owner/repo", "refs/pr/3", "x.sft")),
        ("hf://owner/repo@refs%2Fpr%2F3/x.sft", HubId("owner/repo", "refs/pr/3", "x.sft")),
        ("hf://owner/repo/unet/", HubId("owner/repo", "main", "unet")),
        ("repo", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("../a", None),
        ("/a/b", None),
        ("loras/x.safetensors", None),
        ("loras/x.ckpt", None),
        ("loras/model.safetensors.index.json", None),
    ],
)
def test_grammar(source, expected):
    assert parse(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "hf://owner",
        "hf://",
        "owner/repo:../x",
        "owner/repo:/etc/x",
        "owner/repo@../main:x",
        "hf://owner/repo/a/../../x",
        "owner/repo:a\\x",
        "owner/repo:a\x1b",
        "hf://owner/repo@..%2Fx/y",
    ],
)
def test_malformed_or_escaping(source):
    with pytest.raises(UsageError):
        parse(source)


def lay_out(cache: Path, files: dict[str, Path], repo: str = "owner/repo") -> Path:
    """The files of a repository as huggingface_hub keeps them: blobs, links from the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(COMMIT)
    (root / "blobs").mkdir()
    for i, (name, source) in enumerate(files.items()):
        blob = root / "blobs" / f"{i:040x}"
        blob.write_bytes(source.read_bytes())
        link = root / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache with a PEFT repository and a pipeline; offline."""
    made = tmp_path / "made"
    adapter = write_simple(made / "adapter.safetensors", {"q.lora_A.weight": 3})
    model = write_simple(made / "model.safetensors", {"w": 2})
    (made / "config.json").write_text('{"r": 2}')
    (made / "model_index.json").write_text('{"unet": ["diffusers", "U"]}')
    root = tmp_path / "cache"
    files = {"adapter_model.safetensors": adapter, "adapter_config.json": made / "config.json"}
    lay_out(root, files)
    pipeline = {
        "model_index.json": made / "model_index.json",
        "unet/diffusion_pytorch_model.safetensors": model,
        "unet/config.json": made / "config.json",
    }
    lay_out(root, pipeline, "owner/pipe")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    return root


def test_the_environment_decides(cache, tmp_path):
    """In a fresh process, so that huggingface_hub itself reads HF_HUB_OFFLINE and HF_HUB_CACHE."""
    code = (
        "from peftsurgery.checkpoint import open_checkpoint\n"
        "found = open_checkpoint('owner/repo')\n"
        "print(found.kind, found.config, found['q.lora_A.weight'].numpy().tolist())"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    environment["PYTHONPATH"] = str(Path.cwd())
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "peft {'r': 2} [0.0, 1.0, 2.0]", done.stderr


def test_revisions_files_and_folders_in_the_cache(cache):
    assert open_checkpoint(f"owner/repo@{COMMIT}").kind == "peft"
    assert open_checkpoint("hf://owner/repo").kind == "peft"
    found = open_checkpoint("owner/repo:adapter_model.safetensors")
    assert found.kind == "file"
    assert found.source == "owner/repo:adapter_model.safetensors"
    pipeline = open_checkpoint("owner/pipe")
    assert list(pipeline) == ["unet:w"]
    assert list(open_checkpoint("hf://owner/pipe/unet")) == ["w"]
    assert open_checkpoint("hf://owner/pipe/unet").config == {"r": 2}


@pytest.mark.parametrize("source", ["owner/repo@v2", "owner/repo:missing.sft", "owner/other"])
def test_what_the_cache_lacks(cache, source):
    with pytest.raises(UsageError, match="the cache: no ") as caught:
        open_checkpoint(source)
    assert str(cache) in str(caught.value)


def test_local_path_comes_first(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_simple(tmp_path / "owner/repo/model.safetensors", {"local": 1})
    assert list(open_checkpoint("owner/repo")) == ["local"]
    assert list(open_checkpoint("hf://owner/repo")) == ["q.lora_A.weight"]


def test_links_between_blobs_are_fine_and_out_of_the_cache_are_not(cache, tmp_path):
    root = cache / "models--owner--repo"
    link = root / "snapshots" / COMMIT / "adapter_model.safetensors"
    blob = link.resolve()
    shared = cache / "blobs/ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))  # the store shared by repositories
    assert open_checkpoint("owner/repo").kind == "peft"
    outside = write_simple(tmp_path / "outside.safetensors", {"w": 1})
    for target in (outside, cache / "models--owner--pipe/refs/main"):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(UnsafeInputError, match="a symbolic link out of the folder"):
            open_checkpoint("owner/repo")


def test_commit_in_refs_cannot_escape(cache):
    (cache / "models--owner--repo/refs/main").write_text("..")
    with pytest.raises(UsageError, match="the cache: no"):
        open_checkpoint("owner/repo")


class FakeHub:
    """Serves a folder as `owner/online`, through the two calls that are made, into a cache."""

    def __init__(self, served: Path, cache: Path) -> None:
        self.served = served
        self.cache = cache
        self.asked: list[str] = []

    def repo_info(self, repo: str, *, revision: str) -> SimpleNamespace:
        if repo != "owner/online":
            raise ConnectionError("no route to host\nlong trace")
        files = (path for path in sorted(self.served.rglob("*")) if path.is_file())
        names = [path.relative_to(self.served).as_posix() for path in files]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def hf_hub_download(self, repo: str, name: str, *, revision: str) -> str:
        assert (repo, revision) == ("owner/online", "main")
        self.asked.append(name)
        target = self.cache / "models--owner--online/snapshots" / COMMIT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.served / name).read_bytes())
        return str(target)


@pytest.fixture
def online(cache, tmp_path, monkeypatch) -> FakeHub:
    served = tmp_path / "served"
    fake = FakeHub(served, cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.hf_hub_download)
    write_simple(served / "unet/diffusion_pytorch_model.safetensors", {"w": 1})
    write_simple(served / "unet/diffusion_pytorch_model.fp16.safetensors", {"w": 1})
    shard = "model-00001-of-00001.safetensors"
    write_simple(served / "text_encoder" / shard, {"e": 2})
    index = served / "text_encoder/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"e": shard}}))
    (served / "unet/config.json").write_text("{}")
    (served / "README.md").write_text("")
    listed = {
        "unet": ["diffusers", "U"],
        "text_encoder": ["transformers", "T"],
        "vae": [None, None],
    }
    (served / "model_index.json").write_text(json.dumps(listed))
    write_simple(served / "big_single_file.safetensors", {"w": 1})
    return fake


def test_only_the_needed_files_are_downloaded(online):
    found = open_checkpoint("owner/online")
    assert list(found) == ["unet:w", "text_encoder:e"]
    assert set(online.asked) == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model-00001-of-00001.safetensors",
    }


def test_one_file_and_one_folder_online(online):
    assert list(open_checkpoint("owner/online:big_single_file.safetensors")) == ["w"]
    assert online.asked == ["big_single_file.safetensors"]
    assert list(open_checkpoint("hf://owner/online/text_encoder")) == ["e"]
    with pytest.raises(UsageError, match="no such file or folder in the repository"):
        open_checkpoint("owner/online:nothing.safetensors")


def test_a_pickle_is_refused_before_it_is_downloaded(online):
    (online.served / "evil.ckpt").write_bytes(b"x")
    with pytest.raises(UnsafeInputError, match="--allow-pickle"):
        open_checkpoint("owner/online:evil.ckpt")
    assert online.asked == []


def test_hostile_index_online_asks_for_nothing_outside(online):
    index = online.served / "text_encoder/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"e": "../../x.safetensors"}}))
    with pytest.raises(UnsafeInputError, match="not a plain file name"):
        open_checkpoint("owner/online")


def test_no_network_falls_back_to_the_cache_and_says_so(online):
    assert open_checkpoint("owner/repo").kind == "peft"
    with pytest.raises(UsageError) as caught:
        open_checkpoint("owner/unknown")
    assert "ConnectionError: no route to host" in str(caught.value)
    assert "long trace" not in str(caught.value)
    assert "the cache: no " in str(caught.value)
