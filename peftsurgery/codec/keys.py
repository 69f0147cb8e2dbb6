"""From a key to (module name, field): the suffix grammar of every dialect, read liberally.

Nothing here knows an architecture: a key is cut at its longest known suffix, and keys with the same
head form one `Record`. Suffixes of algorithms that are known but not handled are recognised by
name, so the error can say what the file is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from peftsurgery.codec.foreign import Foreign, foreign_key
from peftsurgery.codec.map_shapes import NEEDED, incomplete, map_shape
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.layouts import LAYOUTS, Dialect

ANY = ""  # the field belongs to whatever algorithm the module has

# read besides what the layouts write
_EXTRA_SUFFIXES: dict[str, tuple[str, str]] = {
    "lora_A": ("lora", "down"),
    "lora_B": ("lora", "up"),
    "lora_embedding_A": ("lora", "embedding_A"),
    "lora_embedding_B": ("lora", "embedding_B"),
    "lora_magnitude_vector.weight": (ANY, "magnitude_out"),
    "base_layer.weight": (ANY, "base_weight"),
    "base_layer.bias": (ANY, "bias_value"),
    "bias.set_weight": (ANY, "bias_value"),
    "oft_R.scaled_oft": ("oft", "scaled"),
    "lora_E": ("adalora", "e"),
    "bone_block": ("miss", "block"),
    "token_adapter.trainable_tokens_delta": ("tokens", "values"),
    "token_adapter.base_layer.weight": (ANY, "base_weight"),
    "ln_tuning_layers.weight": ("set", "weight"),
    "ln_tuning_layers.bias": (ANY, "bias_value"),
}
_NAMED = re.compile(
    r"^(?P<head>.+\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|hada_\w+|lokr_\w+"
    r"|oft_R|oft_embedding_R|boft_[Rs]|hra_u|ia3_l"
    r"|road_theta|road_alpha|delora_\w+|hira_(?:embedding_)?[AB]|trainable_tokens_delta"
    r"|ln_tuning_layers"
    r"|lora_E|vera_lambda_[bd]|fourierft_spectrum|c3a_kernel|miss_block|bone_block|shira_\w+"
    r"|modules_to_save))\.(?P<name>[^.]+)(?P<tail>\.weight|\.bias)?$"
)
# tensors of a whole component, not of a module
_SHARED = re.compile(r"^(?P<component>\w+:)?base_model\.(?P<name>vera_[AB])(?:\.[^.]+)?$")
_CARRIED = re.compile(r"^bundle_emb\.|^lora_controlnet$")
BASE_COPY = ".base_layer.weight"  # PEFT's copy of an adapted embedding's own weight
_TAIL_WORDS = frozenset({"weight", "bias", "scaled_oft"})


def _suffix_table() -> dict[str, tuple[str, str]]:
    table: dict[str, tuple[str, str]] = {}
    dialects: list[Dialect] = []
    for layout in LAYOUTS:
        others = (layout.text_encoder_dialect, layout.controlnet_dialect)
        dialects += [layout.dialect, *filter(None, others)]
    for dialect in dialects:
        for algorithm, fields in dialect.algorithms.items():
            name = "full" if algorithm == "norm" else algorithm
            table.update({suffix: (name, f) for f, suffix in fields.items() if suffix != "weight"})
        if dialect.bias:
            table[dialect.bias] = (ANY, "bias_scaled" if dialect.bias_is_scaled else "bias")
        for suffix, field_name in (
            (dialect.alpha, "alpha"),
            (dialect.norm_bias, "bias"),
            (dialect.bias_value, "bias_value"),
            (dialect.padded_shape, "padded_shape"),
        ):
            if suffix:
                table[suffix] = (ANY, field_name)
    table["weight"] = ("set", "weight")  # also IA3's beside on_input, see _add
    table["dora_scale"] = (ANY, "magnitude")
    table["lora_magnitude_vector"] = table["magnitude"] = (ANY, "magnitude_out")
    return {**table, **_EXTRA_SUFFIXES}


SUFFIXES = _suffix_table()


class HeaderTensor(Protocol):
    """What detection needs of a tensor: no data."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


@dataclass
class Record:
    """The keys of one module of a file, before any architecture is known."""

    module: str
    algorithm: str = ANY
    keys: dict[str, str] = field(default_factory=dict)  # field -> key
    parameter: str = "weight"  # what a replaced value replaces: weight or scale
    suffixes: set[str] = field(default_factory=set)


@dataclass
class Parsed:
    """All keys of a file: records by module name, tensors carried as they are, and what was
    repaired or skipped.
    """

    records: dict[str, Record]
    carried: list[str]
    skipped: list[str]  # frozen copies of base weights (original_module)
    unknown: list[str]  # keys with no known suffix
    repairs: dict[str, int]
    adapter_name: str | None = None
    shared: dict[str, str] = field(default_factory=dict)  # `component:name` -> key, of all modules


def is_unknown(key: str) -> bool:
    """Whether a carried tensor is one that nothing explains, kept on request."""
    return not (_CARRIED.match(key) or key.endswith(BASE_COPY))


def split(key: str) -> tuple[str, str, str, str] | None:
    """`key` -> (module, algorithm, field, suffix), or None when no suffix is known."""
    segments = key.split(".")
    for length in (3, 2, 1):
        if len(segments) > length:
            suffix = ".".join(segments[-length:])
            if suffix in SUFFIXES:
                algorithm, name = SUFFIXES[suffix]
                return ".".join(segments[:-length]), algorithm, name, suffix
    if len(segments) > 1 and segments[-1] == "scale":
        return ".".join(segments[:-1]), "set", "weight", "scale"
    return None


def parse(keys: Iterable[str], source: str = "") -> Parsed:
    """Cut every key of a file into records.

    Raises UnsupportedError (exit 3) naming the algorithm when the file holds one that is recognised
    but not handled, UsageError when it holds several named adapters or one module twice.
    """
    parsed = Parsed({}, [], [], [], {})
    foreign: dict[Foreign, list[str]] = {}
    names: set[str] = set()
    keys = list(keys)
    present = set(keys)
    for key in keys:
        if _CARRIED.match(key):
            parsed.carried.append(key)
            continue
        if (whole := _SHARED.match(key)) is not None:
            parsed.shared.setdefault((whole["component"] or "") + whole["name"], key)
            continue
        # beside the value itself when PEFT saves resized embeddings too
        if ".original_module." in key or _saved_twice(key, present):
            parsed.skipped.append(key)
            continue
        named = _NAMED.match(key)
        plain = key
        if named and named["name"] not in _TAIL_WORDS:
            names.add(named["name"])
            if len(names) > 1:
                raise _several_names(keys, source)
            head = named["head"].removesuffix(".modules_to_save")
            plain = head + (named["tail"] or "")
        if (method := foreign_key(plain)) is not None:
            foreign.setdefault(method, []).append(key)
            continue
        cut = split(plain)
        if cut is None:
            parsed.unknown.append(key)
            continue
        _add(parsed, key, *cut)
    if foreign:
        listed = "; ".join(
            f"{m.name}: {len(found)} keys, first {found[0]!r}" for m, found in foreign.items()
        )
        raise UnsupportedError(
            f"{source}: holds an algorithm this version recognises but does not handle ({listed}). "
            + " ".join(dict.fromkeys(method.reason for method in foreign))
        )
    if parsed.shared and not any(r.algorithm == "vera" for r in parsed.records.values()):
        parsed.unknown += parsed.shared.values()
    parsed.adapter_name = next(iter(names), None)
    _base_copies(parsed)
    return parsed


def _saved_twice(key: str, present: set[str]) -> bool:
    return ".modules_to_save." in key and key.replace(".modules_to_save.", ".") in present


def _base_copies(parsed: Parsed) -> None:
    """PEFT saves an adapted embedding's own weight beside its LoRA: carried. Alone it is the
    module's new value.
    """
    for record in parsed.records.values():
        if (key := record.keys.pop("base_weight", None)) is None:
            continue
        if record.keys:
            parsed.carried.append(key)
            record.suffixes.discard("base_layer.weight")
        else:
            record.algorithm, record.keys = "set", {"weight": key}


def _several_names(keys: Iterable[str], source: str) -> UsageError:
    found = {m["name"] for key in keys if (m := _NAMED.match(key))} - _TAIL_WORDS
    return UsageError(
        f"{source}: holds several named adapters ({', '.join(sorted(found))}); expected one. "
        "Save one adapter per file (PEFT: save_pretrained(selected_adapters=[…]))."
    )


def _add(parsed: Parsed, key: str, module: str, algorithm: str, name: str, suffix: str) -> None:
    if module.endswith(".scale") and suffix in ("set_weight", "diff", "w_norm"):
        module, parameter = module.removesuffix(".scale"), "scale"
    else:
        parameter = "scale" if suffix == "scale" else "weight"
    if name == "bias_value" and suffix == "bias.set_weight":
        module = module.removesuffix(".bias")
    record = parsed.records.setdefault(module, Record(module))
    if suffix == "on_input" and "weight" in record.keys:
        record.algorithm, record.keys["vector"] = ANY, record.keys.pop("weight")
    elif suffix == "weight" and "on_input" in record.keys:
        algorithm, name = "ia3", "vector"
    if name in record.keys:
        raise UsageError(
            f"{key!r}: the module {module!r} already has its {name} from {record.keys[name]!r}; "
            "expected each once."
        )
    if {record.algorithm, algorithm} == {"lora", "adalora"}:  # lora_A, lora_B beside lora_E
        record.algorithm = algorithm = "adalora"
    if algorithm:
        if record.algorithm and record.algorithm != algorithm:
            raise UnsupportedError(
                f"{key!r}: the module {module!r} carries both {record.algorithm} and {algorithm} "
                "tensors; "
                "one algorithm per module is supported. Split the file into two adapters."
            )
        record.algorithm = algorithm
    if algorithm == "set" or parameter == "scale":
        record.parameter = parameter
    record.keys[name] = key
    record.suffixes.add(suffix)


def rank_and_shape(
    record: Record, tensors: Mapping[str, HeaderTensor]
) -> tuple[int | None, tuple[int, int]]:
    """(rank, (out, in)) of a record from shapes alone; `in` counts input channels, kernel excluded
    where it is known.

    0 where the tensors do not tell a side of the weight. LoKr with both factors full has no rank
    (None). For a 1-D tensor `in` is 1. LoHa without Tucker on a convolution gives in·k, because its
    factors do not tell the kernel.
    """

    def shape(name: str) -> tuple[int, ...]:
        return tuple(tensors[record.keys[name]].shape)

    have = record.keys
    if record.algorithm == "lora":
        if "embedding_A" in have or "embedding_B" in have:
            _need(record, "embedding_A", "embedding_B")
            a, b = shape("embedding_A"), shape("embedding_B")
            return a[0], (a[1], b[0])
        _need(record, "down", "up")
        down, up = shape("down"), shape("up")
        if len(down) < 2 or len(up) < 2:
            raise UsageError(
                f"{have['down']!r}: has shape {list(down)} and {have['up']!r} {list(up)}; expected "
                "matrices. This is "
                "what an un-gathered sharded (ZeRO/FSDP) save leaves; save again from gathered "
                "parameters."
            )
        empty = 0 in (*down, *up)
        if empty or ("mid" not in have and up[1] != down[0]):
            wrong = "have no elements" if empty else "have different ranks"
            raise UsageError(
                f"{have['down']!r} {list(down)} and {have['up']!r} {list(up)}: {wrong}; expected "
                "(rank, in) and "
                "(out, rank). One process's slice of a sharded (ZeRO/FSDP) save looks like this; "
                "save again from "
                "gathered parameters."
            )
        return down[0], (up[0], down[1])
    if record.algorithm == "loha":
        _need(record, "w1_a", "w1_b", "w2_a", "w2_b")
        a, b = shape("w1_a"), shape("w1_b")
        return b[0], (a[1] if "t1" in have else a[0], _product(b[1:]) if "t1" not in have else b[1])
    if record.algorithm == "lokr":
        return _lokr_shape(record, shape)
    if record.algorithm in NEEDED:
        _need(record, *incomplete(record.algorithm, have))
        return map_shape(record.algorithm, have, shape)
    if "diff" in have or "weight" in have:
        value = shape("diff" if "diff" in have else "weight")
        return None, (value[0] if value else 1, value[1] if len(value) > 1 else 1)
    bias = next((have[f] for f in ("bias", "bias_scaled", "bias_value") if f in have), None)
    if bias is not None:
        return None, (tensors[bias].shape[0] if tensors[bias].shape else 1, 1)
    raise UsageError(
        f"{next(iter(have.values()))!r}: the module {record.module!r} has {sorted(have)} but no "
        "tensor to apply; "
        "the file is incomplete."
    )


def _lokr_shape(record: Record, shape) -> tuple[int | None, tuple[int, int]]:
    have = record.keys
    if "w1" in have:
        a, c = shape("w1")[:2]
    else:
        _need(record, "w1_a", "w1_b")
        a, c = shape("w1_a")[0], shape("w1_b")[1]
    rank = None if "w1" in have else shape("w1_b")[0]
    if "w2" in have:
        b, d = shape("w2")[:2]
    elif "t2" in have:
        _need(record, "w2_a", "w2_b")
        b, d = shape("w2_a")[1], shape("w2_b")[1]
        rank = shape("w2_b")[0]
    else:
        _need(record, "w2_a", "w2_b")
        b, d = shape("w2_a")[0], shape("w2_b")[1]
        rank = shape("w2_b")[0]
    return rank, (a * b, c * d)


def _need(record: Record, *names: str) -> None:
    missing = [name for name in names if name not in record.keys]
    if missing:
        have = ", ".join(repr(key) for key in record.keys.values())
        raise UsageError(
            f"{record.module!r}: {record.algorithm} needs {', '.join(missing)} beside {have}; the "
            "file is incomplete."
        )


def _product(values: tuple[int, ...]) -> int:
    result = 1
    for value in values:
        result *= value
    return result
