"""Merging live adapters into packed layers, and back to the byte."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

from peftsurgery import runtime
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from peftsurgery.runtime.packed import dense_weight
from peftsurgery.runtime.repacking import Parts
from peftsurgery.runtime.stack import base_weight
from tests.algorithms.cases import close
from tests.runtime.models import scramble
from tests.runtime.packed_layers import KINDS, WRITTEN, Two, bits, inputs, plain_layer


def sized(model: Two, size: float, rng: Generator, rank: int = 3) -> None:
    """A LoRA on both layers, ‖ΔW‖ = size · ‖W‖."""
    found = runtime.attach(model, "lora", targets="all-linear", rank=rank, generator=rng)
    scramble(found, rng)
    for name, adapter in found.modules.items():
        weight = base_weight(model.get_submodule(name), "weight").detach().float()
        ratio = float(size * weight.norm() / adapter.delta().detach().norm())
        with torch.no_grad():
            cast(nn.Parameter, adapter.up).mul_(ratio)


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = bits(model)
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, now[name]), name


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", WRITTEN)
def test_merge_and_unmerge(kind: str, called: bool, rng: Generator) -> None:
    model, x = Two(kind, rng).train(), inputs(rng)
    if called:  # some parts move from the weight to the module at the first call
        model(x)
    before = bits(model)
    denses = {n: dense_weight(model.get_submodule(n)).float() for n in ("first", "second")}
    sized(model, 0.3, rng)
    live, deltas = (
        model(x).detach(),
        {n: a.delta().detach() for n, a in runtime.adapters(model).items()},
    )
    with runtime.disabled(model):
        bare = model(x).detach()
    runtime.merge(model)
    for name, dense in denses.items():
        found = dense_weight(model.get_submodule(name)).float()
        wanted = dense + deltas[name]
        kept = float(((found - dense) * deltas[name]).sum() / deltas[name].square().sum())
        assert 0.95 < kept < 1.05
        assert float((found - wanted).norm()) < 0.25 * float(dense.norm())
    merged = model(x).detach()
    close(merged, F.linear(torch.tanh(F.linear(x, dense_weight(model.first).float(),
          model.first.bias)), dense_weight(model.second).float(), model.second.bias),
          2e-2 if kind == "int8" else 1e-4)  # fmt: skip
    assert float((merged - live).norm()) < 0.6 * float((bare - live).norm())
    runtime.unmerge(model)
    same(model, before)
    close(model(x), live, 1e-6)
    runtime.merge_and_detach(model)
    assert torch.equal(model(x), merged)
    assert type(model.first).__module__.startswith("bitsandbytes")
    state = model.state_dict()
    assert not [name for name in state if "adapters" in name]


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_small_change_survives_error_feedback_only(kind: str, rng: Generator) -> None:
    model, x = Two(kind, rng).train(), inputs(rng)
    before = bits(model)
    sized(model, 1.5e-3 if kind == "int8" else 3e-2, rng)
    live = model(x).detach()
    with pytest.raises(CheckFailed, match=r"survives nearest rounding .* nothing was merged"):
        runtime.merge(model, rounding="nearest")
    same(model, before)
    close(model(x), live, 1e-6)
    distances: dict[str, float] = {}
    for rounding, least in (("nearest", -10.0), ("subspace", 0.9), ("auto", 0.9)):
        runtime.merge(model, rounding=rounding, min_survival=least)
        distances[rounding] = float((model(x).detach() - live).norm())
        runtime.unmerge(model)
        same(model, before)
    assert distances["auto"] == distances["subspace"]


def test_a_change_of_nothing_keeps_every_byte(rng: Generator) -> None:
    for kind in WRITTEN:
        model = Two(kind, rng)
        before = bits(model)
        runtime.attach(model, "lora", targets="all-linear", rank=2, generator=rng)
        runtime.merge_and_detach(model)
        same(model, before)


def test_stochastic_rounding_is_right_on_average_and_seeded(rng: Generator) -> None:
    model = Two("nf4", rng)
    sized(model, 0.02, rng)
    wanted = dense_weight(model.first) + runtime.adapters(model)["first"].delta()
    found: list[torch.Tensor] = []
    for seed in (*range(40), 39):
        runtime.merge(model, rounding="stochastic", seed=seed, min_survival=-10.0)
        found.append(dense_weight(model.first))
        runtime.unmerge(model)
    assert torch.equal(found[-1], found[-2])
    assert not torch.equal(found[0], found[1])
    one = float((found[0] - wanted).norm())
    assert float((torch.stack(found[:-1]).mean(0) - wanted).norm()) < 0.35 * one


@pytest.mark.parametrize("kind", ["nf4 nested", "int8"])
def test_several_adapters_of_several_kinds(kind: str, rng: Generator) -> None:
    model, x = Two(kind, rng).train(), inputs(rng)
    before = bits(model)
    dense, bias = dense_weight(model.first).float(), model.first.bias.clone()
    sized(model, 0.2, rng)
    oft = runtime.attach(
        model, "oft", targets="first", block_size=8, name="b", generator=rng, bias="targets"
    )
    scramble(oft, rng, 0.2)
    runtime.set_strength(model, 0.5)
    weight = dense
    for found in (runtime.adapters(model), oft.modules):
        strength = 0.5 if found is not oft.modules else 1.0
        weight, bias = found["first"].merged(weight, bias, strength)
    runtime.merge(model)
    after = dense_weight(model.first).float()
    assert float((after - weight).norm()) < 0.15 * float(weight.norm())
    assert float((dense - weight).norm()) > 2 * float((after - weight).norm())
    assert bias is not None
    close(model.first.bias, bias, 1e-6)
    runtime.unmerge(model)
    same(model, before)
    model(x)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in WRITTEN])
def test_what_is_not_packed_again(kind: str, rng: Generator) -> None:
    model, x = Two(kind, rng), inputs(rng)
    before = bits(model)
    sized(model, 0.1, rng)
    live = model(x).detach()
    for call in (runtime.merge, runtime.merge_and_detach):
        with pytest.raises(UnsupportedError, match=r"first: .* merge the files instead"):
            call(model)
    same(model, before)
    assert torch.equal(model(x), live)


def test_refusals_change_nothing(rng: Generator) -> None:
    model = Two("nf4", rng)
    before = bits(model)
    sized(model, 0.1, rng)
    with pytest.raises(UsageError, match="expected one of auto, nearest"):
        runtime.merge(model, rounding="gptq")
    with torch.no_grad():
        runtime.adapters(model)["second"].up[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(CheckFailed, match="second: the merge gives NaN"):
        runtime.merge(model)
    same(model, before)
    tied = Two("nf4", rng)
    tied.third = KINDS["nf4"](nn.Linear(64, 192))
    tied.third.weight = tied.first.weight
    runtime.attach(tied, "lora", targets="first", rank=2, generator=rng)
    with pytest.raises(UnsupportedError, match="shared with other modules"):
        runtime.merge(tied)


def test_plain_layers_beside_packed_ones_wait_for_the_check(rng: Generator) -> None:
    model = Two("nf4", rng)
    model.second = nn.Linear(192, 128)
    sized(model, 3e-2, rng)
    plain = model.second.weight.detach().clone()
    with pytest.raises(CheckFailed, match="nothing was merged"):
        runtime.merge(model, rounding="nearest")
    assert torch.equal(model.second.weight, plain)


def test_rows_that_bitsandbytes_reads_wrongly(rng: Generator) -> None:
    """Where the library's own reading and the format part ways nothing is merged."""
    layer = KINDS["nf4"](plain_layer(96, 32, rng))
    model = nn.Sequential(layer)
    found = runtime.attach(model, "lora", targets="0", rank=4, generator=rng)
    scramble(found, rng)
    before, wanted = bits(model), dense_weight(layer) + found.modules["0"].delta()
    packed = Parts.of("0", layer).packed("0").dequantize()
    if float((packed - dense_weight(layer)).abs().max()) > 0.05:
        with pytest.raises(UnsupportedError, match="reads this weight otherwise"):
            runtime.merge(model)
        same(model, before)
    else:
        runtime.merge(model)
        assert float((dense_weight(layer) - wanted).norm()) < 0.25 * float(wanted.norm())
