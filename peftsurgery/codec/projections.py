"""AdaLoRA, VeRA, FourierFT, C3A, MiSS and SHiRA in PEFT folders: their tensors and their
adapter_config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch

from peftsurgery.algorithms import (
    C3A,
    AdaLoRA,
    Bat,
    FourierFT,
    MiSS,
    SHiRA,
    VeRA,
    WeightAdapter,
)
from peftsurgery.algorithms.adalora import adalora_scale
from peftsurgery.algorithms.slots import scaled
from peftsurgery.codec.map_shapes import Source
from peftsurgery.codec.refusals import LORA_ONLY, Refused
from peftsurgery.codec.scales import common, float32
from peftsurgery.errors import UnsupportedError, UsageError

KINDS = ("adalora", "vera", "fourierft", "c3a", "miss", "bat", "shira")
TYPES = {"bat": "MISS"}  # where it is not the algorithm's own name
REWRITE = "--algorithm lora (with --base CHECKPOINT) rewrites it as a LoRA"
SHARED = ("vera_A", "vera_B")  # one pair of tensors for all modules of a component
Tensors = Mapping[str, torch.Tensor]
Modules = Mapping[str, WeightAdapter]
Config = dict[str, object]


# reading ------------------------------------------------------------------------------------------


def read(algorithm: str, tensors: Tensors, source: Source) -> tuple[str, dict[str, object]]:
    """(algorithm, its fields and options) of a record. UsageError or UnsupportedError naming the
    key when the file does not say enough."""
    if source.conv1d and algorithm in ("c3a", "miss", "shira"):
        raise UnsupportedError(
            f"{source.key!r}: {algorithm.upper()} on a transformers Conv1D (fan_in_fan_out), which "
            "PEFT does not have."
        )
    if algorithm == "adalora":
        return algorithm, _read_adalora(tensors, source)
    if algorithm == "vera":
        return algorithm, _read_vera(tensors, source)
    if algorithm == "fourierft":
        return algorithm, _read_fourierft(tensors, source)
    if algorithm == "c3a":
        kernel = tensors["kernel"]
        width = math.prod(kernel.shape[1:])
        return algorithm, {"kernel": kernel, "scale": float32(1 / width) if width else 1.0}
    if algorithm == "shira":
        return algorithm, {n: tensors[n] for n in ("values", "indices")}
    block, form = tensors["block"], (source.config or {}).get("init_weights", True)
    if block.ndim == 3:
        return "bat", {"block": block}
    return "miss", {"block": block, "mini": form == "mini"}


def _read_adalora(tensors: Tensors, source: Source) -> dict[str, object]:
    """A module pruned to rank 0 holds no numbers: it becomes one singular value that is 0."""
    up, e, down = (tensors[n] for n in ("up", "e", "down"))
    if down.ndim == 2 and up.ndim == 2 and down.shape[0] == up.shape[1] == e.shape[0] == 0:
        up, e, down = (t.new_zeros([n or 1 for n in t.shape]) for t in (up, e.reshape(0, 1), down))
    if source.conv1d:
        up, down = down.T, up.T
    found: dict[str, object] = {"up": up, "e": e, "down": down}
    if source.conv1d:
        found["stored"] = "conv1d"
    if source.config is None:
        return found
    alpha = source.config.get("lora_alpha", 8)
    first = source.config.get("init_r", 12)
    if not isinstance(alpha, int | float) or not isinstance(first, int) or first < 1:
        raise UsageError(
            f"adapter_config.json: lora_alpha is {alpha!r} and init_r {first!r}; expected numbers."
        )
    return {**found, "scale": float32(adalora_scale(alpha, first))}


def _read_vera(tensors: Tensors, source: Source) -> dict[str, object]:
    found: dict[str, object] = {n: tensors[n] for n in ("lambda_b", "lambda_d")}
    if source.conv1d:
        found["stored"] = "conv1d"
    if missing := [n for n in SHARED if n not in source.shared]:
        if len(missing) == 1:
            raise UsageError(f"{source.key!r}: VeRA needs base_model.{missing[0]} beside its pair.")
        config = source.config or {}
        seed = config.get("projection_prng_key")
        if config.get("save_projection", True) or not isinstance(seed, int):
            raise UsageError(
                f"{source.key!r}: VeRA without its shared projections base_model.vera_A and "
                "vera_B, and no adapter_config.json with save_projection false and the "
                "projection_prng_key they are drawn from. The file is incomplete."
            )
        return {**found, "seed": seed, "widest": (source.widest, 0)}
    return {**found, "down": source.shared["vera_A"], "up": source.shared["vera_B"]}


def _read_fourierft(tensors: Tensors, source: Source) -> dict[str, object]:
    if source.config is None:
        raise UsageError(
            f"{source.key!r}: random_loc_seed and scaling in adapter_config.json say which "
            "frequencies these are. Give the folder that holds it."
        )
    seed, scaling = source.config.get("random_loc_seed", 777), source.config.get("scaling", 150.0)
    if not isinstance(seed, int) or not isinstance(scaling, int | float):
        raise UsageError(
            f"adapter_config.json: random_loc_seed is {seed!r} and scaling {scaling!r}; expected "
            "numbers."
        )
    found = {"spectrum": tensors["spectrum"], "seed": seed, "scale": float(scaling)}
    return {**found, "stored": "conv1d"} if source.conv1d else found


# writing ------------------------------------------------------------------------------------------


def write(fields: Mapping[str, str], module: WeightAdapter) -> dict[str, torch.Tensor]:
    """Suffix -> tensor in PEFT's orientation; a suffix that begins with `=` is a whole key. A scale
    that PEFT does not have goes into the tensor that is linear in the change.
    """
    own = {fields[n]: t for n, t in module.tensors().items() if n in fields}
    if isinstance(module, AdaLoRA):
        up, down = module.up, module.down.flatten(1)
        if module.stored == "conv1d":
            up, down = down.T, up.T
        return own | {fields["up"]: up, fields["down"]: down, fields["e"]: module.e.reshape(-1, 1)}
    if isinstance(module, VeRA):
        own[fields["lambda_b"]] = _with_scale(module.lambda_b, module, 1.0)
        pair = (module.down, module.up)
        shared = {f"=base_model.{n}": t for n, t in zip(SHARED, pair, strict=True) if t is not None}
        return own | shared
    if isinstance(module, C3A):
        return {fields["kernel"]: _with_scale(module.kernel, module, 1 / module.matrix_shape[1])}
    if isinstance(module, MiSS):
        return {fields["block"]: _with_scale(module.block, module, 1.0)}
    if isinstance(module, SHiRA):
        places = module.indices.to(torch.int32)
        values = _with_scale(module.values, module, 1.0)
        return {fields["values"]: values, fields["indices"]: places}
    return own


def _with_scale(tensor: torch.Tensor, module: WeightAdapter, held: float) -> torch.Tensor:
    """The tensor times what the module's scale is above the one that PEFT applies."""
    scale = float(module.scale)
    if module.magnitude is not None:
        raise Refused(f"PEFT has no DoRA on {module.algorithm}", LORA_ONLY)
    return tensor if scale == float32(held) else scaled(tensor, scale / held, tensor.dtype)


def config_of(kind: str, modules: Modules, source: Mapping[str, object]) -> Config:
    """The fields of `kind` that make PEFT build exactly these modules.

    Raises UnsupportedError naming a module that would need other numbers than the rest.
    """
    build: dict[str, Callable[[Modules, Mapping[str, object]], Config]] = {
        "adalora": _adalora,
        "vera": _vera,
        "fourierft": _fourierft,
        "c3a": _c3a,
        "miss": _miss,
        "bat": _bat,
        "shira": _shira,
    }
    config = build[kind](modules, source)
    valued = any(m.bias is not None and m.bias_is_value for m in modules.values())
    if kind != "shira":
        config["bias"] = f"{TYPES.get(kind, kind).lower()}_only" if valued else "none"
    elif valued:
        raise UnsupportedError(f"PEFT has no biases beside SHiRA. {REWRITE}.")
    return config


def _same(modules: Modules, what: str, of: Callable[[WeightAdapter], object]) -> object:
    """What all modules have in common; the first that differs is named."""
    (first, start), *rest = ((path, of(module)) for path, module in modules.items())
    for path, found in rest:
        if found != start:
            raise UnsupportedError(
                f"PEFT has one {what} for all modules; {first!r} has {start} and {path!r} {found}. "
                f"{REWRITE}."
            )
    return start


def _kept(source: Mapping[str, object], *names: str) -> Config:
    return {name: source[name] for name in names if name in source}


def _turned(modules: Modules) -> bool:
    return any(m.stored == "conv1d" for m in modules.values())


SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")


def _adalora(modules: Modules, source: Mapping[str, object]) -> Config:
    """`init_r` is the rank before pruning, and the divisor of the scale for ever; each module's own
    rank stands in `rank_pattern`, a list of `init_r` flags."""
    scale = _same(modules, "lora_alpha", lambda m: float(m.scale))
    assert isinstance(scale, float)
    ranks = {path: m.rank or 0 for path, m in modules.items()}
    first = max(ranks.values())
    known, alpha = source.get("init_r"), source.get("lora_alpha")
    if isinstance(known, int) and known >= first:
        first = known
    stated = alpha if isinstance(alpha, int | float) else 0
    if stated <= 0 or float32(adalora_scale(stated, first)) != scale:
        stated = _alpha(scale, first)
    config: Config = {
        "init_r": first,
        "lora_alpha": stated,
        "total_step": 1,
        "fan_in_fan_out": _turned(modules),
        **_kept(source, "total_step", *SCHEDULE, "lora_dropout", "init_lora_weights"),
    }
    given = source.get("rank_pattern")
    masks = given if isinstance(given, dict) else {}
    if masks or any(rank != first for rank in ranks.values()):
        config["rank_pattern"] = {
            f"{path}.lora_E": _mask(masks.get(f"{path}.lora_E"), rank, first)
            for path, rank in ranks.items()
        }
    return config


def _alpha(scale: float, first: int) -> float:
    """The roundest lora_alpha that gives this scale in fp32."""
    exact = scale * (first + 1e-5)
    if exact <= 0:
        raise UnsupportedError(
            f"PEFT takes a lora_alpha of at most 0 for the rank, and the scale is {scale:g}. "
            f"{REWRITE}."
        )
    for digits in range(10):
        candidate = round(exact, digits)
        if candidate > 0 and float32(adalora_scale(candidate, first)) == scale:
            return int(candidate) if candidate == int(candidate) else candidate
    return exact


def _mask(given: object, rank: int, first: int) -> list[bool]:
    """Which of the first ranks are left: as the source says, else the first ones."""
    if isinstance(given, list) and len(given) == first and sum(map(bool, given)) == rank:
        return [bool(flag) for flag in given]
    return [n < rank for n in range(first)]


def _vera(modules: Modules, source: Mapping[str, object]) -> Config:
    found = [m for m in modules.values() if isinstance(m, VeRA)]
    saved = [m.down is not None for m in found]
    if any(saved) != all(saved):
        raise UnsupportedError("some VeRA modules have their projections and others a seed.")
    seed = source.get("projection_prng_key", 0)
    if not all(saved):
        seed = _same(modules, "projection_prng_key", lambda m: isinstance(m, VeRA) and m.seed)
        largest = max(m.lambda_b.numel() for m in found)
        if any(m.widest[0] != largest for m in found):
            raise UnsupportedError(
                "VeRA's projections were not saved, and the largest of the layers they are drawn "
                "for is left out: PEFT would draw others. Pass --base CHECKPOINT, which saves them."
            )
    return {
        "r": _same(modules, "r", lambda m: m.rank),
        "projection_prng_key": seed,
        "save_projection": all(saved),
        "fan_in_fan_out": _turned(modules),
        **_kept(source, "vera_dropout", "d_initial", "init_weights"),
    }


def _fourierft(modules: Modules, source: Mapping[str, object]) -> Config:
    seed = _same(modules, "random_loc_seed", lambda m: isinstance(m, FourierFT) and m.seed)
    counts = {path: m.tensors()["spectrum"].numel() for path, m in modules.items()}
    number, pattern = _numbers(counts)
    return {
        "n_frequency": number,
        "n_frequency_pattern": pattern,
        "scaling": _same(modules, "scaling", lambda m: float(m.scale)),
        "random_loc_seed": seed,
        "fan_in_fan_out": _turned(modules),
        **_kept(source, "init_weights"),
    }


def _c3a(modules: Modules, source: Mapping[str, object]) -> Config:
    sizes = {path: m.block_size for path, m in modules.items() if isinstance(m, C3A)}
    number, pattern = _numbers(sizes)
    kept = _kept(source, "init_weights")
    return {"block_size": number, "block_size_pattern": pattern, **kept}


def _numbers(values: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """(the usual number, pattern -> another one). PEFT takes the first pattern that is the end of
    a longer name, whole levels, and else one that is the whole name. So where a listed name is the
    end of another, that one goes first, its upper levels in a lookbehind."""
    usual = int(common([float(n) for n in values.values()]))
    differ = [path for path, n in values.items() if n != usual]
    ends = [path for path in values if any(path.endswith(f".{d}") for d in differ)]
    listed: dict[str, int] = {}
    for path in sorted(ends, key=lambda path: -path.count(".")):
        upper, _, last = path.rpartition(".")
        listed[rf"(?<={re.escape(upper)}\.){re.escape(last)}"] = values[path]
    return usual, listed | {path: values[path] for path in differ if path not in ends}


def _miss(modules: Modules, source: Mapping[str, object]) -> Config:
    form = _same(modules, "init_weights", lambda m: "mini" if _mini(m) else True)
    if form is True and isinstance(source.get("init_weights"), bool):
        form = source["init_weights"]
    config: Config = {"r": _same(modules, "r", lambda m: m.rank), "init_weights": form}
    if form == "mini":
        config["mini_r"] = _same(modules, "mini_r", lambda m: m.tensors()["block"].shape[1])
    return config | _kept(source, "miss_dropout")


def _mini(module: WeightAdapter) -> bool:
    return isinstance(module, MiSS) and module.mini


def _bat(modules: Modules, source: Mapping[str, object]) -> Config:
    size = _same(modules, "r", lambda m: m.block_size if isinstance(m, Bat) else None)
    return {"r": size, "init_weights": "bat", **_kept(source, "miss_dropout")}


def _shira(modules: Modules, source: Mapping[str, object]) -> Config:
    """PEFT makes room for r · (o + i) numbers per module before it reads them."""
    known = source.get("r")
    ranks: dict[str, int] = {}
    for path, module in modules.items():
        assert isinstance(module, SHiRA)
        rows, columns = module.matrix_shape
        count = module.values.numel()
        if module.complete:
            rank, rest = divmod(count, rows + columns)
            if rest:
                raise UnsupportedError(
                    f"{path!r}: {count} numbers are not r times {rows} + {columns}, as PEFT wants "
                    f"them. {REWRITE}."
                )
            ranks[path] = rank
        elif isinstance(known, int):
            ranks[path] = known
        else:
            raise UnsupportedError(
                f"{path!r}: PEFT's r depends on the weight's shape, which a SHiRA does not tell. "
                "Pass --base CHECKPOINT."
            )
    (first, rank), *rest = ranks.items()
    for path, other in rest:
        if other != rank:
            raise UnsupportedError(
                f"PEFT has one r for all modules; {first!r} has {rank} and {path!r} {other}. "
                f"{REWRITE}."
            )
    return {"r": rank, "mask_type": "random", **_kept(source, "random_seed", "init_weights")}
