"""Files made by hand for the tests of the checkpoint package."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from peftsurgery.checkpoint import Checkpoint, Limits, open_checkpoint
from peftsurgery.errors import UnsafeInputError


def raw_file(header: object, payload: bytes = b"") -> bytes:
    """A safetensors file of a header (bytes, or what JSON can hold) and a payload, unchecked."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + payload


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_simple(
    path: Path, names: Mapping[str, int], metadata: dict[str, str] | None = None
) -> Path:
    """A file with an F32 tensor 0, 1, 2, ... of the given length under each name."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.arange(length, dtype=np.float32) for name, length in names.items()}
    save_file(arrays, path, metadata)
    return path


def rezip(path: Path, changes: Mapping[str, bytes | None], **options: int) -> Path:
    """The zip `path` rewritten, members replaced or added by `changes` (None removes)."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members.update({name: data for name, data in changes.items() if data is not None})
    for name, data in changes.items():
        if data is None:
            del members[name]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    path.write_bytes(target.getvalue())
    return path


def opened(path: Path, **limits: int) -> Checkpoint:
    """A pickle, allowed."""
    return open_checkpoint(path, allow_pickle=True, limits=Limits(**limits))


def saved(path: Path, value: object) -> Path:
    """What torch.save writes."""
    torch.save(value, path)
    return path


def refusal(path: Path, **limits: int) -> str:
    """Why a pickle is refused although pickles are allowed."""
    with pytest.raises(UnsafeInputError) as caught:
        opened(path, **limits)
    assert str(path) in str(caught.value)
    return str(caught.value)


def root(path: Path) -> str:
    """The one folder inside a torch zip."""
    return zipfile.ZipFile(path).namelist()[0].split("/")[0]
