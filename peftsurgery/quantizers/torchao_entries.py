"""What torchao writes of its packed weights into the metadata of a safetensors file.

Of a weight `X.weight`, the metadata (torchao 0.18, prototype/safetensors/; transformers writes all
of a model's into every shard) holds, as JSON,

    {"_type": class of the tensor, "_data": its attributes, "_tensor_data_names": its parts}

and the file one tensor `X._weight_PART` for each part. Plain tensors have {"_type": "Tensor"};
`tensor_names` is a list of all names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from peftsurgery.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers.packed import Packed

NAMES = "tensor_names"
UNREAD = {
    "Int4TilePackedTo4dTensor": "the codes lie in the order of a CUDA kernel (tinygemm)",
    "Int4PlainInt32Tensor": "the codes lie in the order of an XPU or NPU kernel",
    "Int4PreshuffledTensor": "the codes lie in the order of a CUDA kernel (mslk)",
    "MXTensor": "the scales lie in the order of a CUDA kernel",
    "NVFP4Tensor": "the scales lie in the order of a CUDA kernel",
}
READ = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor", "Float8Tensor")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Entry:
    """A packed weight: its name, its class, the attributes, and part -> stored tensor."""

    name: str
    kind: str
    data: Mapping[str, object]
    names: Mapping[str, str]

    def of(self, key: str) -> object:
        """An attribute; of a dtype or an enumeration, its name."""
        value = self.data.get(key)
        return value.get("_data") if isinstance(value, dict) and "_data" in value else value


def entries(checkpoint: Checkpoint, kinds: Sequence[str]) -> Iterator[Entry]:
    """The weights packed as one of some classes. UsageError for metadata that cannot be read and
    for parts that are missing, UnsupportedError for classes that are not read.
    """
    known: set[str] = set()
    for component, part in (checkpoint.components or {"": checkpoint}).items():
        start = f"{component}:" if component else ""
        for name, text in _about(part).items():
            if "." not in name or '"_type"' not in text:
                continue
            entry = _entry(checkpoint, start, name, text)
            present = [stored in checkpoint for stored in entry.names.values()]
            if entry.kind == "Tensor" or not any(present):
                continue
            known.update(entry.names.values())
            where = f"{checkpoint.source}: {start + name!r}"
            if entry.kind not in READ:
                reason = UNREAD.get(entry.kind, "the class is not known")
                raise UnsupportedError(
                    f"{where}: packed by torchao as {entry.kind}: {reason}. Merge into the "
                    "original and quantize the result."
                )
            if not all(present) or not {"qdata", "scale"} <= set(entry.names):
                missing = [name for name in entry.names.values() if name not in checkpoint]
                raise UsageError(
                    f"{where}: packed by torchao ({entry.kind}), but {', '.join(missing)} is "
                    "missing. Download it again."
                )
            if "act_pre_scale" in entry.names:
                raise UnsupportedError(
                    f"{where}: its inputs are scaled before (act_pre_scale, AWQ or SmoothQuant). "
                    "Merge into the original and quantize the result."
                )
            if entry.kind in kinds:
                yield entry
    for name in checkpoint:
        own = name.rpartition(".")[2]
        scale = f"{name.removesuffix('qdata')}scale"
        if own.startswith("_") and own.endswith("_qdata") and scale in checkpoint:
            if name in known:
                continue
            raise UsageError(
                f"{checkpoint.source}: {name!r} is packed by torchao, but the metadata of the file "
                "does not say how. Download it again."
            )


def _about(part: Checkpoint) -> dict[str, str]:
    """The metadata of all files."""
    found = dict(part.metadata)
    if len(part.files) > 1 and any(name.endswith("_qdata") for name in part):
        for file in part.files[1:]:
            found |= open_checkpoint(file).metadata
    return found


def _entry(checkpoint: Checkpoint, start: str, name: str, text: str) -> Entry:
    try:
        told = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"{checkpoint.source}: metadata {name!r} is no JSON: {error}. Download it again."
        ) from error
    fields = told if isinstance(told, dict) else {}
    data, parts = fields.get("_data", {}), fields.get("_tensor_data_names", [])
    known = isinstance(fields.get("_type"), str) and isinstance(data, dict)
    if not known or not isinstance(parts, list) or not all(isinstance(p, str) for p in parts):
        raise UsageError(
            f"{checkpoint.source}: metadata {name!r}: '_type', '_data' and '_tensor_data_names' "
            "are not as torchao writes them. Download it again."
        )
    return Entry(start + name, fields["_type"], data, stored_names(start + name, parts))


def stored_names(name: str, parts: Sequence[str]) -> dict[str, str]:
    """Part -> its tensor, of the weight `module.attribute`: `module._attribute_part`."""
    module, _, own = name.rpartition(".")
    return {part: f"{module}._{own}_{part}" for part in parts}


def native_of(where: str, told: object) -> str:
    """The safetensors name of a weight's own dtype; UnsupportedError for an unusual one."""
    native = DTYPES.get(str(told))
    if native is None:
        raise UnsupportedError(
            f"{where}: dtype {told}; expected {', '.join(DTYPES)}. Quantize the original again."
        )
    return native


def dtype_entry(native: str) -> dict[str, object]:
    """A dtype as an attribute."""
    name = next(key for key, value in DTYPES.items() if value == native)
    return {"_type": "torch.dtype", "_data": name}


def metadata_of(packed: Sequence[Packed], others: Sequence[str]) -> dict[str, str]:
    """The metadata of a file that holds these weights, and other tensors of some names."""
    found = {name: json.dumps({"_type": "Tensor"}) for name in others}
    for item in packed:
        told = item.fields["told"]
        assert isinstance(told, dict)
        found[item.name.rpartition(":")[2]] = json.dumps(told)
    return {**found, NAMES: json.dumps(list(found))}


def loader_config(
    kind: str, data: Mapping[str, object], skip: object, version: int = 2
) -> dict[str, object]:
    """The quantization_config that transformers writes for one config class of torchao."""
    quantized = {"_type": kind, "_version": version, "_data": dict(data)}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": quantized},
        "modules_to_not_convert": skip,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def granularity(group: int | None) -> dict[str, object]:
    """How torchao's configs spell a scale for each row, or for each group of inputs."""
    if group is None:
        return {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": group}}
