"""LazyTensor: private, zero-copy, row ranges, odd alignment."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftsurgery.checkpoint import LazyTensor, open_checkpoint
from peftsurgery.errors import UsageError
from tests.checkpoint.build import entry, raw_file


def test_torch_is_writable_without_touching_the_file_or_warning(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.randn(5, 3), "b": torch.randn(7)}, path)
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = open_checkpoint(path)["a"].torch()
        tensor.fill_(7.0)
        open_checkpoint(path)["b"].numpy()[:] = 1.0
    assert path.read_bytes() == before
    assert not (open_checkpoint(path)["a"].torch() == 7.0).any()


def test_zero_copy_and_one_map_per_file(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.randn(64), "b": torch.randn(64)}, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint["a"].torch().data_ptr() == checkpoint["a"].torch().data_ptr()
    assert checkpoint["a"].numpy().ctypes.data == checkpoint["a"].torch().data_ptr()
    distance = checkpoint["b"].torch().data_ptr() - checkpoint["a"].torch().data_ptr()
    assert distance == checkpoint["b"].begin - checkpoint["a"].begin


def test_tensor_outlives_its_checkpoint(tmp_path):
    path = tmp_path / "a.safetensors"
    values = torch.randn(1000)
    safetensors.torch.save_file({"a": values}, path)
    tensor = open_checkpoint(path)["a"].torch()
    path.unlink()
    assert torch.equal(tensor, values)


def test_scalars_and_empty_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "none": torch.empty(4, 0),
    }
    safetensors.torch.save_file(tensors, path)
    for name, lazy in open_checkpoint(path).items():
        assert torch.equal(lazy.torch(), tensors[name])
        assert lazy.torch().dtype == tensors[name].dtype
        assert lazy.numpy().shape == tuple(tensors[name].shape)
    with pytest.raises(UsageError, match=r"rows 0:1 of shape \[\] do not exist"):
        open_checkpoint(path)["scalar"].rows(0, 1)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64]),
    data=st.data(),
)
def test_rows_are_slices_of_dimension_0(tmp_path, shape, dtype, data):
    path = tmp_path / "a.safetensors"
    tensor = (torch.randn(shape) * 10).to(dtype)
    safetensors.torch.save_file({"pad": torch.zeros(3), "a": tensor}, path)
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    part = open_checkpoint(path)["a"].rows(start, stop)
    assert part.shape == (stop - start, *shape[1:])
    assert part.nbytes == len(part.read())
    assert torch.equal(part.torch().float(), tensor[start:stop].float())
    middle = data.draw(st.integers(0, stop - start))
    assert torch.equal(
        part.rows(middle, stop - start).torch().float(), tensor[start + middle : stop].float()
    )
    for wrong in [(-1, 1), (0, shape[0] + 1), (1, 0)]:
        with pytest.raises(UsageError, match="do not exist"):
            open_checkpoint(path)["a"].rows(*wrong)


def test_misaligned_tensors_are_read_right(tmp_path):
    values = np.arange(5, dtype=np.float64) / 3
    header = {"u": entry("U8", [3], [0, 3]), "x": entry("F64", [5], [3, 43])}
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file(header, b"abc" + values.tobytes()))
    lazy = open_checkpoint(path)["x"]
    np.testing.assert_array_equal(lazy.numpy(), values)
    loaded = lazy.torch()
    assert loaded.data_ptr() % 8 == 0
    np.testing.assert_array_equal(loaded.numpy(), values)


def test_a_file_that_changed_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(4)}, path)
    checkpoint = open_checkpoint(path)
    path.unlink()
    safetensors.torch.save_file({"a": torch.ones(400)}, path)
    with pytest.raises(UsageError, match="changed since it was opened"):
        checkpoint["a"].read()


def test_bfloat16_widens_exactly_to_numpy(tmp_path):
    path = tmp_path / "a.safetensors"
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    safetensors.torch.save_file({"a": codes.view(torch.bfloat16)}, path)
    values = open_checkpoint(path)["a"].numpy()
    np.testing.assert_array_equal(values, codes.view(torch.bfloat16).float().numpy())


def test_neither_torch_nor_the_hub_is_imported_to_open_a_file(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(4)}, path)
    code = (
        "import sys; from peftsurgery.checkpoint import open_checkpoint\n"
        f"assert open_checkpoint({str(path)!r})['a'].numpy().sum() == 0\n"
        "print([m for m in ('torch', 'huggingface_hub', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_repr_names_the_tensor(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(4, 2)}, path)
    lazy = open_checkpoint(path)["a"]
    assert isinstance(lazy, LazyTensor)
    assert repr(lazy) == "LazyTensor('a', F32, [4, 2])"
