"""RoAd, DeLoRA, HiRA, trainable tokens and LN tuning: what only PEFT writes, its tensors and its
adapter_config.json."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from peftsurgery.algorithms import HiRA, RoAd, Tokens, WeightAdapter
from peftsurgery.codec.map_shapes import Source
from peftsurgery.codec.scales import common, patterns
from peftsurgery.errors import UnsupportedError, UsageError

KINDS = ("road", "delora", "hira", "tokens")
VALUES = "LN_TUNING"  # the PEFT type of layers replaced as they are
TYPES = {"tokens": "TRAINABLE_TOKENS", "set": VALUES}  # where it is not the algorithm's own name
INDICES = "trainable_token_indices"  # of a LoRA that has tokens beside it
Tensors = Mapping[str, torch.Tensor]
Modules = Mapping[str, WeightAdapter]
Config = dict[str, object]


# reading ------------------------------------------------------------------------------------------


def read(algorithm: str, tensors: Tensors, source: Source) -> dict[str, object]:
    """The fields and options of a record. UsageError or UnsupportedError naming the key when the
    file does not say enough."""
    if algorithm == "hira":
        return _read_hira(tensors, source)
    if algorithm == "delora":
        return {n: tensors[n] for n in ("up", "down", "bound", "norms")}
    config = source.config
    if config is None:
        what = "token_indices" if algorithm == "tokens" else "variant and group_size"
        raise UsageError(
            f"{source.key!r}: {what} in adapter_config.json say what the tensors mean. Give the "
            "folder that holds it."
        )
    if algorithm == "road":
        variant, group = str(config.get("variant", "road_1")), config.get("group_size", 64)
        if variant not in ("road_1", "road_2", "road_4") or not isinstance(group, int):
            raise UsageError(
                f"adapter_config.json: variant {variant!r} and group_size {group!r}; expected "
                "road_1, road_2 or road_4 and a number."
            )
        theta, radius = tensors["theta"], tensors["radius"]
        return {"theta": theta, "radius": radius, "variant": int(variant[-1]), "group": group}
    return {"values": tensors["values"], "indices": _indices(config, source)}


def _read_hira(tensors: Tensors, source: Source) -> dict[str, object]:
    if "embedding_A" in tensors:
        up, down = tensors["embedding_A"].T, tensors["embedding_B"].T
        return {"up": up, "down": down, "stored": "embedding"}
    up, down = tensors["up"], tensors["down"]
    if source.conv1d:
        return {"up": down.T, "down": up.T, "stored": "conv1d"}
    return {"up": up, "down": down}


def _indices(config: Mapping[str, object], source: Source) -> list[int]:
    """PEFT's `token_indices`, or of a LoRA `trainable_token_indices`: one list, or one per end of
    a module's name."""
    found = config.get("token_indices")
    if found is None:
        found = config.get(INDICES)
    if isinstance(found, dict):
        ends = [n for n in found if source.name == n or source.name.endswith(f".{n}")]
        found = found[max(ends, key=len)] if ends else None
    if not isinstance(found, list) or not all(isinstance(n, int) for n in found):
        raise UsageError(
            f"{source.key!r}: adapter_config.json names no token indices for {source.name!r}; "
            f"expected a list under token_indices or {INDICES}."
        )
    return found


# writing ------------------------------------------------------------------------------------------


def write(fields: Mapping[str, str], module: WeightAdapter) -> dict[str, torch.Tensor]:
    """Suffix -> tensor in PEFT's orientation."""
    own = module.tensors()
    if isinstance(module, HiRA) and module.stored == "embedding":
        factors = {"embedding_A": module.up.T, "embedding_B": module.down.T}
    elif isinstance(module, HiRA) and module.stored == "conv1d":
        factors = {"down": module.up.T, "up": module.down.T}
    else:
        factors = own
    return {fields[n]: t for n, t in factors.items() if n in fields}


def config_of(kind: str, modules: Modules, source: Mapping[str, object]) -> Config:
    """The fields of `kind` that make PEFT build exactly these modules.

    Raises UnsupportedError naming a module that would need other numbers than the rest.
    """
    build: dict[str, Callable[[Modules, Mapping[str, object]], Config]] = {
        "road": _road,
        "delora": _delora,
        "hira": _hira,
        "tokens": _tokens,
    }
    return build[kind](modules, source)


def _kept(source: Mapping[str, object], *names: str) -> Config:
    return {name: source[name] for name in names if name in source}


def _road(modules: Modules, source: Mapping[str, object]) -> Config:
    found = {p: (m.variant, m.group) for p, m in modules.items() if isinstance(m, RoAd)}
    path, (variant, group) = next(iter(found.items()))
    for other, numbers in found.items():
        if numbers != (variant, group):
            raise UnsupportedError(
                f"PEFT has one variant and group_size for all modules; {path!r} has "
                f"{(variant, group)} and {other!r} {numbers}. --base CHECKPOINT --algorithm lora "
                "rewrites it as a LoRA."
            )
    return {"variant": f"road_{variant}", "group_size": group}


def _ranks(modules: Modules) -> Config:
    ranks = {path: float(m.rank or 0) for path, m in modules.items()}
    default = common(list(ranks.values()))
    pattern = {k: int(v) for k, v in patterns(ranks, default).items()}
    return {"r": int(default), "rank_pattern": pattern}


def _delora(modules: Modules, source: Mapping[str, object]) -> Config:
    valued = any(m.bias is not None and m.bias_is_value for m in modules.values())
    kept = _kept(source, "delora_lambda", "lambda_pattern", "module_dropout", "bias")
    return {"bias": "delora_only" if valued else "none", **kept, **_ranks(modules)}


def _hira(modules: Modules, source: Mapping[str, object]) -> Config:
    transposed = any(m.stored == "conv1d" for m in modules.values())
    ranks = _ranks(modules)
    if ranks["rank_pattern"]:
        raise UnsupportedError(
            f"PEFT 0.21 ignores rank_pattern for HiRA and builds rank {ranks['r']} everywhere, and "
            f"{next(iter(ranks['rank_pattern']))!r} has another. --base CHECKPOINT --algorithm "  # pyright: ignore[reportArgumentType, reportCallIssue]
            "lora rewrites it as a LoRA."
        )
    return {**ranks, "fan_in_fan_out": transposed, **_kept(source, "hira_dropout")}


def _tokens(modules: Modules, source: Mapping[str, object]) -> Config:
    found = {p: m.indices for p, m in modules.items() if isinstance(m, Tokens)}
    path, indices = next(iter(found.items()))
    for other, numbers in found.items():
        if numbers != indices:
            raise UnsupportedError(
                f"PEFT has one token_indices for all modules; {path!r} and {other!r} differ. "
                "Beside a LoRA each may have its own."
            )
    kept = _kept(source, "target_modules") if source.get("token_indices") is not None else {}
    return {"token_indices": list(indices), **kept}


def beside_lora(modules: Modules, source: Mapping[str, object]) -> Config:
    """`trainable_token_indices` of the tokens next to a LoRA."""
    found = {path: list(m.indices) for path, m in modules.items() if isinstance(m, Tokens)}
    listed = isinstance(source.get(INDICES), list) and len(found) == 1
    kept = _kept(source, "ensure_weight_tying")
    return {INDICES: next(iter(found.values())) if listed else found, **kept}


def are_values(kinds: Collection[str], modules: Modules, source: Mapping[str, object]) -> bool:
    """Whether new values alone are what PEFT calls LN tuning: they came as such, or all are of
    norms (one dimension)."""
    if set(kinds) != {"set"}:
        return False
    named = str(source.get("peft_type", "")).upper() == VALUES
    return named or all(len(m.shape) == 1 for m in modules.values())
