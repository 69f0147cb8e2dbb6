"""attach: fresh adapters of any algorithm, or those of a file, onto a live model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, nn

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import ALGORITHMS, Axis, Full, Replace, WeightAdapter
from peftsurgery.codec.foreign import foreign_type
from peftsurgery.errors import Finding, UnsupportedError, UsageError, nearest

from .freezing import check_order, freeze, keep_order
from .hosting import host, is_hosted, stack_of
from .loading import attach_file, components_of
from .making import Maker
from .merging import shared_parameters
from .quantized_start import check_replaceable, place
from .stack import Dropout, Entry, base_weight, parameter_of, slot_path
from .targets import Site, Target, named, select, sites

Algorithm = type[WeightAdapter] | str
Plan = Algorithm | tuple[Algorithm, Mapping[str, object]]


@dataclass
class Attached:
    """What `attach` did.

    modules      path -> the live adapter
    unmatched    names in the file without a module in the model (only when asked to go on)
    """

    name: str
    modules: dict[str, WeightAdapter]
    unmatched: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)

    @property
    def trainable(self) -> int:
        """Numbers that train."""
        unique = {id(p): p for m in self.modules.values() for p in m.parameters()}
        return sum(p.numel() for p in unique.values() if p.requires_grad)


def attach(
    model: nn.Module | object,
    algorithm: Algorithm | Adapter | Path | Mapping[Target, Plan],
    *,
    targets: Target | Iterable[Target] | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    name: str = "default",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude: Target | Iterable[Target] = (),
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    rank_dropout_scale: bool = False,
    module_dropout: float = 0.0,
    rslora: bool = False,
    dora: bool | Axis = False,
    bias: str = "none",
    modules_to_save: Iterable[Target] = (),
    init: str = "default",
    dtype: torch.dtype = torch.float32,
    generator: Generator | None = None,
    trainable: bool | None = None,
    strength: float = 1.0,
    architecture: str | None = None,
    unmatched: str = "error",
    **options: object,
) -> Attached:
    """Put adapters on a live model. The model stays what it is: see `hosting`.

    algorithm      a class or its name ("lora"), a map target -> algorithm or (algorithm, options)
                   with the first match deciding, or what to load: a path, or an `Adapter`. A string
                   that names no algorithm is a path or hub id.
    targets        names, globs, compiled expressions, predicates, "all-linear"; see
                   `targets.select`. Required for a fresh adapter unless a map gives them.
    rank, alpha    scale = alpha / rank, 1 without alpha; alpha / √rank with `rslora`
                   (arXiv 2312.03732). The patterns override them, first match first.
    dropout …      see `Dropout`
    dora           True or "out": magnitudes per output channel; "in": per input channel
    bias           "none", "targets" or "all": a trainable change of the biases
    modules_to_save   modules whose own weight and bias are trained, as copies
    init           see `inits`
    dtype          of the adapters' tensors, files included
    trainable      whether they train, and the base is frozen: by default fresh ones do
    strength       factor of the whole change
    architecture, unmatched="error" | "report"   for files: the model family, and what to do when a
                   module of the file is not in the model
    options        further arguments of the algorithm's `init`

    On a pipeline (an object with `components`) only files are attached. UsageError names targets
    without a match and names already taken, UnsupportedError a method that is known and not here
    ("prompt_tuning"); nothing is attached then.
    """
    if "." in name or "@" in name or "!" in name or not name:
        raise UsageError(f"adapter name {name!r}: must not be empty or hold '.', '@' or '!'.")
    if isinstance(algorithm, str) and not Path(algorithm).exists():
        _refuse_foreign(algorithm)
    if isinstance(algorithm, (Adapter, Path)) or (
        isinstance(algorithm, str) and algorithm not in ALGORITHMS
    ):
        if targets is not None or rank is not None or options:
            raise UsageError(
                f"{algorithm if isinstance(algorithm, str) else 'a file'!r} is loaded as it is: "
                "targets, rank and options belong to fresh adapters"
                + (_did_you_mean(algorithm) if isinstance(algorithm, str) else ".")
            )
        train = bool(trainable)
        if train:
            for part in components_of(model).values():
                check_order(part)
        loaded, missing, findings = attach_file(
            model,
            algorithm,
            name=name,
            architecture=architecture,
            unmatched=unmatched,
            dropout=Dropout(dropout, rank_dropout, rank_dropout_scale, module_dropout),
            dtype=dtype,
            trainable=train,
            strength=strength,
        )
        for part in components_of(model).values():
            keep_order(part)
            if train:
                freeze(part)
        return Attached(name, loaded, missing, findings)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{type(model).__name__}: fresh adapters go onto one model; give a component of it."
        )
    if trainable is not False:
        check_order(model)
    maker = Maker(
        rank,
        alpha,
        dict(rank_pattern or {}),
        dict(alpha_pattern or {}),
        rslora,
        _axis(dora),
        bias,
        init,
        dtype,
        generator,
    )
    known = sites(model)
    made: list[tuple[Site, Entry]] = []
    bases: dict[Entry, torch.Tensor] = {}
    chosen = _chosen(model, known, algorithm, targets, exclude, options)
    drop = Dropout(dropout, rank_dropout, rank_dropout_scale, module_dropout)
    for site, (kind, extra) in chosen.values():
        for slot in _slots(site, kind):
            begun = maker.make(site, kind, extra, slot)
            entry = Entry(
                name, begun.adapter, parameter=site.parameter, origin=begun.origin, dropout=drop
            )
            entry.bias, entry.slot = None if slot is not None else site.bias, slot
            if begun.base is not None:
                bases[entry] = begun.base
            made.append((site, entry))
    made += _beside(model, known, chosen, name, bias, tuple(modules_to_save), dtype)
    _check_free(made, name)
    for site, entry in made:
        entry.settle(site.layer)
    if bases:
        shared = shared_parameters(model)
        for site, entry in made:
            if entry in bases:
                check_replaceable(site.path, site.host, entry.parameter, shared)
    for site, entry in made:
        stack = host(site.host, site.layer, site.host_path)
        entry.adapter.requires_grad_(trainable is not False)
        entry.set_strength(strength)
        if entry in bases:
            place(site.host, entry, bases[entry])
        stack.add(entry)
    keep_order(model)
    if trainable is not False:
        freeze(model)
    live = {slot_path(site.path, entry.slot): entry.adapter for site, entry in made}
    return Attached(name, live)


def _slots(site: Site, kind: type[WeightAdapter]) -> Iterable[int | None]:
    """The slices of a stacked parameter (E, a, b) that each get an adapter of their own: all of
    them, but for algorithms that hold the whole tensor.
    """
    weight = parameter_of(site.host, site.parameter)
    if site.layer.kind != "parameter" or weight is None or weight.ndim != 3:
        return (None,)
    return (None,) if kind in (Full, Replace) else range(weight.shape[0])


def _refuse_foreign(name: str) -> None:
    """UnsupportedError for a method that is known and not here, in PEFT's spelling of its type."""
    known = foreign_type(name.upper().replace("-", "_"))
    if known is not None and name not in ALGORITHMS:
        raise UnsupportedError(f"{name!r} cannot be attached. {known.reason}")


def _did_you_mean(text: str) -> str:
    close = nearest(text, ALGORITHMS)
    return f" (no algorithm has that name; closest: {', '.join(close)})." if close else "."


def _axis(dora: bool | Axis) -> Axis | None:
    return "out" if dora is True else dora or None


def _check_free(made: list[tuple[Site, Entry]], name: str) -> None:
    for site, _ in made:
        if is_hosted(site.host) and name in stack_of(site.host):
            raise UsageError(f"{site.path}: an adapter {name!r} is attached; delete it first.")


Chosen = dict[str, tuple[Site, tuple[type[WeightAdapter], Mapping[str, object]]]]


def _chosen(
    model: nn.Module,
    known: Mapping[str, Site],
    algorithm: Algorithm | Mapping[Target, Plan],
    targets: Target | Iterable[Target] | None,
    exclude: Target | Iterable[Target],
    options: Mapping[str, object],
) -> Chosen:
    """Path -> site, algorithm and its options; of a map the first matching target decides."""
    plans: Mapping[Target, Plan] | None = None
    if isinstance(algorithm, Mapping):
        plans = algorithm
    elif targets is None:
        raise UsageError("attach needs `targets` (or a map from targets to algorithms).")
    found: Chosen = {}
    if plans is None:
        assert targets is not None
        assert not isinstance(algorithm, Mapping)
        for path, site in select(model, targets, exclude, known=known).items():
            found[path] = site, (_class(algorithm), options)
        return found
    allowed = known if targets is None else select(model, targets, known=known)
    for target, plan in plans.items():
        kind, extra = plan if isinstance(plan, tuple) else (plan, {})
        for path, site in select(model, target, exclude, known=known).items():
            if path in allowed and path not in found:
                found[path] = site, (_class(kind), {**options, **extra})
    return {path: found[path] for path in known if path in found}


def _class(algorithm: Algorithm) -> type[WeightAdapter]:
    if not isinstance(algorithm, str):
        return algorithm
    if algorithm not in ALGORITHMS:
        _refuse_foreign(algorithm)
        raise UsageError(f"no algorithm {algorithm!r}{_did_you_mean(algorithm)}")
    return ALGORITHMS[algorithm]


def _beside(
    model: nn.Module,
    known: Mapping[str, Site],
    chosen: Chosen,
    name: str,
    bias: str,
    saved: tuple[Target, ...],
    dtype: torch.dtype,
) -> list[tuple[Site, Entry]]:
    """Entries for biases of untargeted layers and for modules trained whole."""
    if bias not in ("none", "targets", "lora_only", "all"):
        raise UsageError(f"bias={bias!r}: expected 'none', 'targets' or 'all'.")
    made: list[tuple[Site, Entry]] = []
    taken = set(chosen)
    for target in saved:
        inside = [
            path
            for path, site in known.items()
            if _below(target, path)
            or (not (isinstance(target, str) or _is_pattern(target)) and _calls(target, path, site))
        ]
        if not inside:
            raise UsageError(f"modules_to_save: {target!r} names no module of the model.")
        for path in inside:
            if path in taken:
                raise UsageError(f"{path}: is both a target and in modules_to_save.")
            taken.add(path)
            site = known[path]
            value = base_weight(site.host, site.parameter).detach().to(dtype, copy=True)
            old = parameter_of(site.host, site.bias)
            kept = None if old is None else nn.Parameter(old.detach().to(dtype, copy=True))
            adapter = Replace(nn.Parameter(value), bias=kept, stored=site.layer.stored)
            made.append((site, Entry(name, adapter, parameter=site.parameter, bias=site.bias)))
    if bias == "all":
        for path, site in known.items():
            old = parameter_of(site.host, site.bias)
            if path not in taken and old is not None:
                zero = nn.Parameter(torch.zeros(old.shape, dtype=dtype, device=old.device))
                adapter = Full(bias=zero)
                made.append((site, Entry(name, adapter, parameter=site.parameter, bias=site.bias)))
    return made


def _is_pattern(target: object) -> bool:
    return hasattr(target, "fullmatch")


def _below(target: Target, path: str) -> bool:
    """Whether a target names the path or a module above it."""
    if not (isinstance(target, str) or _is_pattern(target)):
        return False
    parts = path.split(".")
    return any(named(target, ".".join(parts[:n])) for n in range(1, len(parts) + 1))


def _calls(target: Target, path: str, site: Site) -> bool:
    return callable(target) and bool(target(path, site.module))
