"""Torch pickles: refused by default, then read without running anything; attacks by name."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.checkpoint.tensors import StridedTensor
from peftsurgery.errors import UnsafeInputError, UsageError
from tests.checkpoint.build import opened, refusal, rezip, root, saved, write_simple


def with_pickle(path: Path, data: bytes) -> Path:
    saved(path, {"w": torch.zeros(4)})
    return rezip(path, {f"{root(path)}/data.pkl": data})


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".PT"])
def test_refused_unless_asked_for(tmp_path, suffix):
    path = saved(tmp_path / f"a{suffix}", {"w": torch.zeros(2)})
    with pytest.raises(UnsafeInputError, match="--allow-pickle") as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 4
    with pytest.raises(UnsafeInputError, match="--allow-pickle"):
        open_checkpoint(tmp_path)
    assert opened(path).kind == "pickle"


def test_reads_what_torch_wrote(tmp_path):
    base = torch.randn(6, 5)
    state = OrderedDict(
        plain=base,
        transposed=base.t(),
        slice=base[1:4, ::2],
        middle=base[2:4],
        parameter=torch.nn.Parameter(torch.randn(3).half()),
        scalar=torch.tensor(3, dtype=torch.int64),
        empty=torch.empty(0, 3),
        flag=torch.tensor([True, False]),
        bf16=torch.randn(4, 4).bfloat16().t(),
        fp8=torch.randn(7).to(torch.float8_e4m3fn),
        u16=torch.tensor([1, 2, 65535], dtype=torch.uint16),
        c64=torch.randn(3, 2, dtype=torch.complex64).t(),
    )
    path = saved(tmp_path / "a.pt", state)
    found = opened(path)
    assert list(found) == list(state)
    for name, expected in state.items():
        mine = found[name].torch()
        assert mine.dtype == expected.dtype, name
        assert mine.shape == expected.shape, name
        raw = expected.detach().contiguous().reshape(-1).view(torch.uint8)
        assert bytes(found[name].read()) == raw.numpy().tobytes(), name
    lazily = {name for name, lazy in found.items() if not isinstance(lazy, StridedTensor)}
    assert lazily == state.keys() - {"transposed", "slice", "bf16", "c64"}
    assert found["plain"].torch().data_ptr() == found["plain"].torch().data_ptr()
    rows = found["transposed"].rows(1, 4)
    np.testing.assert_array_equal(rows.numpy(), base.t()[1:4].numpy())
    np.testing.assert_array_equal(rows.rows(1, 2).numpy(), base.t()[2:3].numpy())


def test_module_state_dict_and_nesting(tmp_path):
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with _metadata
    path = saved(tmp_path / "a.ckpt", {"state_dict": state, "epoch": 3, "note": "x", "none": None})
    found = opened(path)
    assert list(found) == ["weight", "bias"]
    assert found.metadata == {"epoch": "3", "note": "x", "none": "None"}
    assert torch.equal(found["bias"].torch(), state["bias"])
    for protocol in (2, 4, 5):
        torch.save(state, path, pickle_protocol=protocol)
        assert torch.equal(opened(path)["weight"].torch(), state["weight"])


def test_peft_folder_with_a_pickle(tmp_path):
    saved(tmp_path / "adapter_model.bin", {"q.lora_A.weight": torch.ones(2)})
    (tmp_path / "adapter_config.json").write_text('{"r": 1}')
    with pytest.raises(UnsafeInputError, match="--allow-pickle"):
        open_checkpoint(tmp_path)
    found = opened(tmp_path)
    assert found.kind == "peft"
    assert found["q.lora_A.weight"].numpy().tolist() == [1, 1]
    write_simple(tmp_path / "adapter_model.safetensors", {"safe": 1})
    assert list(open_checkpoint(tmp_path)) == ["safe"]


class Exploit:
    def __init__(self, function: object, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_nothing_is_run(tmp_path):
    marker = tmp_path / "pwned"
    path = saved(tmp_path / "a.pt", {"w": Exploit(os.system, f"touch {marker}")})
    assert "system" in refusal(path)
    path = saved(tmp_path / "b.pt", {"w": Exploit(eval, f"open({str(marker)!r}, 'w')")})
    assert "eval" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"cos\nsystem\n.", "'os.system'"),
        (b"cbuiltins\neval\n.", "'builtins.eval'"),
        (b"c__builtin__\ngetattr\n.", "'__builtin__.getattr'"),
        (b"ctorch\nload\n.", "'torch.load'"),
        (b"ctorch.serialization\nload\n.", "'torch.serialization.load'"),
        (b"ctorch._utils\n_rebuild_qtensor\n.", "_rebuild_qtensor"),
        (b"ctorch\nQInt8Storage\n.", "QInt8Storage"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "'os.system'"),
        (b"\x80\x04\x8c\x05torch\x8c\x0bnn.Parallel\x93.", "'torch.nn.Parallel'"),
        (b"\x80\x04K\x01\x8c\x06system\x93.", "a global without a name"),
        (b"(S'touch x'\nios\nsystem\n.", "the opcode INST"),
        (b"(cos\nsystem\nS'x'\no.", "'os.system'"),
        (b"(ccollections\nOrderedDict\no.", "the opcode OBJ"),
        (b"ccollections\nOrderedDict\n)\x81.", "the opcode NEWOBJ"),
        (b"ccollections\nOrderedDict\n)}\x92.", "the opcode NEWOBJ_EX"),
        (b"\x80\x02\x82\x01.", "the opcode EXT1"),
        (b"Pname\n.", "the opcode PERSID"),
        (b"\x80\x04\x8f.", "the opcode EMPTY_SET"),
        (b"\x80\x05\x96\x02\x00\x00\x00\x00\x00\x00\x00ab.", "the opcode BYTEARRAY8"),
        (b"\x80\x03C\x02ab.", "the opcode SHORT_BINBYTES"),
        (b"ccollections\nOrderedDict\n(K\x01K\x02tR.", "a call of OrderedDict"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01tR.", "a call of _rebuild_tensor_v2"),
        (b"ctorch\nFloatStorage\n(K\x01tR.", "a call of FloatStorage"),
        (b"K\x01)R.", "a call of int"),
        (b"ccollections\nOrderedDict\n}b.", "BUILD on collections.OrderedDict"),
        (b"]}b.", "BUILD on list"),
        (b"K\x01Q.", "a persistent id that is not a storage"),
        (
            b"(X\x07\x00\x00\x00storageccollections\nOrderedDict\n"
            b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
            "a persistent id",
        ),
        (b"}(K\x01K\x02u.", "a dictionary key of type int"),
        (b"}(X\x01\x00\x00\x00aK\x02X\x01\x00\x00\x00aK\x03u.", "the key 'a' occurs twice"),
        (b"]K\x01K\x02s.", "items are set on list"),
        (b"}K\x01a.", "items are appended to dict"),
        (b"K\x01K\x02.", "does not end with one value"),
        (b"(K\x01.", "does not end with one value"),
        (b"}.K\x01.", "3 bytes trail behind"),
        (b"R.", "the stack is empty"),
        (b"0.", "the opcode POP"),
        (b"u.", "malformed"),
        (b"h\x05.", "malformed: KeyError"),
        (b"}", "malformed"),
        (b"", "malformed"),
        (b"\xff\xfe.", "malformed"),
        (b"X\xff\xff\xff\x7fab.", "malformed"),
        (b"\x8b\xff\xff\xff\x7f.", "malformed"),
        (b"L" + b"9" * 5000 + b"L\n.", "malformed"),
        (b"(" * 300 + b".", "nested deeper than 256"),
        (b"K\x01.", "a dictionary of tensors was expected, found int"),
        (b"].", "a dictionary of tensors was expected, found list"),
        (b"ccollections\nOrderedDict\n.", "a dictionary of tensors was expected, found Symbol"),
        (b"}X\x01\x00\x00\x00aK\x02s.", "'a' is int, only tensors are accepted"),
        (b"}X\x01\x00\x00\x00a]s.", "'a' is list, only tensors are accepted"),
        (b"}q\x00X\x0a\x00\x00\x00state_dicth\x00s.", 'more than 8 levels of "state_dict"'),
        (
            b"}(X\x0a\x00\x00\x00state_dict}X\x03\x00\x00\x00opt]u.",
            "'opt' beside the state dict is list",
        ),
    ],
)  # fmt: skip
def test_refused_by_its_own_message(tmp_path, data, expected):
    assert expected in refusal(with_pickle(tmp_path / "a.pt", data))


def tensor_pickle(
    name: str = "w",
    key: str = "0",
    numel: int = 4,
    *,
    offset: int = 0,
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    extra: tuple[object, ...] = (),
) -> bytes:
    """data.pkl of {name: one float tensor} with the numbers given, sensible or not."""

    class Pickler(pickle._Pickler):  # pyright: ignore[reportAttributeAccessIssue]
        def persistent_id(self, obj: object) -> object:
            if obj == "THE STORAGE":
                return ("storage", torch.FloatStorage, key, "cpu", numel)
            return None

    value = Exploit(
        _rebuild_tensor_v2,
        *("THE STORAGE", offset, shape, strides, False, OrderedDict(), *extra),
    )
    target = io.BytesIO()
    Pickler(target, protocol=2).dump({name: value})
    return target.getvalue()


def test_tensor_pickle_is_right_when_its_numbers_are(tmp_path):
    path = with_pickle(tmp_path / "a.pt", tensor_pickle(shape=(2, 2), strides=(1, 2)))
    assert opened(path)["w"].shape == (2, 2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"offset": 1}, "reaches outside its storage of 4 elements"),
        ({"offset": -1}, "wrong strides or offset"),
        ({"strides": (-1,)}, "wrong strides or offset"),
        ({"strides": (1, 1)}, "wrong strides or offset"),
        ({"strides": (2,)}, "reaches outside its storage"),
        ({"shape": (5,)}, "reaches outside its storage"),
        ({"shape": (-4,)}, "whole numbers from 0"),
        ({"shape": (2**31, 2**31), "strides": (0, 0)}, "or repeats some of them"),
        ({"shape": (2**40, 0), "strides": (1, 1)}, "a dimension of"),
        ({"shape": (1,) * 9, "strides": (1,) * 9}, "9 dimensions"),
        ({"key": "7"}, "its storage '7' is not in the zip"),
        ({"key": "../version"}, "is not in the zip"),
        ({"numel": 5}, "a storage of 20 bytes was promised, the zip holds 16"),
        ({"numel": -4}, "a persistent id"),
        ({"numel": 2**62}, "was promised, the zip holds 16"),
        ({"name": "../x"}, "file path"),
        ({"name": "a\x1b"}, "control character"),
        ({"extra": ({"conj": True},)}, "a call of _rebuild_tensor_v2"),
        ({"extra": (None, 1)}, "a call of _rebuild_tensor_v2"),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, change, expected):
    path = with_pickle(tmp_path / "a.pt", tensor_pickle(**change))
    assert expected in refusal(path)


def test_sharing_bomb(tmp_path):
    shared = torch.zeros(1000)
    path = saved(tmp_path / "a.pt", {f"w{i}": shared for i in range(200)})
    assert "share" in refusal(path)
    path = saved(tmp_path / "b.pt", {f"w{i}": shared for i in range(30)})
    assert len(opened(path)) == 30


def test_limits(tmp_path):
    path = saved(tmp_path / "a.pt", {f"w{i}": torch.zeros(1) for i in range(5)})
    assert "over 20 opcodes" in refusal(path, pickle_ops=20)
    assert "data.pkl has" in refusal(path, pickle_bytes=100)
    assert "5 tensors, at most 4" in refusal(path, tensors=4)
    assert "nested deeper than 1 " in refusal(path, pickle_depth=1)
    assert len(opened(path, tensors=5)) == 5


def test_legacy_pickles(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert "without the zip container" in refusal(path)
    assert "torch >= 1.6" in refusal(path)
    path.write_bytes(pickle.dumps({"w": 1}))
    assert "without the zip container" in refusal(path)


def test_torchscript(tmp_path):
    path = tmp_path / "a.pt"
    name = saved(path, {"w": torch.zeros(1)}) and root(path)
    rezip(path, {f"{name}/code/__torch__.py": b"", f"{name}/constants.pkl": b"."})
    assert "a TorchScript archive" in refusal(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_real_torchscript_archive(tmp_path):
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "a TorchScript archive" in refusal(path)


def test_not_a_torch_file(tmp_path):
    path = tmp_path / "a.bin"
    for content, expected in [
        (b"", "a zip was expected"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(50), "a zip was expected"),
        (b"PK\x03\x04" + bytes(50), "a damaged or truncated zip"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=expected):
            opened(path)
    whole = saved(path, {"w": torch.zeros(1000)}).read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="a damaged or truncated zip"):
        opened(path)
