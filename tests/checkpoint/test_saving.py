"""save: what is written, and that nothing is left behind when it fails."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftsurgery.checkpoint import Deferred, open_checkpoint, save, sha256_of
from peftsurgery.checkpoint.dtypes import BITS, TORCH_NAMES
from peftsurgery.checkpoint.saving import size_in_bytes
from peftsurgery.errors import CheckFailed, UsageError
from tests.checkpoint.build import write_simple

TORCH_DTYPES = [getattr(torch, name) for dtype, name in TORCH_NAMES.items() if dtype != "F4"]


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*raw)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(TORCH_DTYPES)),
        max_size=6,
    ),
    st.dictionaries(st.text('ab語é\n"', min_size=1, max_size=3), st.text("xy\\語\t", max_size=4)),
)
def test_the_library_reads_what_is_written(tmp_path, specs, metadata):
    tensors = {}
    for i, (shape, dtype) in enumerate(specs):
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize))
        raw = raw.to(torch.uint8)
        tensors[f"t.{i}"] = (
            raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
        )
    path = tmp_path / "a.safetensors"
    assert save(path, tensors, metadata, overwrite=True, sync=False) == (path,)
    with safetensors.safe_open(path, "pt") as theirs:
        assert (theirs.metadata() or {}) == metadata
        assert set(theirs.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert same(theirs.get_tensor(name), tensor)
    again = open_checkpoint(path)
    for name, tensor in tensors.items():
        assert same(again[name].torch(), tensor)
        assert (again[name].begin - 8) % (BITS[again[name].dtype] // 8) == 0


def test_order_alignment_and_padding(tmp_path):
    tensors = {
        "b": torch.zeros(3, dtype=torch.uint8),
        "z": torch.zeros(1),
        "a": torch.zeros(1),
        "h": torch.zeros(3, dtype=torch.bfloat16),
        "d": torch.zeros(2, dtype=torch.float64),
    }
    path, *_ = save(tmp_path / "a.safetensors", tensors, {"z": "1", "a": "2"})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert raw[8 : 8 + length].rstrip(b" ").endswith(b"}")
    table = json.loads(raw[8 : 8 + length])
    assert list(table) == ["__metadata__", "d", "z", "a", "h", "b"]
    assert list(table["__metadata__"]) == ["a", "z"]


def test_every_kind_of_source(tmp_path):
    source = write_simple(tmp_path / "in.safetensors", {"x": 700_000, "y": 5, "empty": 0})
    lazy = open_checkpoint(source)
    grid = torch.arange(12.0).reshape(3, 4)

    def chunks() -> Iterator[object]:
        buffer = np.empty(2, np.float32)
        for i in range(2):
            buffer[:] = i  # one buffer, reused
            yield buffer
        yield bytes(4)
        yield bytearray(0)
        yield np.ones((1, 2), np.float32).data
        yield torch.full((1,), 3.0)

    tensors = {
        "lazy": lazy["x"],
        "part": lazy["x"].rows(3, 6),
        "empty": lazy["empty"],
        "transposed": grid.t(),
        "parameter": torch.nn.Parameter(grid.half()),
        "conj": torch.tensor([1 + 2j]).conj(),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "fortran": np.asfortranarray(grid.numpy()),
        "big_endian": np.arange(3, dtype=">i4"),
        "zero_d": np.array(2.5),
        "deferred": Deferred("F32", (2, 4), chunks),  # pyright: ignore[reportArgumentType]
    }
    found = open_checkpoint(save(tmp_path / "out.safetensors", tensors)[0])
    assert found["lazy"].read() == lazy["x"].read()
    assert found["part"].numpy().tolist() == [3, 4, 5]
    assert found["empty"].shape == (0,)
    np.testing.assert_array_equal(found["transposed"].numpy(), grid.t().numpy())
    assert same(found["parameter"].torch(), grid.half())
    assert found["conj"].numpy().tolist() == [1 - 2j]
    assert same(found["scalar"].torch(), torch.tensor(1.5, dtype=torch.bfloat16))
    np.testing.assert_array_equal(found["fortran"].numpy(), grid.numpy())
    assert found["big_endian"].numpy().tolist() == [0, 1, 2]
    assert found["zero_d"].numpy() == 2.5
    assert found["deferred"].numpy().tolist() == [[0, 0, 1, 1], [0, 1, 1, 3]]


def test_packed_float4_keeps_its_bytes(tmp_path):
    packed = torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2)
    ours, *_ = save(tmp_path / "a.safetensors", {"w": packed})
    safetensors.torch.save_file({"w": packed}, tmp_path / "b.safetensors")
    assert open_checkpoint(ours)["w"].shape == (2, 8)
    assert ours.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_lazy_tensors_are_copied_byte_for_byte_in_few_runs(tmp_path, monkeypatch):
    source = tmp_path / "in.safetensors"
    safetensors.torch.save_file({f"w{i}": torch.randn(300_000) for i in range(6)}, source)
    calls = []
    real = os.copy_file_range

    def counted(*arguments: int) -> int:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(os, "copy_file_range", counted)
    checkpoint = open_checkpoint(source)
    checkpoint["w0"].torch().zero_()  # a change of the private map is not a change of the file
    out, *_ = save(tmp_path / "out.safetensors", checkpoint)
    assert sha256_of(out, skip_header=True) == sha256_of(source, skip_header=True)
    assert len(calls) == 1


@pytest.mark.parametrize("failure", ["error", "nothing", "half", "missing"])
def test_copying_without_the_kernel(tmp_path, monkeypatch, failure):
    source = tmp_path / "in.safetensors"
    safetensors.torch.save_file({f"w{i}": torch.randn(300_000) for i in range(3)}, source)
    real = os.copy_file_range
    calls = []

    def broken(fd: int, target: int, count: int, offset: int) -> int:
        calls.append(count)
        if failure == "error":
            raise OSError(errno.EXDEV, "cross-device")
        if failure == "half" and len(calls) == 1:
            return real(fd, target, count // 2 + 1, offset)
        return 0

    if failure == "missing":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", broken)
    out, *_ = save(tmp_path / "out.safetensors", {"s": torch.ones(1), **open_checkpoint(source)})
    assert bool(calls) == (failure != "missing")
    expected = open_checkpoint(source)
    found = open_checkpoint(out)
    assert all(found[name].read() == tensor.read() for name, tensor in expected.items())


def test_deterministic(tmp_path):
    tensors = {"a": torch.randn(5), "b": torch.randn(2).half()}
    one, *_ = save(tmp_path / "1.safetensors", tensors, {"x": "1", "y": "2"})
    two, *_ = save(tmp_path / "2.safetensors", tensors, {"y": "2", "x": "1"})
    assert one.read_bytes() == two.read_bytes()


def test_pickled_tensors_are_saved_contiguous(tmp_path):
    state = {"t": torch.randn(3, 4).t(), "c": torch.randn(5)}
    torch.save(state, tmp_path / "a.pt")
    lazy = open_checkpoint(tmp_path / "a.pt", allow_pickle=True)
    found = open_checkpoint(save(tmp_path / "out.safetensors", lazy)[0])
    assert all(same(found[name].torch(), tensor) for name, tensor in state.items())


# --- shards ---------------------------------------------------------------------------------------


def test_shards_and_index(tmp_path):
    tensors = {
        "a": torch.randn(100),
        "b": torch.randn(30).half(),
        "c": torch.randn(50),
        "big": torch.randn(500),
        "d": torch.randn(1).double(),
    }
    total = sum(t.nbytes for t in tensors.values())
    files = save(tmp_path / "model.safetensors", tensors, {"k": "v"}, shard_size=660)
    assert [file.name for file in files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == [file.name for file in files]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == total
    assert list(index["weight_map"]) == sorted(tensors)
    assert index["weight_map"]["c"] == "model-00001-of-00003.safetensors"
    assert index["weight_map"]["big"] == "model-00002-of-00003.safetensors"
    found = open_checkpoint(tmp_path)
    assert found.kind == "transformers"
    assert found.metadata == {"k": "v"}
    assert all(same(found[name].torch(), tensor) for name, tensor in tensors.items())
    assert found.nbytes == total
    with pytest.raises(UsageError, match="exists"):
        save(tmp_path / "model.safetensors", tensors, shard_size=660)
    again = save(
        tmp_path / "model.safetensors", tensors, {"k": "v"}, shard_size=660, overwrite=True
    )
    assert again == files
    with pytest.raises(UsageError, match=r"model-00001-of-00003.* of an earlier save"):
        save(tmp_path / "model.safetensors", tensors, shard_size="1GB", overwrite=True)


def test_shards_into_a_new_folder(tmp_path):
    folder = tmp_path / "out"
    assert save(folder, {"a": torch.zeros(2)}, shard_size="1KB") == (folder / "model.safetensors",)
    files = save(
        tmp_path / "two",
        {"a": torch.zeros(200), "b": torch.zeros(200)},
        shard_size="1KB",
        index_name="diffusion.index.json",
    )
    assert files[-1] == tmp_path / "two/diffusion.index.json"
    bad = {"a": torch.zeros(200), "b": Deferred("F32", (200,), lambda: [b"x"])}
    with pytest.raises(CheckFailed):
        save(tmp_path / "three", bad, shard_size="1KB")
    assert not (tmp_path / "three").exists()


def test_shard_sizes():
    assert size_in_bytes("5GB") == 5 * 10**9
    assert size_in_bytes("1.5 MiB") == 3 * 2**19
    assert size_in_bytes("10B") == size_in_bytes(10) == 10
    for wrong in ("5", "GB", "5XB", "-1GB", "0B", 0, -5):
        with pytest.raises(UsageError):
            size_in_bytes(wrong)
