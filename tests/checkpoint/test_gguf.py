"""GGUF files: agreement with the gguf package, hostile headers, rewriting byte for byte."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.checkpoint import Deferred, Limits, open_checkpoint
from peftsurgery.checkpoint.ggml import DENSE, TYPES
from peftsurgery.checkpoint.gguf import GGUFCheckpoint, GGUFTensor
from peftsurgery.checkpoint.gguf_saving import save_gguf
from peftsurgery.errors import (
    CheckFailed,
    PeftSurgeryError,
    UnsafeInputError,
    UnsupportedError,
    UsageError,
)

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, dims: Sequence[int] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    """An entry as it is stored, innermost dimension first."""
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def raw_gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    number, keyed = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, number, keyed) + b"".join((*keys, *tensors))
    return head + b"\0" * (-len(head) % alignment) + data


def opened(folder: Path, raw: bytes, **limits: int) -> GGUFCheckpoint:
    file = folder / "file.gguf"
    file.write_bytes(raw)
    found = open_checkpoint(file, limits=Limits(**limits))
    assert isinstance(found, GGUFCheckpoint)
    return found


ONE = tensor("a")
SIXTEEN = bytes(range(16))


def written(path: Path, rng: np.random.Generator, *, architecture: str = "llama") -> Path:
    """Tensors of several types and ranks, keys of every type."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("näme")
    writer.add_uint8("k.u8", 200)
    writer.add_int16("k.i16", -3)
    writer.add_float64("k.f64", 0.1)
    writer.add_bool("k.bool", True)
    writer.add_array("k.numbers", [3, 5, 7])
    writer.add_array("k.words", ["a", "bc", ""])
    writer.add_string("tokenizer.chat_template", "x" * 10_000)
    writer.add_head_count(4)
    for name, shape, kind in (
        ("plain.weight", (3, 64), "F32"),
        ("half.weight", (5, 32), "F16"),
        ("brain.weight", (2, 3, 32), "BF16"),
        ("norm.weight", (7,), "F32"),
        ("ids", (3,), "I32"),
        ("four.weight", (6, 64), "Q4_0"),
        ("deep.weight", (2, 3, 256), "Q6_K"),
        ("vector.weight", (512,), "Q8_0"),
    ):
        if kind in ("F32", "I32"):
            dtype = np.float32 if kind == "F32" else np.int32
            writer.add_tensor(name, rng.integers(-9, 9, shape).astype(dtype))
            continue
        block, size = GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        stored = (*shape[:-1], shape[-1] // block * size)
        raw = rng.integers(0, 256, stored, dtype=np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_agrees_with_the_package(tmp_path: Path, np_rng: np.random.Generator) -> None:
    path = written(tmp_path / "m.gguf", np_rng)
    mine = open_checkpoint(path)
    theirs = gguf.GGUFReader(path)
    assert isinstance(mine, GGUFCheckpoint)
    assert (mine.kind, mine.architecture) == ("gguf", "llama")
    assert list(mine) == [t.name for t in theirs.tensors]
    for other in theirs.tensors:
        own = mine[other.name]
        assert own.file_range() == (other.data_offset, other.data_offset + other.n_bytes)
        assert bytes(own.read()) == other.data.tobytes()
        logical = tuple(int(dim) for dim in reversed(other.shape))
        if other.tensor_type.name in DENSE:
            assert (own.dtype, own.shape) == (other.tensor_type.name, logical)
        else:
            assert isinstance(own, GGUFTensor)
            assert (own.ggml_type, own.weight_shape) == (other.tensor_type.name, logical)
            assert (own.dtype, own.shape) == ("U8", other.data.shape)
    known = mine.header.values
    for name, field in theirs.fields.items():
        if name in known and field.types:
            value = field.contents()
            assert known[name] == (tuple(value) if isinstance(value, list) else value)
    assert known["k.numbers"] == (3, 5, 7)
    assert known["k.bool"] is True
    assert set(mine.header.skipped) == {"k.words", "tokenizer.chat_template"}
    assert mine.metadata["general.name"] == "näme"


def test_sizes_of_types() -> None:
    theirs = {t.value: (t.name, *GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert {code: tuple(kind) for code, kind in TYPES.items()} == theirs


def test_version_two_and_other_alignments(tmp_path: Path) -> None:
    keys = [key("general.alignment", U32, struct.pack("<I", 256))]
    tensors = [tensor("a"), tensor("b", (2, 2), 0, 256)]
    data = SIXTEEN + b"\0" * 240 + SIXTEEN
    found = opened(tmp_path, raw_gguf(keys, tensors, data, version=2, alignment=256))
    assert found.header.version == 2
    assert found["b"].begin % 256 == 0
    assert found["b"].shape == (2, 2)
    assert bytes(found["b"].read()) == SIXTEEN


def test_known_by_its_bytes_and_alone_in_a_folder(tmp_path: Path) -> None:
    raw = raw_gguf((), (ONE,), SIXTEEN)
    (tmp_path / "model").write_bytes(raw)
    assert open_checkpoint(tmp_path / "model").kind == "gguf"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.gguf").write_bytes(raw)
    assert list(open_checkpoint(folder)) == ["a"]
    (folder / "y.gguf").write_bytes(raw)
    with pytest.raises(UsageError, match=r"give the path of one"):
        open_checkpoint(folder)


def test_original_shape_of_comfy(tmp_path: Path) -> None:
    def shaped(*dims: int) -> bytes:
        value = struct.pack(f"<IQ{len(dims)}i", 5, len(dims), *dims)
        return raw_gguf(
            [key("comfy.gguf.orig_shape.a", ARRAY, value)], [tensor("a", (256, 3), 8)], bytes(816)
        )

    found = opened(tmp_path, shaped(4, 12, 4, 4))["a"]
    assert isinstance(found, GGUFTensor)
    assert (found.weight_shape, found.shape) == ((4, 12, 4, 4), (3, 272))
    for wrong in ((4, 12, 4, 5), (-4, -12, 16), ()):
        with pytest.raises(UnsafeInputError, match="original shape"):
            opened(tmp_path, shaped(*wrong))


def test_slices_of_a_stack(tmp_path: Path, np_rng: np.random.Generator) -> None:
    found = open_checkpoint(written(tmp_path / "m.gguf", np_rng))
    stack, plain = found["deep.weight"], found["brain.weight"]
    piece = found["deep.weight[1]"]
    assert isinstance(piece, GGUFTensor)
    assert (piece.weight_shape, piece.name) == ((3, 256), "deep.weight[1]")
    assert bytes(piece.read()) == bytes(stack.read())[stack.nbytes // 2 :]
    assert np.array_equal(found["brain.weight[0]"].numpy(), plain.numpy()[0], equal_nan=True)
    for missing in ("deep.weight[2]", "norm.weight[0]", "nothing[0]", "nothing"):
        with pytest.raises(KeyError):
            found[missing]


HOSTILE = {
    "many tensors": (raw_gguf(counts=(10**18, 0)), "tensors, at most"),
    "many keys": (raw_gguf(counts=(0, 10**18)), "keys, at most"),
    "long string": (raw_gguf([text("k" * 9)], counts=(0, 1))[:24] + b"\xff" * 40, "more than"),
    "strings that cannot be": (
        raw_gguf([key("k", ARRAY, struct.pack("<IQ", STRING, 2**60))]),
        "more than the file can hold",
    ),
    "numbers that cannot be": (
        raw_gguf([key("k", ARRAY, struct.pack("<IQ", U32, 2**60))]),
        "header_bytes",
    ),
    "nested array": (raw_gguf([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "array of arrays"),
    "unknown value": (raw_gguf([key("k", 77, b"")]), "type 77"),
    "odd truth": (raw_gguf([key("k", 7, b"\x02")]), "truth value of 2"),
    "key twice": (raw_gguf([key("k", 0, b"\1"), key("k", 0, b"\2")]), "occurs twice"),
    "key of control": (raw_gguf([key("k\x1b", 0, b"\1")]), "control character"),
    "key not text": (raw_gguf([key(b"\xff\xfe", 0, b"\1")]), "not UTF-8"),
    "alignment 0": (raw_gguf([key("general.alignment", U32, bytes(4))]), "power of two"),
    "alignment 24": (
        raw_gguf([key("general.alignment", U32, struct.pack("<I", 24))]),
        "power of two",
    ),
    "alignment of text": (raw_gguf([key("general.alignment", STRING, text("32"))]), "power of two"),
    "tensor twice": (raw_gguf((), (ONE, ONE), SIXTEEN), "this name"),
    "tensor is a path": (raw_gguf((), (tensor("../a"),), SIXTEEN), "file path"),
    "tensor without a name": (raw_gguf((), (tensor(""),), SIXTEEN), "empty"),
    "five dimensions": (raw_gguf((), (tensor("a", (1, 1, 1, 1, 4)),), SIXTEEN), "dimensions"),
    "a dimension too large": (raw_gguf((), (tensor("a", (2**40,)),), SIXTEEN), "dimension of"),
    "hidden behind 0": (raw_gguf((), (tensor("a", (2**31, 2**31, 0)),), b""), "empty shape"),
    "unknown type": (raw_gguf((), (tensor("a", (4,), 99),), SIXTEEN), "type 99"),
    "removed type": (raw_gguf((), (tensor("a", (32,), 4),), SIXTEEN), "type 4"),
    "half a block": (raw_gguf((), (tensor("a", (48, 2), 2),), bytes(54)), "multiple of 32"),
    "a scalar of blocks": (raw_gguf((), (tensor("a", (), 2),), bytes(18)), "multiple of 32"),
    "off the alignment": (
        raw_gguf((), (ONE, tensor("b", offset=16)), SIXTEEN * 2),
        "not a multiple of 32",
    ),
    "overlap": (raw_gguf((), (tensor("a", (16,)), tensor("b", offset=32)), bytes(64)), "overlaps"),
    "same place": (raw_gguf((), (ONE, tensor("b")), bytes(32)), "overlaps"),
    "hole": (raw_gguf((), (ONE, tensor("b", offset=64)), bytes(80)), "lie between"),
    "hole before": (raw_gguf((), (tensor("a", offset=32),), bytes(48)), "lie between"),
    "trailing": (raw_gguf((), (ONE,), SIXTEEN + bytes(32)), "trail behind"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path: Path, case: str) -> None:
    raw, message = HOSTILE[case]
    with pytest.raises(UnsafeInputError, match=message) as caught:
        opened(tmp_path, raw)
    assert "file.gguf" in str(caught.value)


def test_limits(tmp_path: Path) -> None:
    raw = raw_gguf([key("k", STRING, text("v" * 500))], (ONE, tensor("b", offset=32)), bytes(48))
    assert len(opened(tmp_path, raw)) == 2
    for limits in ({"tensors": 1}, {"header_bytes": 400}, {"dim": 3}):
        with pytest.raises(UnsafeInputError):
            opened(tmp_path, raw, **limits)
    with pytest.raises(UnsafeInputError, match="characters"):
        opened(tmp_path, raw_gguf((), (tensor("n" * 513),), SIXTEEN))


def test_not_one_we_read(tmp_path: Path) -> None:
    for version, what in ((1, "of version 1"), (4, "of version 4"), (3 << 24, "big-endian")):
        with pytest.raises(UnsupportedError, match=what):
            opened(tmp_path, raw_gguf(version=version))
    split = [key("split.count", 2, struct.pack("<H", 3))]
    with pytest.raises(UnsupportedError, match="one of 3 files"):
        opened(tmp_path, raw_gguf(split, (ONE,), SIXTEEN))
    for raw in (b"", b"GGUF", b"\x80\x02" * 40):
        with pytest.raises(UsageError, match="not a GGUF file"):
            opened(tmp_path, raw)


def test_truncated_anywhere(tmp_path: Path) -> None:
    raw = raw_gguf([key("k", STRING, text("v"))], (ONE, tensor("b", offset=32)), bytes(48))
    assert len(opened(tmp_path, raw)) == 2
    for size in range(24, len(raw)):
        with pytest.raises(PeftSurgeryError):
            opened(tmp_path, raw[:size])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(
        raw_gguf(
            [key("k", ARRAY, struct.pack("<IQ3I", U32, 3, 1, 2, 3)), key("s", STRING, text("v"))],
            (ONE, tensor("b", (32, 2), 8, 32)),
            bytes(100),
        )
    )
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 101))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    try:
        found = opened(folder, bytes(raw))
    except PeftSurgeryError:
        return
    assert all(0 <= t.begin <= t.end <= len(raw) for t in found.values())


def test_opens_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf((), (ONE,), SIXTEEN))
    code = (
        "import sys; from peftsurgery.checkpoint import open_checkpoint; "
        f"open_checkpoint({str(path)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# writing ------------------------------------------------------------------------------------------


def test_rewrites_byte_for_byte(tmp_path: Path, np_rng: np.random.Generator) -> None:
    source = written(tmp_path / "m.gguf", np_rng)
    like = open_checkpoint(source)
    assert isinstance(like, GGUFCheckpoint)
    out = save_gguf(tmp_path / "same.gguf", like, {})
    assert out.read_bytes() == source.read_bytes()
    out = save_gguf(tmp_path / "alike.gguf", like, dict(like))
    assert out.read_bytes() == source.read_bytes()


def test_replaces_tensors_and_nothing_else(tmp_path: Path, np_rng: np.random.Generator) -> None:
    source = written(tmp_path / "m.gguf", np_rng)
    like = open_checkpoint(source)
    assert isinstance(like, GGUFCheckpoint)
    four = np_rng.integers(0, 256, like["four.weight"].shape, dtype=np.uint8)
    plain = np_rng.standard_normal((3, 64)).astype(np.float32)
    piece = np_rng.integers(0, 256, (3, 210), dtype=np.uint8)
    changes = {
        "plain.weight": plain,
        "four.weight": Deferred("U8", four.shape, lambda: iter((four[:2], four[2:])), (source,)),
        "deep.weight[1]": piece,
    }
    save_gguf(tmp_path / "new.gguf", like, changes)
    expected = bytearray(source.read_bytes())
    for name, value in (("plain.weight", plain), ("four.weight", four), ("deep.weight[1]", piece)):
        expected[like[name].begin : like[name].end] = value.tobytes()
    assert (tmp_path / "new.gguf").read_bytes() == bytes(expected)
    again = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "new.gguf").tensors}
    assert np.array_equal(again["plain.weight"], plain)
    assert np.array_equal(again["deep.weight"][1], piece)


def test_saving_refuses(tmp_path: Path, np_rng: np.random.Generator) -> None:
    source = written(tmp_path / "m.gguf", np_rng)
    like = open_checkpoint(source)
    assert isinstance(like, GGUFCheckpoint)
    target = tmp_path / "new.gguf"
    seven = np.zeros(7, np.float32)
    stack = np.zeros((2, 3, 210), np.uint8)
    short = Deferred("F32", (7,), lambda: iter((seven[:5],)))
    for changes, error, message in (
        ({"other": seven}, UsageError, "no tensor 'other'"),
        ({"norm.weight": seven.astype(np.float16)}, UsageError, "the file holds F32"),
        ({"norm.weight": seven[:6]}, UsageError, r"the file holds F32 \[7\]"),
        ({"deep.weight": stack, "deep.weight[0]": stack[0]}, UsageError, "share bytes"),
        ({"norm.weight": short}, CheckFailed, "gave 20 bytes, 28"),
    ):
        with pytest.raises(error, match=message):
            save_gguf(target, like, changes)
        assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    with pytest.raises(UsageError, match="is an input"):
        save_gguf(source, like, {"norm.weight": seven}, overwrite=True)
    target.write_bytes(b"old")
    with pytest.raises(UsageError, match="exists"):
        save_gguf(target, like, {"norm.weight": seven})
    save_gguf(target, like, {"norm.weight": seven}, overwrite=True)
    assert target.stat().st_size == source.stat().st_size
