"""inspect on a checkpoint with packed weights: formats, bits per weight, and what stays plain."""

from __future__ import annotations

import math
from collections.abc import Iterable

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.dtypes import BITS
from peftsurgery.operations.packed_sides import format_of
from peftsurgery.quantizers import Packed, PackedTensor, logical
from peftsurgery.quantizers.configs import quantization_config
from peftsurgery.reports import Report, Row


def describe(checkpoint: Checkpoint, report: Report) -> bool:
    """Fill the report of a checkpoint with packed weights, from headers and the few bytes in which
    formats note shapes; False for one without.

    Raises what `quantizers.logical` does: UnsupportedError for a packing that is not known,
    UsageError for one whose parts are missing or of wrong shapes.
    """
    seen = logical(checkpoint)
    packed = {name: _packed(tensor) for name, tensor in seen.items() if format_of(tensor)}
    if not packed:
        return False
    plain = {name: _plain(tensor) for name, tensor in seen.items() if name not in packed}
    stored = sum(_bytes(weight) for weight in packed.values())
    count = sum(math.prod(weight.shape) for weight in packed.values())
    rest = sum(tensor.nbytes for tensor in plain.values())
    formats = _formats(packed.values())
    report.summary.update(
        {
            "file": checkpoint.source,
            "holds": "a checkpoint with packed weights",
            "packed as": ", ".join(f"{row['title']} ({row['weights']})" for row in formats),
            "packed weights": len(packed),
            "parameters in them": count,
            "bits per packed parameter": 8 * stored / count if count else None,
            "bytes of packed weights": stored,
            "plain tensors": len(plain),
            "bytes of plain tensors": rest,
            "bits per parameter": 8 * (stored + rest) / max(1, count + _parameters(plain.values())),
            "bytes unpacked": rest + sum(int(row["bytes unpacked"] or 0) for row in formats),
        }
    )
    said = _said(seen)
    if said:
        report.summary["config.json says"] = said
    report.modules.extend(_row(name, weight) for name, weight in packed.items())
    report.tables["formats"] = formats
    report.tables["plain tensors"] = _kinds(plain.values())
    return True


def _packed(tensor: LazyTensor) -> Packed:
    assert isinstance(tensor, PackedTensor)
    return tensor.packed


def _plain(tensor: LazyTensor) -> LazyTensor:
    """As it is stored; a plain tensor of a GGUF file is seen through a format, too."""
    return next(iter(tensor.packed.parts.values())) if isinstance(tensor, PackedTensor) else tensor


def _bytes(weight: Packed) -> int:
    return sum(part.nbytes for part in weight.parts.values())


def _parameters(tensors: Iterable[LazyTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _row(name: str, weight: Packed) -> Row:
    count = math.prod(weight.shape)
    return {
        "module": name,
        "format": weight.format.name,
        "shape": "x".join(map(str, weight.shape)),
        "bits per parameter": 8 * _bytes(weight) / count if count else None,
        "bytes": _bytes(weight),
        "computed in": weight.native,
    }


def _formats(weights: Iterable[Packed]) -> list[Row]:
    groups: dict[str, list[Packed]] = {}
    for weight in weights:
        groups.setdefault(weight.format.name, []).append(weight)
    rows: list[Row] = []
    for name, group in groups.items():
        stored = sum(map(_bytes, group))
        count = sum(math.prod(weight.shape) for weight in group)
        rows.append(
            {
                "format": name,
                "title": group[0].format.title,
                "weights": len(group),
                "parameters": count,
                "bits per parameter": 8 * stored / count if count else None,
                "bytes": stored,
                "bytes unpacked": sum(math.prod(w.shape) * (BITS[w.native] // 8) for w in group),
            }
        )
    return rows


def _kinds(tensors: Iterable[LazyTensor]) -> list[Row]:
    groups: dict[str, list[LazyTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return [
        {
            "dtype": dtype,
            "tensors": len(group),
            "parameters": _parameters(group),
            "bytes": sum(tensor.nbytes for tensor in group),
        }
        for dtype, group in groups.items()
    ]


def _said(checkpoint: Checkpoint) -> str:
    """The methods that config.json, or the configs of the components, name."""
    places = ["", *(f"{name}:" for name in checkpoint.configs)]
    found = [quantization_config(checkpoint, place) for place in places]
    methods = (config.get("quant_method") or config.get("quant_type") for config in found)
    return ", ".join(dict.fromkeys(str(method) for method in methods if method))
