"""The strict header reader against the safetensors library: equal on good files, never laxer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftsurgery.checkpoint import Limits, open_checkpoint, parse_header, read_header
from peftsurgery.checkpoint.dtypes import BITS, TORCH_NAMES, WIDENED, float8_table
from peftsurgery.checkpoint.header import name_problem
from peftsurgery.errors import PeftSurgeryError, UnsafeInputError, UnsupportedError, UsageError
from tests.checkpoint.build import entry, raw_file
from tests.counting import calls

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
names = st.text(st.sampled_from("abcxyz019._-é/ 語"), min_size=1, max_size=12).filter(
    lambda name: name_problem(name) is None
)
shapes = st.lists(st.integers(0, 4), max_size=4)
TORCH_DTYPES = [getattr(torch, name) for dtype, name in TORCH_NAMES.items() if dtype != "F4"]


def random_tensor(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    size = dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, size), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)


def accepts(data: bytes, path: Path) -> bool:
    path.write_bytes(data)
    try:
        with open(path, "rb", buffering=0) as file:
            read_header(file, where="mutated")
    except PeftSurgeryError:
        return False
    return True


def library_accepts(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except BaseException:  # a Rust panic is a BaseException
        return False
    return True


@quick
@given(
    st.dictionaries(names, st.tuples(shapes, st.sampled_from(TORCH_DTYPES)), max_size=6),
    st.dictionaries(st.text(max_size=5).filter(str.isprintable), st.text(max_size=20), max_size=3),
)
def test_agrees_with_the_library_on_what_it_writes(tmp_path, specs, metadata):
    tensors = {name: random_tensor(*spec) for name, spec in specs.items()}
    path = tmp_path / "a.safetensors"
    # with {} for both, safetensors 0.8 writes a header that it does not read itself
    safetensors.torch.save_file(tensors, path, metadata or None)
    ours = open_checkpoint(path)
    assert ours.metadata == metadata
    assert ours.keys() == tensors.keys()
    for name, theirs in tensors.items():
        mine = ours[name]
        assert mine.shape == tuple(theirs.shape)
        assert TORCH_NAMES[mine.dtype] == str(theirs.dtype).removeprefix("torch.")
        assert bytes(mine.read()) == theirs.reshape(-1).view(torch.uint8).numpy().tobytes()
        loaded = mine.torch()
        assert loaded.dtype == theirs.dtype
        assert loaded.shape == theirs.shape
        if mine.dtype in WIDENED:
            expected = theirs.float().numpy()
            np.testing.assert_array_equal(mine.numpy(), expected)
        else:
            assert mine.numpy().tobytes() == bytes(mine.read())
            assert mine.numpy().shape == mine.shape


TOKENS = [
    b"0", b"1", b"-0", b"-1", b"1e0", b"1.0", b"true", b"null", b"[]", b"{}", b"[0]", b'""',
    b'"F32"', b'"a"', b'"F4"', b",", b":", b"{", b"}", b"[", b"]", b'"', b" ", b"\n", b"\x00",
    b"\xff", b"NaN", b'"__metadata__"', b"18446744073709551616", b"2147483648", b'"\\ud800"',
    b'"data_offsets"', b"\\", b'"x":{"dtype":"U8","shape":[0],"data_offsets":[8,8]},', b"4", b"8",
    b"[0,8]", b'"dtype":"I64",',
]  # fmt: skip


@settings(quick, max_examples=400)
@given(data=st.data())
def test_never_accepts_what_the_library_refuses(tmp_path, data):
    header = {
        "__metadata__": {"a": "b"},
        "a": entry("F32", [2], [0, 8]),
        "b": entry("F4", [3, 2], [8, 11]),
        "c": entry("U8", [0, 3], [11, 11]),
        "d": entry("BF16", [], [11, 13]),
    }
    raw = bytearray(json.dumps(header, separators=(",", ":")).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        stop = min(len(raw), start + data.draw(st.integers(0, 4)))
        raw[start:stop] = data.draw(st.sampled_from(TOKENS) | st.binary(max_size=3))
    mutated = raw_file(bytes(raw), bytes(data.draw(st.sampled_from([13, 13, 13, 12, 14]))))
    if accepts(mutated, tmp_path / "m.safetensors"):
        assert library_accepts(mutated), bytes(raw)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 20) | st.floats() | st.sampled_from(["F32", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(quick, max_examples=300)
@given(
    dtype=st.sampled_from([*BITS, "F128", "f32"]) | values,
    shape=st.lists(st.integers(-1, 5) | st.sampled_from([2**31, 2**63, 0]), max_size=4) | values,
    offsets=st.lists(st.integers(-1, 24), min_size=1, max_size=3) | values,
    payload=st.integers(0, 24),
)
def test_never_accepts_an_entry_the_library_refuses(tmp_path, dtype, shape, offsets, payload):
    data = raw_file(
        {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(payload)
    )
    if accepts(data, tmp_path / "m.safetensors"):
        assert library_accepts(data)


def test_every_dtype_of_the_library_and_no_other(tmp_path):
    for dtype in [*BITS, "C128", "F8", "F8_E4M3FN", "f32", "F6", "U4"]:
        for nbytes in range(1, 65):
            data = raw_file({"a": entry(dtype, [8], [0, nbytes])}, bytes(nbytes))
            assert accepts(data, tmp_path / "a.safetensors") == library_accepts(data), (
                dtype,
                nbytes,
            )


def refusal(header: object, payload: int = 8, **limits: int) -> str:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(UnsafeInputError) as caught:
        parse_header(raw, payload, where="some.safetensors", limits=Limits(**limits))
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith("some.safetensors: ")
    return str(caught.value)


E = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
FLAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "payload", "expected"),
    [
        (f' {{"a":{E}}}'.encode(), 8, "does not start with '{'"),
        (b"[]", 0, "does not start with '{'"),
        (f'{{"a":{E}}}x'.encode(), 8, "not valid JSON"),
        (f'{{"\xff":{E}}}'.encode("latin-1"), 8, "not valid UTF-8 at byte 2"),
        (b'{"a":' + b"[" * 100_000, 8, "nested too deep"),
        (b'{"a":' + b"9" * 5000 + b"}", 8, "not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8, "NaN is not JSON"),
        (f'{{"a":{E},"a":{E}}}'.encode(), 8, "'a' occurs twice"),
        (b'{"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,8]}}', 8, "'shape'"),
        (b'{"__metadata__":{"k":"1","k":"2"}}', 0, "'k' occurs twice"),
        (b'{"__metadata__":{},"__metadata__":{}}', 0, "'__metadata__' occurs twice"),
        ({"__metadata__": {"k": 1}}, 0, "'k' is int, text was expected"),
        ({"__metadata__": None}, 0, "an object was expected"),
        ({"__metadata__": {"k": "\ud800"}}, 0, "surrogate"),
        ({"__metadata__": {"k": "x" * 8_000_000}}, 0, "8000001 bytes, at most 8000000"),
        ({"": entry()}, 8, "the name is empty"),
        ({"a" * 513: entry()}, 8, "513 characters"),
        ({"a\x00b": entry()}, 8, "control character U+0000"),
        ({"a\x1b[31m": entry()}, 8, "control character U+001B"),
        ({"a\x7f": entry()}, 8, "control character U+007F"),
        ({"a\u202eb": entry()}, 8, "control character U+202E"),
        ({"\ud800": entry()}, 8, "control character U+D800"),
        ({"../../etc/passwd": entry()}, 8, "file path"),
        ({"a/../b": entry()}, 8, "file path"),
        ({"/etc/passwd": entry()}, 8, "file path"),
        ({"a\\b": entry()}, 8, "file path"),
        ({"C:x": entry()}, 8, "file path"),
        ({"a": "text"}, 8, "expected the fields"),
        ({"a": ["F32", [2], [0, 8]]}, 8, "expected the fields"),
        ({"a": {**entry(), "extra": 1}}, 8, "'extra'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "expected the fields"),
        ({"a": entry("F33")}, 8, "unknown dtype 'F33'"),
        ({"a": {**entry(), "dtype": 1}}, 8, "unknown dtype int"),
        ({"a": entry(shape=2)}, 8, "a list was expected"),
        ({"a": entry(shape=[2] * 9)}, 8, "9 dimensions, at most 8"),
        ({"a": entry(shape=[-2])}, 8, "whole numbers from 0"),
        ({"a": entry(shape=[2.0])}, 8, "whole numbers from 0"),
        ({"a": entry(shape=[True])}, 8, "whole numbers from 0"),
        (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0, "whole numbers from 0"),
        ({"a": entry(shape=[2**31 + 1, 0], offsets=[0, 0])}, 0, "dimension of 2147483649"),
        ({"a": entry(shape=[2**20, 2**20, 0], offsets=[0, 0])}, 0, "hides dimensions"),
        ({"a": entry(offsets=[8, 0])}, 8, "not two whole numbers"),
        ({"a": entry(offsets=[-8, 0])}, 8, "not two whole numbers"),
        ({"a": entry(offsets=[0, 8, 8])}, 8, "not two whole numbers"),
        ({"a": entry(offsets=[0, 8.0])}, 8, "not two whole numbers"),
        ({"a": entry(shape=[3])}, 8, "takes 12 bytes, data_offsets hold 8"),
        ({"a": entry("F4", [3], [0, 2])}, 2, "takes 1.5 bytes"),
        ({"a": FLAT, "b": FLAT}, 4, "'b': overlaps 'a'"),
        ({"a": entry(), "b": entry("F32", [1], [4, 8])}, 8, "'b': overlaps 'a'"),
        ({"a": entry("F32", [1], [4, 8])}, 8, "a hole of 4 bytes lies between it and the start"),
        ({"a": FLAT, "b": entry("F32", [1], [8, 12])}, 12, "4 bytes lies between it and 'a'"),
        ({"a": entry()}, 9, "1 bytes trail behind"),
        ({}, 1, "1 bytes trail behind"),
    ],
)  # fmt: skip
def test_refused_by_its_own_message(header, payload, expected):
    assert expected in refusal(header, payload)


def test_limits_can_be_tightened():
    header = {"a": FLAT, "b": entry("F32", [1], [4, 8])}
    assert "2 tensors, at most 1" in refusal(header, tensors=1)
    assert "dimension of 1, at most 0" in refusal(header, dim=0)
    assert "1 characters, at most 0" in refusal(header, name_chars=0)
    assert "far more than 0 tensors" in refusal(header, tensors=0, metadata_bytes=0)
    assert parse_header(json.dumps(header).encode(), 8, where="x").tensors["b"].begin == 4


def test_ordinary_odd_names_pass():
    for name in ["a..b", "a.b.0.c", "...", "a/b", "unet:x", "<token>", "語", "a b", "x" * 512]:
        assert name_problem(name) is None, name


def test_header_over_the_limit_and_over_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    with pytest.raises(UnsafeInputError, match=r"a header of 100000001 bytes, at most 100000000"):
        open_checkpoint(path)
    path.write_bytes((50).to_bytes(8, "little") + b"{}")
    with pytest.raises(UsageError, match=r"truncated inside the header \(2 of 50 bytes\)"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a safetensors file"),
        (b"abc", "not a safetensors file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04" + bytes(40), "a zip archive"),
    ],
)
def test_not_safetensors_is_a_usage_error(tmp_path, content, expected):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.safetensors") as caught:
        open_checkpoint(path)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2


def test_truncated_payload_says_how_much_is_missing(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(100, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UsageError, match="truncated, 30 of 400 payload bytes"):
        open_checkpoint(path)


@pytest.mark.parametrize("dtype", sorted(WIDENED - {"BF16"}))
def test_float8_tables_are_torch_own(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(getattr(torch, TORCH_NAMES[dtype])).float().numpy()
    np.testing.assert_array_equal(float8_table(dtype), expected)
    assert (np.signbit(float8_table(dtype)) == np.signbit(expected))[~np.isnan(expected)].all()


def test_sub_byte_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {
        "f4": entry("F4", [2, 8], [0, 8]),
        "odd": entry("F4", [2, 1], [8, 9]),
        "f6": entry("F6_E2M3", [4], [9, 12]),
    }
    path.write_bytes(raw_file(header, bytes(range(12))))
    ours = open_checkpoint(path)
    with safetensors.safe_open(path, "pt") as theirs:
        expected = theirs.get_tensor("f4")
    assert ours["f4"].torch().dtype == expected.dtype
    assert ours["f4"].torch().shape == expected.shape == (2, 4)
    assert bytes(ours["f4"].read()) == bytes(range(8))
    assert bytes(ours["f4"].rows(1, 2).read()) == bytes(range(4, 8))
    for name in ("odd", "f6"):
        with pytest.raises(UnsupportedError, match=name):
            ours[name].torch()
    with pytest.raises(UnsupportedError, match="F6_E2M3"):
        ours["f6"].numpy()
    with pytest.raises(UsageError, match="do not end on a byte"):
        ours["odd"].rows(0, 1)


def test_three_thousand_tensors_open_quickly(tmp_path):
    """A fixed number of calls for each tensor."""
    table = {
        f"model.blocks.{i}.attention.weight": entry("F32", [1], [4 * i, 4 * i + 4])
        for i in range(3000)
    }
    raw = json.dumps(table).encode()
    assert len(parse_header(raw, 12_000, where="x").tensors) == 3000
    assert calls(lambda: parse_header(raw, 12_000, where="x")) < 30 * 3000
