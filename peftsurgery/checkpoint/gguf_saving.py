"""save_gguf: a GGUF file again, some of its tensors replaced."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.checkpoint.gguf import GGUFCheckpoint
from peftsurgery.checkpoint.saving import _check_targets
from peftsurgery.checkpoint.strict_json import shown
from peftsurgery.checkpoint.tensors import FileMap, LazyTensor
from peftsurgery.checkpoint.writing import Deferred, Sink, Staging, buffers, dtype_and_shape
from peftsurgery.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch


def save_gguf(
    path: str | Path,
    like: GGUFCheckpoint,
    tensors: Mapping[str, LazyTensor | torch.Tensor | np.ndarray | Deferred],
    *,
    overwrite: bool = False,
    sync: bool = True,
) -> Path:
    """Write the file of `like` to `path` with `tensors` in the place of those of the same names;
    `NAME[3]` is a slice of a stack.

    Every other byte is the one of `like`: header, keys, padding and the other tensors, copied
    inside the kernel where it can. Tensors have the stored dtype and shape of the ones they
    replace (packed ones U8 blocks). The file appears whole or not at all; `sync` waits for the disk
    before it does. Memory: one chunk of a Deferred, or one tensor.

    Raises UsageError: the target exists and not `overwrite`, is a link, a folder or an input; a
    name that `like` does not have, another dtype or shape; CheckFailed: a Deferred of another
    length.
    """
    target = Path(path)
    file = _file(like)
    places = sorted(
        (_place(like, name, value, file), name, value)
        for name, value in tensors.items()
        if not _is_there(value, like, name)
    )
    for (place, name, _), ((begin, _), other, _) in itertools.pairwise(places):
        if begin < place[1]:
            raise UsageError(f"{target}: {shown(name)} and {shown(other)} share bytes")
    inputs = {file.path}
    for value in tensors.values():
        if isinstance(value, LazyTensor):
            inputs.add(value.path)
        elif isinstance(value, Deferred):
            inputs.update(value.sources)
    staging = Staging(overwrite=overwrite, sync=sync)
    try:
        _check_targets([target], inputs, overwrite)
        with staging.create(target) as fd:
            sink = Sink(fd, eager=sync)
            position = 0
            for (begin, end), name, value in places:
                sink.copy(file, position, begin)
                for buffer in buffers(value):
                    sink.write(buffer)
                if sink.written != end:
                    raise CheckFailed(
                        f"{target}: {shown(name)} gave {sink.written - begin} bytes, "
                        f"{end - begin} were promised; nothing was written"
                    )
                position = end
            sink.copy(file, position, file.size)
            sink.flush()
        staging.publish()
    except BaseException:
        staging.discard()
        raise
    return target


def _file(like: GGUFCheckpoint) -> FileMap:
    for tensor in like.values():
        return tensor.file
    raise UsageError(f"{like.source}: holds no tensors")


def _is_there(value: object, like: GGUFCheckpoint, name: str) -> bool:
    """Whether a value is the bytes that `like` has under the name."""
    if not isinstance(value, LazyTensor):
        return False
    try:
        known = like[name]
    except KeyError:
        return False
    return value.file is known.file and value.file_range() == known.file_range()


def _place(like: GGUFCheckpoint, name: str, value: object, file: FileMap) -> tuple[int, int]:
    try:
        known = like[name]
    except KeyError as error:
        raise UsageError(
            f"{like.source}: has no tensor {shown(name)}; only those it has can be replaced"
        ) from error
    dtype, shape = dtype_and_shape(value, name)
    if dtype != known.dtype or shape != tuple(known.shape):
        raise UsageError(
            f"{shown(name)}: {dtype} {list(shape)} was given, the file holds {known.dtype} "
            f"{list(known.shape)}"
        )
    return known.begin, known.end
