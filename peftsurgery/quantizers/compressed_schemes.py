"""What a quantization_config of compressed-tensors says about whole numbers, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from peftsurgery.checkpoint import LazyTensor
from peftsurgery.errors import UnsupportedError, UsageError


def schemes(config: Mapping[str, object]) -> list[dict[str, object]]:
    """The `weights` of every config group."""
    groups = config.get("config_groups")
    every = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in every if isinstance(group, dict)]
    return [entry for entry in weights if isinstance(entry, dict)]


def layout(
    where: str, config: Mapping[str, object], columns: int, words: LazyTensor
) -> tuple[int, bool]:
    """(bits, padded) of rows of `columns` codes in words (…, width); padded: no code crosses a
    word. Where both ways have this width, the highest bits of the words tell, empty when padded.

    Raises UnsupportedError when nothing fits, or codes of more than one size do.
    """
    said = {entry.get("num_bits") for entry in schemes(config)}
    width = words.shape[-1]
    fitting: dict[int, set[bool]] = {}
    for size in range(2, 9):
        if not said or size in said:
            if -(-columns * size // 32) == width:
                fitting.setdefault(size, set()).add(False)
            if -(-columns // (32 // size)) == width and 32 % size:
                fitting.setdefault(size, set()).add(True)
    if len(fitting) != 1:
        raise UnsupportedError(
            f"{where}: {width} words for {columns} columns "
            + (f"may be of {sorted(fitting)} bits." if fitting else "fit no number of bits.")
            + f" The config says {sorted(map(str, said)) or 'nothing'}. Give the config.json that "
            "belongs to it, or quantize the original again."
        )
    ((size, ways),) = fitting.items()
    if len(ways) == 1:
        return size, ways.pop()
    used = 32 // size * size
    return size, not bool((words.torch() >> used & ((1 << 32 - used) - 1)).any())


def check_config(where: str, config: Mapping[str, object]) -> None:
    """Raises UnsupportedError for what changes the meaning of the stored numbers."""
    sparsity = config.get("sparsity_config")
    sparse = sparsity.get("format") if isinstance(sparsity, dict) else None
    kind = str(config.get("format") or "")
    if sparse not in (None, "dense") or kind == "marlin-24":
        raise UnsupportedError(
            f"{where}: is stored sparse ({sparse or kind}); dense was expected. Take the "
            "checkpoint it was made from."
        )
    if config.get("transform_config"):
        raise UnsupportedError(
            f"{where}: the model is rotated (transform_config), so that its weights are not those "
            "that adapters are trained on. Merge into the original and quantize the result."
        )
    whole = [entry for entry in schemes(config) if entry.get("type", "int") == "int"]
    if any(entry.get("strategy") == "block" for entry in whole):
        raise UnsupportedError(
            f"{where}: whole numbers with scales of blocks are not read; tensor, channel or group "
            "was expected. Merge into the original and quantize the result."
        )


def options_of(options: Mapping[str, object]) -> tuple[int, int, bool]:
    """(bits, group, symmetric) of pack-quantized, with their defaults."""
    size, group = cast(int, options.get("bits", 4)), cast(int, options.get("group", 128))
    if size not in range(2, 9):
        raise UsageError(f"pack-quantized: {size} bits; 2 to 8 were expected.")
    return size, group, bool(options.get("symmetric", True))


def weights_of(size: int, *, symmetric: bool, group: int | None) -> dict[str, object]:
    """The `weights` of a config group; group None: one scale for a row."""
    strategy = "channel" if group is None else "group"
    found: dict[str, object] = {"num_bits": size, "type": "int", "symmetric": symmetric}
    return found | {"strategy": strategy, "group_size": group, "dynamic": False}


def config_of(
    kind: str,
    weights: Mapping[str, object],
    inputs: Mapping[str, object] | None,
    options: Mapping[str, object],
) -> dict[str, object]:
    """The quantization_config of one group for every linear layer, but those of `skip`."""
    skip = cast("list[str] | None", options.get("skip"))
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": inputs}
    group |= {"output_activations": None, "format": kind}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"] if skip is None else skip,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
