"""Which modules of an adapter have a rank that can change, and as what they are written then."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import Full, LoKr, LoRA, WeightAdapter, norm
from peftsurgery.algorithms.slots import widest
from peftsurgery.codec import BaseWeights
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.operations.grams import Grams
from peftsurgery.operations.refit import weight_for
from peftsurgery.operations.truncating import Subject

ALGORITHMS = ("lora", "keep")


@dataclass(frozen=True)
class Subjects:
    """What is resized, in the adapter's order, and what is carried as it is."""

    resized: list[Subject]
    carried: dict[str, str] = field(default_factory=dict)  # path -> why
    by_path: dict[str, Subject] = field(default_factory=dict)


def find_subjects(
    adapter: Adapter,
    weights: BaseWeights | None,
    *,
    algorithm: str | None,
    dtype: torch.dtype | None,
    grams: Grams | None = None,
) -> Subjects:
    """The modules to resize.

    LoRA, LoHa and LoKr become LoRA (a Tucker core is multiplied into down); full differences, new
    values and rotations do too with algorithm "lora" and stay as they are otherwise. With "keep" a
    LoKr stays one, and what cannot stay in its algorithm is refused. Norms and pure bias changes
    are always carried.

    Raises UnsupportedError naming the module when it cannot be done, or not without `weights`.
    """
    resized: list[Subject] = []
    carried: dict[str, str] = {}
    for path, module in adapter.modules.items():
        for name in ("magnitude", "bias"):  # of the factors the SVD tells
            tensor = module.tensors().get(name)
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise UsageError(f"{path}: its {name} has NaN or Inf.")
        if len(module.shape) < 2 or set(module.tensors()) <= {"bias"}:
            carried[path] = "has no rank"
            continue
        if module.algorithm not in ("lora", "loha", "lokr") and algorithm != "lora":
            carried[path] = f"{module.algorithm} has no rank; --algorithm lora fits it"
            continue
        gram = None if grams is None else grams.of(path)
        if algorithm == "keep" and module.algorithm != "lora":
            if gram is not None:
                raise UnsupportedError(
                    f"{path}: --gram weighs the inputs of a LoRA, and {module.algorithm} would be "
                    "kept. Leave one of --gram and --algorithm keep out."
                )
            resized.append(_kept(path, module, dtype))
        else:
            resized.append(_as_lora(path, module, weights, algorithm, dtype, gram))
    return Subjects(resized, carried, {s.path: s for s in resized})


def _as_lora(
    path: str,
    module: WeightAdapter,
    weights: BaseWeights | None,
    algorithm: str | None,
    dtype: torch.dtype | None,
    gram: Callable[[], Tensor] | None,
) -> Subject:
    if algorithm == "keep" and module.tensors().get("mid") is not None:
        raise UnsupportedError(
            f"{path}: a Tucker LoRA has two ranks and no optimal truncation. Without --algorithm "
            "keep it becomes a plain LoRA."
        )
    bare = module
    if module.magnitude is not None:
        bare = module.with_tensors(magnitude=None, magnitude_axis=None)
    weight = weight_for(path, bare, weights)
    if not bare.additive:
        bare = Full.fit(bare, weight)
    scale = float(bare.scale) if isinstance(bare, LoRA) else 1.0
    gain, product = abs(scale), bare
    if isinstance(bare, LoRA):
        scale, gain = (scale, gain) if scale else (1.0, 0.0)
        product = bare.with_tensors(scale=1.0 if gain else 0.0, bias=None, padded_shape=None)
    shape = bare.shape if weight is None else (module.padded_shape or tuple(weight.shape))
    common = module.common()
    if bare.bias is not module.bias:
        common.update(bias=bare.bias, bias_is_value=bare.bias_is_value)

    def rebuilt(up: Tensor, down: Tensor, new_scale: float) -> WeightAdapter:
        k, ones = down.shape[0], (1,) * (len(shape) - 2)
        common["scale"] = new_scale
        return LoRA(up.reshape(-1, k, *ones), down.reshape(k, *shape[1:]), **common)

    factors = [t for n, t in bare.tensors().items() if n not in ("magnitude", "bias")]
    plain = isinstance(bare, LoRA) and bare.mid is None
    return Subject(
        path,
        module,
        product,
        rebuilt,
        scale,
        gain if isinstance(bare, LoRA) else 1.0,
        dtype or widest(factors),
        math.prod(shape[2:]) > 1,
        plain,
        gram,
    )


def _kept(path: str, module: WeightAdapter, dtype: torch.dtype | None) -> Subject:
    """A LoKr with w2 = w2_a @ w2_b: ||w1 ⊗ E||_F = ||w1||_F ||E||_F, so truncating w2 is optimal
    among the LoKrs with this w1."""
    if not isinstance(module, LoKr) or module.w2_a is None or module.w2_b is None:
        what = "a whole w2 has no rank" if isinstance(module, LoKr) else "no truncation is known"
        raise UnsupportedError(
            f"{path}: {module.algorithm} cannot be resized and kept: {what}. Without --algorithm "
            "keep it becomes a LoRA."
        )
    if module.t2 is not None or module.w1 is None:
        raise UnsupportedError(
            f"{path}: only a LoKr with a whole w1 and w2_a @ w2_b can be resized and kept. Without "
            "--algorithm keep it becomes a LoRA."
        )
    tail = module.w2_b.shape[1:]

    def rebuilt(up: Tensor, down: Tensor, scale: float) -> WeightAdapter:
        return module.with_tensors(w2_a=up, w2_b=down.reshape(-1, *tail), scale=scale)

    product = LoRA(module.w2_a, module.w2_b)
    bare = module.with_tensors(magnitude=None, magnitude_axis=None)
    whole, part = norm(bare), norm(product)
    return Subject(
        path,
        module,
        product,
        rebuilt,
        float(module.scale),
        whole / part if part else 0.0,
        dtype or widest([module.w2_a, module.w2_b]),
        math.prod(module.shape[2:]) > 1,
        False,
    )


def at_rank(subject: Subject, rank: int) -> WeightAdapter:
    """The module with factors of that rank on the meta device: shapes and dtypes only."""
    o, n = subject.shape
    up = torch.empty(o, rank, dtype=subject.dtype, device="meta")
    down = torch.empty(rank, n, dtype=subject.dtype, device="meta")
    return subject.rebuilt(up, down, subject.scale)


def outline(adapter: Adapter, subjects: Subjects, ranks: Mapping[str, int]) -> Adapter:
    """The adapter at these ranks with its factors on the meta device."""
    modules = {
        path: at_rank(subjects.by_path[path], ranks[path]) if path in ranks else module
        for path, module in adapter.modules.items()
    }
    return Adapter(
        modules,
        adapter.architecture,
        adapter.layout,
        adapter.extras,
        adapter.metadata,
        adapter.config,
        adapter.parameters,
        [],
        adapter.magnitude_ndim,
    )
