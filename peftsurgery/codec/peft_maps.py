"""adapter_config.json of OFT, BOFT, HRA and IA3: one set of numbers for all modules, as PEFT has
it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peftsurgery.algorithms import BOFT, HRA, IA3, OFT, WeightAdapter
from peftsurgery.codec import peft_only, projections
from peftsurgery.codec.map_shapes import version_of
from peftsurgery.codec.maps import PEFT_TERMS
from peftsurgery.errors import UnsupportedError

KINDS = ("oft", "boft", "hra", "ia3", *peft_only.KINDS, *projections.KINDS)
REWRITE = "--base CHECKPOINT --algorithm lora rewrites it as a LoRA"
DEFAULT_EPS = 6e-5
HALF_LAST = "0.18.0"  # the first PEFT version whose Neumann series ends with half a term
Modules = Mapping[str, WeightAdapter]
Config = dict[str, object]


def map_config(kind: str, modules: Modules, source: Mapping[str, object]) -> Config:
    """The fields of `kind` that make PEFT build exactly these modules.

    Raises UnsupportedError naming a module that would need other numbers than the rest.
    """
    if kind in peft_only.KINDS:
        return peft_only.config_of(kind, modules, source)
    if kind in projections.KINDS:
        return projections.config_of(kind, modules, source)
    build: dict[str, Callable[[Modules, Mapping[str, object]], Config]] = {
        "oft": _oft,
        "boft": _boft,
        "hra": _hra,
        "ia3": _ia3,
    }
    config = build[kind](modules, source)
    valued = any(m.bias is not None and m.bias_is_value for m in modules.values())
    if kind != "ia3":
        config.setdefault("bias", f"{kind}_only" if valued else "none")
    for name in ("module_dropout", "boft_dropout"):
        if name in source:
            config[name] = source[name]
    return config


def _same(modules: Modules, what: str, of: Callable[[WeightAdapter], object]) -> object:
    """What all modules have in common; the first that differs is named."""
    first, wanted = "", None
    for path, module in modules.items():
        found = of(module)
        if not first:
            first, wanted = path, found
        elif found != wanted:
            raise UnsupportedError(
                f"PEFT has one {what} for all modules; {first!r} has {wanted} and {path!r} "
                f"{found}. {REWRITE}."
            )
    return wanted


def _oft(modules: Modules, source: Mapping[str, object]) -> Config:
    rotations = {p: m for p, m in modules.items() if isinstance(m, OFT)}
    series = _same(rotations, "kind of Cayley transform", lambda m: _oft_of(m).series)
    half = _same(rotations, "kind of Neumann series", lambda m: _oft_of(m).half_last)
    limit = _same(rotations, "eps of COFT", lambda m: _oft_of(m).limit)
    shared = _same(rotations, "block_share", lambda m: _oft_of(m).shared)
    size, count = _oft_blocks(rotations, source)
    config: Config = {
        "r": count,
        "oft_block_size": size,
        "use_cayley_neumann": bool(series),
        "num_cayley_neumann_terms": series or source.get("num_cayley_neumann_terms", PEFT_TERMS),
        "coft": limit is not None,
        "eps": DEFAULT_EPS if limit is None else limit,
        "block_share": shared,
    }
    known = source.get("peft_version")
    fits = (version_of(source) >= (0, 18)) == half
    if half or not series:
        config["peft_version"] = known if known and fits else HALF_LAST
    elif known and fits:
        config["peft_version"] = known
    return config


def _oft_of(module: WeightAdapter) -> OFT:
    assert isinstance(module, OFT)
    return module


def _oft_blocks(modules: Mapping[str, OFT], source: Mapping[str, object]) -> tuple[int, int]:
    """(oft_block_size, r), one of them 0, under which PEFT gives every module its blocks.

    PEFT moves a number that does not divide a layer's inputs to the nearest one that does.
    """
    sizes = [m.block_size for m in modules.values()]
    stated = source.get("oft_block_size")
    candidates = [stated] if isinstance(stated, int) and stated else []
    for size in dict.fromkeys([*candidates, *sizes]):
        if all(
            m.block_size == (size if m.shared else _adjusted(m.count * m.block_size, size))
            for m in modules.values()
        ):
            return size, 0
    counts = dict.fromkeys(m.count for m in modules.values())
    for count in counts:
        if all(
            not m.shared and m.count == _adjusted(m.count * m.block_size, count)
            for m in modules.values()
        ):
            return 0, count
    raise UnsupportedError(
        f"no oft_block_size or r gives all modules their blocks (sizes {sorted(set(sizes))}), and "
        f"PEFT has one for all. {REWRITE}."
    )


def _adjusted(width: int, wanted: int) -> int:
    """PEFT's `adjust_oft_parameters`: the divisor of `width` nearest to `wanted`, the smaller of
    two; `width` itself for anything larger."""
    if wanted >= width:
        return width
    below = next(n for n in range(wanted, 0, -1) if width % n == 0)
    above = next(n for n in range(wanted, width + 1) if width % n == 0)
    return below if wanted - below <= above - wanted else above


def _boft(modules: Modules, source: Mapping[str, object]) -> Config:
    blocks = {p: m.blocks.shape for p, m in modules.items() if isinstance(m, BOFT)}
    depth = _same(modules, "boft_n_butterfly_factor", lambda m: m.tensors()["blocks"].shape[0])
    config: Config = {"boft_n_butterfly_factor": depth}
    sizes = {shape[2] for shape in blocks.values()}
    if len(sizes) == 1 and not (source.get("boft_block_num") and _one(blocks, 1)):
        return {**config, "boft_block_size": sizes.pop(), "boft_block_num": 0}
    if not _one(blocks, 1):
        raise UnsupportedError(
            f"PEFT has one boft_block_size or boft_block_num for all modules, and these have "
            f"blocks of {sorted(sizes)}. {REWRITE}."
        )
    return {**config, "boft_block_size": 0, "boft_block_num": next(iter(blocks.values()))[1]}


def _one(shapes: Mapping[str, tuple[int, ...]], axis: int) -> bool:
    return len({shape[axis] for shape in shapes.values()}) == 1


def _hra(modules: Modules, source: Mapping[str, object]) -> Config:
    found = [m for m in modules.values() if isinstance(m, HRA)]
    assert found
    return {
        "r": _same(modules, "r", lambda m: m.tensors()["u"].shape[1]),
        "apply_GS": _same(modules, "apply_GS", lambda m: isinstance(m, HRA) and m.orthogonal),
    }


def _ia3(modules: Modules, source: Mapping[str, object]) -> Config:
    inputs = {
        path
        for path, m in modules.items()
        if isinstance(m, IA3) and (m.acts_on == "in") != (m.stored == "conv1d")
    }
    wanted = source.get("feedforward_modules")
    if not (isinstance(wanted, list) and _selects(wanted, modules, inputs)):
        wanted = sorted(inputs)
        if not _selects(wanted, modules, inputs):
            raise UnsupportedError(
                "PEFT names the modules whose inputs are scaled by the end of their name, and "
                f"{wanted[0]!r} is also the end of another. {REWRITE}."
            )
    transposed = any(m.stored == "conv1d" for m in modules.values())
    return {"feedforward_modules": wanted, "fan_in_fan_out": transposed}


def _selects(wanted: list, modules: Modules, inputs: set[str]) -> bool:
    """Whether PEFT's rule, the end of the name, finds exactly the input-side modules."""
    return {p for p in modules if any(p.endswith(str(w)) for w in wanted)} == inputs
