"""adapter_config.json and diffusers' lora_adapter_metadata: exact rank, alpha and flags of what is
written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import LoKr, LoRA, WeightAdapter
from peftsurgery.codec import peft_only, projections
from peftsurgery.codec.peft_maps import KINDS, map_config
from peftsurgery.codec.scales import alpha_of, common, patterns
from peftsurgery.errors import UnsupportedError
from peftsurgery.linalg import factorization

CARRIED = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "layer_replication",
    "modules_to_save",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "init_lora_weights",
    "bias",
    "lora_dropout",
    "fan_in_fan_out",
)
LORA_ONLY = ("layer_replication", "target_parameters", "init_lora_weights", "lora_dropout", "bias")
SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # narrow target_modules


def build(
    modules: Mapping[str, WeightAdapter], adapter: Adapter, component: str
) -> dict[str, object]:
    """The adapter_config.json that makes PEFT build exactly these modules with these scales.

    modules: dotted path -> adapter. Raises UnsupportedError when no single PEFT config can say it:
    several algorithms, DoRA on some modules only, LoKr factors that PEFT's factorisation rule would
    not produce.
    """
    known = ("lora", "loha", "lokr", *KINDS)
    trained = {tail(p): m for p, m in modules.items() if m.algorithm in known}
    values = {p: m for p, m in modules.items() if m.algorithm == "set"}
    tokens = {p: m for p, m in trained.items() if m.algorithm == "tokens"}
    kinds = {m.algorithm for m in trained.values()}
    if kinds == {"lora", "tokens"}:
        trained = {p: m for p, m in trained.items() if p not in tokens}
        kinds = {"lora"}
    if not kinds and peft_only.are_values({"set"}, values, adapter.config):
        trained, values, kinds = {tail(p): m for p, m in values.items()}, {}, {"set"}
    if not kinds:
        raise UnsupportedError(
            "a PEFT folder needs a trained module (LoRA, LoHa, LoKr, …) beside new values, and "
            f"{component!r} "
            "has none. --to comfy holds values alone."
        )
    if len(kinds) != 1:
        raise UnsupportedError(
            f"a PEFT folder holds one algorithm, and {component!r} has "
            f"{', '.join(sorted(kinds)) or 'none'}. "
            "--algorithm lora makes them one."
        )
    kind = kinds.pop()
    if kind == "tokens" and values:
        raise UnsupportedError(
            "PEFT's trainable tokens have no modules_to_save, and new values lie beside them. "
            "--to comfy holds values."
        )
    source: Mapping[str, object] = adapter.config
    config: dict[str, object] = {
        "peft_type": (peft_only.TYPES | projections.TYPES).get(kind, kind.upper()),
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
        **{name: source[name] for name in CARRIED if name in source},
    }
    if not modules_same_names(source, trained):
        config["target_modules"] = targets([p for p in modules if tail(p) in trained])
        for name in SELECTING:
            config.pop(name, None)
    else:
        config["target_modules"] = source["target_modules"]
    config.pop("modules_to_save", None)
    if values:
        config["modules_to_save"] = _saved(source.get("modules_to_save"), values)
    if kind == "set":
        return {n: v for n, v in config.items() if n not in LORA_ONLY}
    if kind in KINDS:
        config = {n: v for n, v in config.items() if n not in LORA_ONLY}
        return config | map_config(kind, trained, source)
    config.update(_ranks(trained, kind, rslora=bool(source.get("use_rslora"))))
    if kind == "lora":
        _lora_flags(config, trained)
        if tokens:
            config |= peft_only.beside_lora(tokens, source)
    elif any(m.magnitude is not None for m in trained.values()):
        raise UnsupportedError(
            f"PEFT has no DoRA on {kind}; --base with --algorithm lora bakes it in"
        )
    else:
        _product_flags(config, trained, kind, source)
    return config


def _saved(wanted: object, values: Collection[str]) -> list[str]:
    """modules_to_save: the source's own names that still mean something, if they cover all."""
    names = [str(name) for name in wanted] if isinstance(wanted, list) else []
    kept = [name for name in names if any(_ends(value, name) for value in values)]
    return kept if all(any(_ends(v, w) for w in kept) for v in values) else sorted(values)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def modules_same_names(source: Mapping[str, object], modules: Mapping[str, WeightAdapter]) -> bool:
    """Whether the config's own target_modules still selects every module written."""
    wanted = source.get("target_modules")
    if isinstance(wanted, str):
        if wanted == "all-linear":
            return True
        return all(re.fullmatch(wanted, path) for path in modules)
    if isinstance(wanted, list) and wanted:
        every = all(any(_ends(p, t) for t in wanted) for p in modules)
        return every and all(any(_ends(p, t) for p in modules) for t in wanted)
    return False


def tail(path: str) -> str:
    """The part of a module path that patterns and targets name.

    PEFT matches both on the end of a path, and CLIPTextModel has lost its `text_model` level in
    transformers 5.6: without it they hold for either.
    """
    return path.removeprefix("text_model.")


def targets(modules: Collection[str]) -> list[str] | str:
    """target_modules that selects exactly `modules`.

    PEFT selects a list by suffix, so a top-level name would also catch namesakes deeper in the
    model (`proj_out` in `blocks.0.proj_out`); then a regular expression is written, which PEFT
    matches whole. `text_model` may be missing in the model (see `tail`).
    """
    names = sorted(tail(name) for name in modules)
    if all("." in name for name in names):
        return names
    level = r"(?:text_model\.)?" if any(name != tail(name) for name in modules) else ""
    return "|".join((level if "." in name else "") + re.escape(name) for name in names)


def _ranks(modules: Mapping[str, WeightAdapter], kind: str, *, rslora: bool) -> dict[str, object]:
    ranks = {p: m.rank for p, m in modules.items() if m.rank is not None}
    full = [p for p in modules if p not in ranks]
    default = int(common([float(r) for r in ranks.values()])) if ranks else 0
    for path in full:  # LoKr with two full factors: PEFT keeps them full when r is large
        ranks[path] = default = max(default, full_rank(modules[path]))
    alphas = {
        p: alpha_of(float(m.scale), ranks[p], rslora=rslora and kind == "lora")
        for p, m in modules.items()
    }
    alpha = common(list(alphas.values()))
    return {
        "r": default,
        ("lora_alpha" if kind == "lora" else "alpha"): int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {k: int(v) for k, v in patterns(ranks, default).items()},
        "alpha_pattern": patterns(alphas, alpha),
        **({"use_rslora": rslora} if kind == "lora" else {}),
    }


def full_rank(module: WeightAdapter) -> int:
    """The r at which PEFT keeps both LoKr factors full, whatever decompose_both says: the largest
    of a, b, c and d.
    """
    assert isinstance(module, LoKr)
    return max(block_shape(module))


def block_shape(module: LoKr) -> tuple[int, int, int, int]:
    """(a, b, c, d) of W1 `[a, c]` ⊗ W2 `[b, d, …]`."""
    own = module.tensors()
    a = (own["w1"] if "w1" in own else own["w1_a"]).shape[0]
    c = (own["w1"] if "w1" in own else own["w1_b"]).shape[1]
    if "w2" in own:
        b, d = own["w2"].shape[:2]
    else:  # a convolution's w2_b runs over the kernel too
        b, d = own["w2_a"].shape[1 if "t2" in own else 0], module.shape[1] // c
    return a, b, c, d


def _lora_flags(config: dict[str, object], modules: Mapping[str, WeightAdapter]) -> None:
    dora = [m.magnitude is not None for m in modules.values()]
    if any(dora) and not all(dora):
        raise UnsupportedError(
            f"PEFT's use_dora is one switch for all modules, and {sum(dora)} of {len(dora)} carry "
            "a magnitude. "
            "--base with --algorithm lora bakes it in."
        )
    config["use_dora"] = any(dora)
    config["lora_bias"] = any(
        isinstance(m, LoRA) and m.bias is not None and not m.bias_is_value for m in modules.values()
    )
    config["fan_in_fan_out"] = any(m.stored == "conv1d" for m in modules.values())
    valued = any(m.bias is not None and m.bias_is_value for m in modules.values())
    config.setdefault("bias", "lora_only" if valued else "none")


def _product_flags(
    config: dict[str, object],
    modules: Mapping[str, WeightAdapter],
    kind: str,
    source: Mapping[str, object],
) -> None:
    tucker_field = "t1" if kind == "loha" else "t2"
    tucker = [m for m in modules.values() if tucker_field in m.tensors()]
    config["use_effective_conv2d"] = bool(tucker)
    if kind != "lokr":
        return
    lokr = {p: m for p, m in modules.items() if isinstance(m, LoKr)}
    config["decompose_both"] = any("w1_a" in m.tensors() for m in lokr.values())
    factor = source.get("decompose_factor")
    config["decompose_factor"] = factor if isinstance(factor, int) else _factor(lokr)
    _check_lokr(config, lokr)


def _check_lokr(config: Mapping[str, object], modules: Mapping[str, LoKr]) -> None:
    """PEFT decides by r which factors are full (`tuners/lokr/layer.py`); the file must agree."""
    ranks = config["rank_pattern"]
    assert isinstance(ranks, dict)
    for path, module in modules.items():
        a, b, c, d = block_shape(module)
        r = ranks.get(path, ranks.get("^" + path, config["r"]))
        own = module.tensors()
        full = {
            "w1": not (config["decompose_both"] and r < max(a, c) / 2),
            "w2": r >= max(b, d) / 2,
        }
        for name, expected in full.items():
            if (name in own) != expected:
                raise UnsupportedError(
                    f"{path!r}: PEFT wants lokr_{name} {'whole' if expected else 'factored'} at r "
                    f"= {r}, "
                    f"and it is {'whole' if name in own else 'factored'} here. "
                    "--algorithm lora rewrites it as a LoRA."
                )


def _factor(modules: Mapping[str, LoKr]) -> int:
    """The decompose_factor under which PEFT's rule gives the shapes of every module."""
    shapes = {path: block_shape(m) for path, m in modules.items()}
    candidates = [-1, *(n for n, _ in Counter(a for (a, _, _, _) in shapes.values()).most_common())]
    candidates += [c for (_, _, c, _) in shapes.values()]
    for factor in dict.fromkeys(candidates):
        if all(
            factorization(a * b, factor, ordered=False) == (a, b)
            and factorization(c * d, factor, ordered=False) == (c, d)
            for a, b, c, d in shapes.values()
        ):
            return factor
    path, (a, b, c, d) = next(iter(shapes.items()))
    raise UnsupportedError(
        f"{path!r}: LoKr blocks {a}x{c} and {b}x{d} fit no single decompose_factor, and PEFT has "
        "one for all modules. "
        "--algorithm lora rewrites it as a LoRA."
    )


def diffusers_metadata(
    written: Mapping[str, Mapping[str, WeightAdapter]],
) -> dict[str, object] | None:
    """The `component.field` mapping diffusers packs into lora_adapter_metadata; None when every
    scale is 1.

    diffusers takes alpha = rank for every module without it (`utils/peft_utils.py`).
    """
    packed: dict[str, object] = {}
    for component, modules in written.items():
        trained = {tail(p): m for p, m in modules.items() if isinstance(m, LoRA)}
        if not trained:
            continue
        for name, value in _ranks(trained, "lora", rslora=False).items():
            packed[f"{component}.{name}"] = value
        packed[f"{component}.target_modules"] = targets([p for p in modules if tail(p) in trained])
        packed[f"{component}.use_dora"] = any(m.magnitude is not None for m in trained.values())
        packed[f"{component}.lora_bias"] = any(m.bias is not None for m in trained.values())
        packed[f"{component}.bias"] = "none"
        packed[f"{component}.peft_type"] = "LORA"
    if all(float(m.scale) == 1.0 for found in written.values() for m in found.values()):
        return None
    return packed
