"""The files beside the weights: configs, tokenizers and indexes, copied or rewritten to fit what
was merged.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Collection
from pathlib import Path

from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.errors import UsageError

WEIGHTS = (
    ".safetensors",
    ".sft",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def copy_side_files(
    base: Checkpoint,
    staged: Path,
    *,
    config: dict[str, object] | None = None,
    dtype: str | None = None,
    dequantized: bool = False,
) -> None:
    """Copy what lies beside the weights of `base` into the folder `staged`, where the weights are
    already.

    config: what config.json becomes, None to keep it. dtype: the safetensors dtype everything was
    written in, None when it was kept. dequantized: packed weights have become plain ones, so what
    configs say of them is taken out. Indexes get the names and the total size of what was written.
    Not copied: weights in other files or formats, which would no longer be those of the model,
    their indexes, and hidden files.
    """
    root = base.path if base.path.is_dir() else base.path.parent
    if not base.path.is_dir():  # a lone index: its folder may hold anything
        _rewrite_index(base.path, staged / base.path.name)
        return
    used = {path.relative_to(root) for path in base.files}
    for source in sorted(root.rglob("*")):
        name = source.relative_to(root)
        if not source.is_file() or name in used or any(part.startswith(".") for part in name.parts):
            continue
        if source.suffix in WEIGHTS or _stale_index(source, name, used):
            continue
        if dequantized and source.name in QUANTIZATION_FILES:
            continue
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.name.endswith(".index.json"):
            _rewrite_index(source, target)
        elif source.name == "config.json":
            known = config if name.parts == ("config.json",) else None
            if dequantized:
                known = without_quantization(known if known is not None else _json(source))
            _write_config(source, target, known, dtype)
        else:
            shutil.copyfile(source, target)


def without_quantization(config: dict[str, object]) -> dict[str, object]:
    """A config that says nothing of packed weights any more, at any depth."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


def _stale_index(source: Path, name: Path, used: Collection[Path]) -> bool:
    """Whether a file is the index of weights that are not copied."""
    if not source.name.endswith(".index.json"):
        return False
    return any(name.parent / shard not in used for shard in _shards(source))


def _shards(index: Path) -> list[str]:
    weight_map = _json(index).get("weight_map")
    return sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else [""]


def _json(path: Path) -> dict[str, object]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(data).__name__}.")
    return data


def _write_config(
    source: Path, target: Path, config: dict[str, object] | None, dtype: str | None
) -> None:
    if config is None and dtype is None:
        shutil.copyfile(source, target)
        return
    changed = copy.deepcopy(config) if config is not None else _json(source)
    if dtype is not None:
        _set_dtype(changed, DTYPE_NAMES[dtype])
    target.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_dtype(config: dict[str, object], name: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = name
        elif isinstance(value, dict):
            _set_dtype(value, name)


def _rewrite_index(source: Path, target: Path) -> None:
    """The index of the shards beside `target`: names as they are now, `total_size` in bytes."""
    index = _json(source)
    known = index.get("weight_map")
    found: dict[str, str] = {}
    size = elements = 0
    for shard in _shards(source):
        for name, tensor in open_checkpoint(target.parent / shard).items():
            found[name] = shard
            size += tensor.nbytes
            elements += math.prod(tensor.shape)
    order = [name for name in known if name in found] if isinstance(known, dict) else []
    index["weight_map"] = {name: found[name] for name in dict.fromkeys((*order, *found))}
    metadata = index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = size
    if "total_parameters" in metadata:
        metadata["total_parameters"] = elements
    index["metadata"] = metadata
    target.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
