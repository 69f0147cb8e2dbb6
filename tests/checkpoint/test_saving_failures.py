"""save when it fails or is refused: nothing is left behind, nothing is overwritten."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from peftsurgery.checkpoint import Deferred, LazyTensor, open_checkpoint, save
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from tests.checkpoint.build import entry, raw_file, write_simple


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*raw)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("shard_size", [None, 4000])
def test_no_partial_file(tmp_path, error, shard_size):
    def chunks() -> Iterator[bytes]:
        yield bytes(2_000_000)
        raise error

    target = tmp_path / "out.safetensors"
    tensors = {"a": torch.zeros(1000), "b": Deferred("U8", (4_000_000,), chunks)}
    with pytest.raises(error):
        save(target, tensors, shard_size=shard_size)
    assert list(tmp_path.iterdir()) == []
    target.write_bytes(b"precious")
    with pytest.raises(error):
        save(target, tensors, overwrite=True)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"precious"]


@pytest.mark.parametrize("pieces", [[b"123"], [b"12345"], [], [b"1234", b"5"]])
def test_deferred_of_another_length(tmp_path, pieces):
    with pytest.raises(CheckFailed, match=r"'w' gave \d bytes, 4 were promised"):
        save(tmp_path / "a.safetensors", {"w": Deferred("F32", (), lambda: pieces)})
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path, monkeypatch):
    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UsageError, match=r"a\.safetensors: writing failed: No space left"):
        save(tmp_path / "a.safetensors", {"w": torch.zeros(4)})
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 2)]))
    tensor = torch.randn(500_000)
    found = open_checkpoint(save(tmp_path / "a.safetensors", {"w": tensor})[0])
    assert same(found["w"].torch(), tensor)


def test_synced_before_it_appears(tmp_path, monkeypatch):
    target = tmp_path / "a.safetensors"
    seen = []
    real = os.fsync

    def watched(fd: int) -> None:
        seen.append(target.exists())
        real(fd)

    monkeypatch.setattr(os, "fsync", watched)
    save(target, {"w": torch.zeros(4)})
    assert seen == [False, True]  # the file, then the folder
    save(target, {"w": torch.zeros(4)}, overwrite=True, sync=False)
    assert len(seen) == 2


def test_file_appearing_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "a.safetensors"

    def chunks() -> Iterator[bytes]:
        target.write_bytes(b"someone else's")
        yield bytes(4)

    with pytest.raises(UsageError, match="appeared while writing"):
        save(target, {"w": Deferred("F32", (), chunks)})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"someone else's"]


def test_failure_while_renaming_shards_undoes_the_first(tmp_path):
    last = tmp_path / "model-00002-of-00002.safetensors"

    def chunks() -> Iterator[bytes]:
        last.write_bytes(b"someone else's")
        yield bytes(4)

    tensors = {"a": torch.zeros(1), "b": Deferred("F32", (), chunks)}
    with pytest.raises(UsageError, match="appeared while writing"):
        save(tmp_path / "model.safetensors", tensors, shard_size=4)
    assert list(tmp_path.iterdir()) == [last]


@pytest.mark.parametrize("planted", ["file", "link"])
def test_a_planted_temporary_file_is_neither_followed_nor_removed(tmp_path, monkeypatch, planted):
    monkeypatch.setattr("secrets.token_hex", lambda n: "guessed")
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    trap = tmp_path / ".a.safetensors.guessed.part"
    if planted == "link":
        trap.symlink_to(victim)
    else:
        trap.write_bytes(b"planted")
    with pytest.raises(UsageError, match="cannot be written"):
        save(tmp_path / "a.safetensors", {"w": torch.zeros(1)})
    assert victim.read_bytes() == b"precious"
    assert sorted(tmp_path.iterdir()) == [trap, victim]


def test_mode_follows_the_umask_and_is_not_executable(tmp_path):
    before = os.umask(0o027)
    try:
        path, *_ = save(tmp_path / "a.safetensors", {"w": torch.zeros(1)})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


# --- refused --------------------------------------------------------------------------------------


def test_targets(tmp_path):
    tensors = {"w": torch.zeros(1)}
    target = tmp_path / "a.safetensors"
    save(target, tensors)
    with pytest.raises(UsageError, match="--overwrite"):
        save(target, tensors)
    link = tmp_path / "link.safetensors"
    link.symlink_to(target)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is a symbolic link"):
            save(link, tensors, overwrite=overwrite)
    dangling = tmp_path / "dangling.safetensors"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is a symbolic link"):
        save(dangling, tensors)
    with pytest.raises(UsageError, match="is a folder"):
        save(tmp_path, tensors)
    with pytest.raises(UsageError, match=r"the folder .*missing does not exist"):
        save(tmp_path / "missing/a.safetensors", tensors)


def test_an_input_is_never_the_output(tmp_path):
    source = write_simple(tmp_path / "a.safetensors", {"x": 3})
    lazy = open_checkpoint(source)
    hard = tmp_path / "hard.safetensors"
    os.link(source, hard)
    derived = {"x": Deferred("F32", (3,), lambda: [lazy["x"].read()], sources=(source,))}
    for target in (source, hard, tmp_path / "." / "a.safetensors"):
        for tensors in (lazy, {"y": lazy["x"].rows(0, 1)}, derived):
            with pytest.raises(UsageError, match="is an input of this operation"):
                save(target, tensors, overwrite=True)
    assert len(save(tmp_path / "b.safetensors", derived)) == 1


@pytest.mark.parametrize("name", ["", "../x", "/x", "a\x00", "__metadata__", "unet:x", "x" * 513])
def test_names(tmp_path, name):
    with pytest.raises(UsageError, match="cannot save"):
        save(tmp_path / "a.safetensors", {name: torch.zeros(1)})


def test_metadata_is_text(tmp_path):
    for metadata in ({"a": 1}, {1: "a"}, {"a": "\ud800"}):
        with pytest.raises(UsageError, match="metadata"):
            save(tmp_path / "a.safetensors", {}, metadata)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_values_the_format_does_not_have(tmp_path):
    for value in (
        torch.zeros(2, dtype=torch.complex128),
        torch.eye(3).to_sparse(),
        torch.zeros(2, device="meta"),
        np.zeros(2, np.longdouble),
        np.array(["text"]),
        [1.0, 2.0],
        Deferred("F33", (1,), lambda: []),
    ):
        with pytest.raises(UnsupportedError, match="'w'"):
            save(tmp_path / "a.safetensors", {"w": value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="whole byte"):
        save(tmp_path / "a.safetensors", {"w": Deferred("F4", (3,), lambda: [])})
    with pytest.raises(UsageError, match="9 dimensions"):
        save(tmp_path / "a.safetensors", {"w": torch.zeros([1] * 9)})


def test_changed_input_is_not_copied(tmp_path):
    source = write_simple(tmp_path / "a.safetensors", {"x": 700_000})
    lazy: dict[str, LazyTensor] = dict(open_checkpoint(source))
    source.write_bytes(raw_file({"x": entry("U8", [1], [0, 1])}, b"x"))
    with pytest.raises(UsageError, match="changed since it was opened"):
        save(tmp_path / "b.safetensors", lazy)
    assert [file.name for file in Path(tmp_path).iterdir()] == ["a.safetensors"]
