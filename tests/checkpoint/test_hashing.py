"""SHA-256 ahead of need: taken once, never for a file that has changed; and memory given back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from peftsurgery.checkpoint import hash_ahead, hashing, open_checkpoint, sha256_of
from peftsurgery.errors import UsageError
from tests.checkpoint.build import write_simple


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_result_is_taken_and_taken_once(tmp_path, monkeypatch):
    path = write_simple(tmp_path / "a.safetensors", {"a": 100})
    read: list[Path | str] = []
    plain = hashing._digest

    def counting(path: Path | str, skip_header: bool) -> str:
        read.append(path)
        return plain(path, skip_header)

    monkeypatch.setattr(hashing, "_digest", counting)
    hash_ahead(path)
    assert sha256_of(path) == digest(path)
    assert len(read) == 1
    assert sha256_of(path) == digest(path)
    assert len(read) == 2


def test_a_file_that_changed_since_is_read_again(tmp_path):
    path = write_simple(tmp_path / "a.safetensors", {"a": 100})
    before = digest(path)
    hash_ahead(path)
    path.write_bytes(path.read_bytes() + b"more")
    assert sha256_of(path) == digest(path) != before


def test_the_weights_of_a_peft_folder_and_its_parts(tmp_path):
    paths = [
        write_simple(tmp_path / part / "adapter_model.safetensors", {"a": length})
        for part, length in (("", 3), ("unet", 4))
    ]
    write_simple(tmp_path / "other.safetensors", {"a": 5})
    before = set(hashing._ahead)
    hash_ahead(tmp_path)
    assert len(set(hashing._ahead) - before) == 2
    assert [sha256_of(path) for path in paths] == [digest(path) for path in paths]


@pytest.mark.parametrize("entry", ["", "model.safetensors.index.json"])
def test_the_shards_of_a_transformers_folder(tmp_path, entry):
    """Those the index names, and no other file; one broken index hides nothing of the rest."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder = tmp_path / "sharded"
    folder.mkdir()
    paths = [write_simple(folder / name, {name[6:11]: 3}) for name in names]
    write_simple(folder / "model.fp16.safetensors", {"a": 3})
    index = {"weight_map": {name[6:11]: name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    plain = write_simple(tmp_path / "plain" / "model.safetensors", {"a": 7})
    before = set(hashing._ahead)
    hash_ahead(folder / entry, broken, plain.parent)
    assert len(set(hashing._ahead) - before) == 3
    assert [sha256_of(path) for path in (*paths, plain)] == [digest(p) for p in (*paths, plain)]


@pytest.mark.parametrize("source", ["", "missing", "owner/repo", "hf://owner/repo", "."])
def test_anything_else_is_left_alone(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    before = dict(hashing._ahead)
    hash_ahead(source)
    assert hashing._ahead == before


def test_a_file_that_vanished_is_an_error_when_asked_for(tmp_path):
    path = write_simple(tmp_path / "a.safetensors", {"a": 3})
    hash_ahead(path)
    path.unlink()
    with pytest.raises(UsageError, match=r"a\.safetensors: cannot be read"):
        sha256_of(path)


def test_released_pages_are_read_again(tmp_path):
    path = write_simple(tmp_path / "a.safetensors", {"a": 5000, "b": 70})
    opened = open_checkpoint(path)
    opened.release()  # nothing is mapped yet
    views = {name: opened[name].numpy() for name in opened}
    opened.release()
    for name, view in views.items():
        assert np.array_equal(view, np.arange(len(view), dtype=np.float32)), name
