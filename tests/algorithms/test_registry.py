"""The laws of every algorithm in the registry, on every layer and in fp32 and bf16."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from peftsurgery import load_adapter, save_adapter
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import ALGORITHMS, LoRA, WeightAdapter, difference
from peftsurgery.algorithms.layer import Layer
from peftsurgery.errors import CannotFuse, CannotSplit, UnsupportedError, UsageError
from tests.algorithms.cases import close, draw
from tests.algorithms.starts import STARTS

SHAPES = {
    "linear": (12, 8),
    "hf_conv1d": (8, 12),
    "embedding": (12, 8),
    "conv1d": (12, 8, 3),
    "conv1x1": (12, 8, 1, 1),
    "conv3x3": (12, 8, 3, 3),
    "norm": (12,),
}
CONVOLUTIONS = ("conv1d", "conv1x1", "conv3x3")
NOT_ON: dict[str, set[str]] = {  # algorithms that do not start on such a weight, and say so
    "linear": set(),
    "hf_conv1d": {"road", "road-4"},
    "embedding": {"road", "road-4"},
    **{kind: {"delora", "tokens"} for kind in CONVOLUTIONS},
    "norm": set(STARTS) - {"full", "set", "ia3"},
}
DTYPES = (torch.float32, torch.bfloat16)
PAIRS = [(start, kind) for start in STARTS for kind in SHAPES if start not in NOT_ON[kind]]

every = pytest.mark.parametrize(("start", "kind"), PAIRS, ids=lambda v: v)
both = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def described(kind: str) -> Layer:
    kernel = SHAPES[kind][2:]
    if kind in CONVOLUTIONS:
        ones = (1,) * len(kernel)
        return Layer("conv", ones, ones, ones, 1, "zeros", kernel)
    return Layer(kind)  # type: ignore[arg-type]


def fresh(start: str, weight: Tensor, kind: str, rng: Generator, dtype: torch.dtype) -> Any:
    algorithm, options = STARTS[start]
    options = dict(options)
    dora = options.pop("dora", None)
    made = ALGORITHMS[algorithm].init(
        weight,
        **{"rank": None, **options},
        generator=rng,
        stored=described(kind).stored,
        dtype=dtype,
    )
    if dora is None:
        return made
    axis = "out" if dora is True else dora
    others = [d for d in range(weight.ndim) if d != (0 if axis == "out" else 1)]
    norms = nn.Parameter(torch.linalg.vector_norm(weight.float(), dim=others).to(dtype))
    return made.with_tensors(magnitude=norms, magnitude_axis=axis)


def trained(
    start: str, kind: str, rng: Generator, dtype: torch.dtype
) -> tuple[WeightAdapter, Tensor]:
    """(adapter with noise in every trained tensor, weight)."""
    weight = draw(rng, *SHAPES[kind], dtype=dtype)
    adapter = fresh(start, weight, kind, rng, dtype)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                noise = 0.3 * draw(rng, *parameter.shape)
                parameter.add_(noise.to(dtype))
    return adapter, weight


def test_every_algorithm_has_a_start() -> None:
    assert {algorithm for algorithm, _ in STARTS.values()} == set(ALGORITHMS)


@pytest.mark.parametrize("kind", SHAPES)
def test_what_does_not_start_on_a_weight_says_so(kind: str, rng: Generator) -> None:
    for start in NOT_ON[kind]:
        if STARTS[start][1].get("dora"):
            continue
        with pytest.raises(UsageError):
            fresh(start, draw(rng, *SHAPES[kind]), kind, rng, torch.float32)


@every
@both
def test_a_fresh_adapter_changes_nothing(
    start: str, kind: str, dtype: torch.dtype, rng: Generator
) -> None:
    weight = draw(rng, *SHAPES[kind], dtype=dtype)
    adapter = fresh(start, weight, kind, rng, dtype)
    assert any(p.requires_grad for p in adapter.parameters())
    assert all(p.dtype == dtype for p in adapter.parameters())
    change = float(adapter.delta(weight).detach().abs().max())
    rounded = start in ("hra", "dora", "dora-in")  # reflections and norms, to rounding
    assert change <= (10 * torch.finfo(dtype).eps if rounded else 0)
    merged, _ = adapter.merged(weight, None, 0)
    assert torch.equal(merged, weight.float())


@every
@both
def test_activations_are_those_of_the_merged_weight(
    start: str, kind: str, dtype: torch.dtype, rng: Generator
) -> None:
    adapter, weight = trained(start, kind, rng, dtype)
    merged, bias = adapter.merged(weight, strength=0.7)
    assert not torch.equal(merged, weight.float())
    layer, side = described(kind), adapter.side
    if side == "weight" or kind == "norm" or not (adapter.additive or side != "sum"):
        return
    if kind == "embedding":
        x = torch.randint(0, 12, (2, 5), generator=rng)
        if side != "sum":
            return  # tokens have no channels to turn
    elif kind in CONVOLUTIONS:
        x = draw(rng, 2, 8, *(5 for _ in SHAPES[kind][2:]), dtype=dtype)
    else:
        x = draw(rng, 3, 8, dtype=dtype)
    wide = x.float() if x.is_floating_point() else x
    wanted = layer.apply(wide, merged, bias)
    base = layer.apply(x, weight)
    if side == "sum":
        found = base.float() + 0.7 * adapter.change(x, layer).float()
    elif side == "input":
        found = layer.apply(adapter.turned(x, layer, 0.7).to(x.dtype), weight)
    elif side == "output":
        found = adapter.mapped(base, layer, None, 0.7)
    else:
        assert side == "both"
        turned = layer.apply(adapter.turned(x, layer, 1.0).to(x.dtype), weight)
        found = base + 0.7 * (adapter.mapped(turned, layer, None, 1.0) - base)
    close(found, wanted, 1e-5 if dtype == torch.float32 else 2e-2)


@every
@both
def test_gradients_reach_every_trained_tensor(
    start: str, kind: str, dtype: torch.dtype, rng: Generator
) -> None:
    adapter, weight = trained(start, kind, rng, dtype)
    (adapter.merged(weight)[0] * draw(rng, *weight.shape)).sum().backward()
    for name, tensor in adapter.tensors().items():
        if not tensor.requires_grad:
            assert (start, name) == ("delora", "norms")
            continue
        assert tensor.grad is not None, name
        assert bool(torch.isfinite(tensor.grad).all()), name
        assert float(tensor.grad.abs().max()) > 0, name


WHOLE = {"dora-in", "fourierft"}  # every row looks at all, or at all numbers of the change
APART = {("vera", "hf_conv1d")}  # the parts do not tell how many rows they have


@every
@both
def test_rows_are_exact_or_refused(
    start: str, kind: str, dtype: torch.dtype, rng: Generator
) -> None:
    adapter, weight = trained(start, kind, rng, dtype)
    whole, rows = adapter.merged(weight)[0], weight.shape[0]
    half = 4  # between blocks of every algorithm that has some
    try:
        parts = [adapter.rows(0, half), adapter.rows(half, rows)]
    except CannotSplit:
        assert start in WHOLE
        return
    assert start not in WHOLE
    tolerance = 5e-6 if dtype == torch.float32 else 1e-2
    for part, span in zip(parts, ((0, half), (half, rows)), strict=True):
        close(part.merged(weight[slice(*span)])[0], whole[slice(*span)], tolerance)
    try:
        again = type(parts[0]).fuse(parts)
    except CannotFuse:
        assert (start, kind) in APART
        return
    close(again.merged(weight)[0], whole, tolerance)


LAYOUTS = ("peft", "lycoris", "comfy", "diffusers", "onetrainer-comfy")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
@both
def test_what_a_layout_holds_comes_back(
    start: str, kind: str, dtype: torch.dtype, tmp_path: Path, rng: Generator
) -> None:
    if start in NOT_ON[kind]:
        return
    made, weight = trained(start, kind, rng, dtype)
    adapter = Adapter({"model:block.proj": made}, "generic")
    if start == "set":  # new values are no adapter of their own
        adapter.modules["model:block.more"] = LoRA(draw(rng, 5, 2), draw(rng, 2, 6))
    known = tmp_path / "base.safetensors"
    save_file({"block.proj.weight": weight}, known)
    held: list[str] = []
    for layout in LAYOUTS:
        out = tmp_path / (layout if layout == "peft" else f"{layout}.safetensors")
        try:
            save_adapter(adapter, out, layout=layout)
        except UnsupportedError:
            continue
        held.append(layout)
        back = load_adapter(out, base=known, architecture="generic").modules
        assert len(back) == len(adapter.modules)
        module = next(m for path, m in back.items() if path.endswith("proj"))
        shape = tuple(weight.shape)
        found, wanted = (m.on(shape).merged(weight)[0] for m in (module, made))
        close(found, wanted, 1e-6)
        if made.additive and module.additive and math.prod(shape) == math.prod(module.shape):
            assert difference(module, made) < 1e-6
    assert held, f"no layout holds {start}"
