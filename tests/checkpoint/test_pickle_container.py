"""Attacks on the zip container of a torch pickle, and random damage to the whole."""

from __future__ import annotations

import pickletools
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftsurgery.errors import PeftSurgeryError, UnsafeInputError
from tests.checkpoint.build import opened, refusal, rezip, root, saved


@pytest.fixture
def simple(tmp_path) -> Path:
    return saved(tmp_path / "a.pt", {"w": torch.arange(4.0)})


def test_rezip_alone_changes_nothing(simple):
    assert opened(rezip(simple, {}))["w"].numpy().tolist() == [0, 1, 2, 3]


def test_unknown_members(simple):
    assert "'a/evil.py'" in refusal(rezip(simple, {"a/evil.py": b"x"}))


def test_second_root_with_a_second_pickle(simple):
    assert "one folder with one data.pkl" in refusal(rezip(simple, {"b/data.pkl": b"}."}))


def test_second_pickle_below_the_root(simple):
    assert "'a/data/data.pkl'" in refusal(rezip(simple, {"a/data/data.pkl": b"}."}))


def test_missing_pickle(simple):
    assert "one folder with one data.pkl" in refusal(rezip(simple, {"a/data.pkl": None}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members(simple):
    with zipfile.ZipFile(simple, "a") as archive:
        archive.writestr("a/data.pkl", b"}.")
    assert "holds 'a/data.pkl' twice" in refusal(simple)


def test_compressed_members(simple):
    assert "is compressed" in refusal(rezip(simple, {}, compression=zipfile.ZIP_DEFLATED))


def test_big_endian(simple):
    assert "byteorder 'big'" in refusal(rezip(simple, {"a/byteorder": b"big"}))


def test_comment(simple):
    with zipfile.ZipFile(simple, "a") as archive:
        archive.comment = b"polyglot"
    assert "carries a comment" in refusal(simple)


def test_prefix(simple):
    data = simple.read_bytes()
    simple.write_bytes(data[:100] + data)
    with pytest.raises(UnsafeInputError):
        opened(simple)


def patch_directory(path: Path, member: str, offset: int, value: bytes) -> None:
    """Overwrite bytes of the member's central directory record, `offset` bytes into it."""
    data = bytearray(path.read_bytes())
    at = data.rindex(member.encode()) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    data[at + offset : at + offset + len(value)] = value
    path.write_bytes(data)


def test_encrypted_flag(simple):
    rezip(simple, {})
    patch_directory(simple, "a/data.pkl", 8, b"\x01")
    assert "'a/data.pkl' is encrypted" in refusal(simple)


def test_local_header_differs(simple):
    rezip(simple, {})
    data = simple.read_bytes()
    simple.write_bytes(data.replace(b"a/data.pkl", b"a/data.pkk", 1))
    assert "differs between its own header and the directory" in refusal(simple)


def test_wrong_checksum_of_the_pickle(simple):
    rezip(simple, {})
    patch_directory(simple, "a/data.pkl", 16, b"\x00\x01\x02\x03")
    assert "does not match its checksum" in refusal(simple)


def test_overlapping_members(simple):
    rezip(simple, {"a/data/1": bytes(16)})
    data = simple.read_bytes()
    target = zipfile.ZipFile(simple).getinfo("a/data/0")
    patch_directory(simple, "a/data/1", 42, struct.pack("<I", target.header_offset))
    assert "differs between" in refusal(simple)  # its local header is that of data/0
    simple.write_bytes(data)
    patch_directory(simple, "a/data/0", 20, struct.pack("<II", 100, 100))
    assert "overlaps another" in refusal(simple)


def test_name_cut_at_nul(simple):
    rezip(simple, {"a/data.pkl": None, "a/data.pkx.txt": b"}."})
    data = simple.read_bytes().replace(b"a/data.pkx.txt", b"a/data.pkl\0txt")
    simple.write_bytes(data)
    with pytest.raises(UnsafeInputError):
        opened(simple)


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_files_are_read_or_refused_never_anything_else(tmp_path, data):
    path = tmp_path / "a.pt"
    state = {"w": torch.arange(6.0).reshape(2, 3).t(), "v": torch.nn.Parameter(torch.zeros(2))}
    saved(path, {"state_dict": state, "step": 1})
    name = f"{root(path)}/data.pkl"
    inner = data.draw(st.booleans())
    raw = bytearray(zipfile.ZipFile(path).read(name) if inner else path.read_bytes())
    opcodes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw) - 1))
        stop = start + data.draw(st.integers(0, 3))
        raw[start:stop] = data.draw(st.sampled_from(opcodes) | st.binary(max_size=3))
    if inner:
        rezip(path, {name: bytes(raw)})
    else:
        path.write_bytes(raw)
    try:
        found = opened(path)
    except PeftSurgeryError:
        return
    for lazy in found.values():
        assert len(lazy.read()) == lazy.nbytes
