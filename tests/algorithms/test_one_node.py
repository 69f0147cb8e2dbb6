"""A layer and its adapter as one node: the values of `merged`, and gradients that are right, of the
second order too.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from peftsurgery import runtime
from peftsurgery.algorithms import ALGORITHMS
from peftsurgery.algorithms.one_node import OneNode
from peftsurgery.runtime.controls import stacks
from tests.algorithms.cases import close, number

OUT, IN = 12, 8
PLANS: dict[str, tuple[str, dict[str, object]]] = {
    "loha": ("loha", {"rank": 3}),
    "lokr": ("lokr", {"rank": 9}),
    "lokr-pair": ("lokr", {"rank": 1, "factor": 2}),
    "lokr-both": ("lokr", {"rank": 1, "decompose_both": True}),
    "hra": ("hra", {"rank": 4}),
    "boft": ("boft", {"block_size": 4}),
    "boft-plain": ("boft", {"block_size": 2, "rescaled": False}),
}
SHAPES = [(5, IN), (2, 3, IN), (IN,), (0, IN)]


def drawn(plan: str, rng: Generator, dtype: torch.dtype = torch.float64) -> OneNode:
    """An adapter of random values, also of the scale where there is one."""
    algorithm, options = PLANS[plan]
    weight = torch.zeros(OUT, IN)
    cls = ALGORITHMS[algorithm]
    adapter = cls.init(weight, dtype=dtype, generator=rng, **options)  # type: ignore[arg-type]
    assert isinstance(adapter, OneNode)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=rng) * 0.5)
    if algorithm in ("loha", "lokr"):
        adapter = adapter.with_tensors(scale=number(rng))
    return adapter.requires_grad_()


def layer(rng: Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    weight = torch.randn(OUT, IN, generator=rng, dtype=dtype)
    return weight, torch.randn(OUT, generator=rng, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_it_is_the_merged_layer(
    plan: str, biased: bool, shape: tuple[int, ...], rng: Generator
) -> None:
    adapter = drawn(plan, rng, torch.float32)
    weight, bias = layer(rng, torch.float32)
    given = bias if biased else None
    x = torch.randn(shape, generator=rng)
    w, b = adapter.merged(weight, given)
    x.requires_grad_()
    y, wanted = adapter.linear(x, weight, given), F.linear(x, w, b)
    close(y, wanted, 1e-5)
    inputs = [x, *adapter.parameters()]
    grads = zip(*(torch.autograd.grad(z.sum(), inputs) for z in (y, wanted)), strict=True)
    for got, right in grads:
        close(got, right, 1e-4)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_its_gradients_are_right(plan: str, biased: bool, rng: Generator) -> None:
    adapter, (weight, bias) = drawn(plan, rng), layer(rng)
    names = [name for name, _ in adapter.named_parameters()]

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        adapter._parameters.update(zip(names, tensors, strict=True))  # type: ignore[arg-type]
        return adapter.linear(x, weight, bias if biased else None)

    x = torch.randn(2, 3, IN, generator=rng, dtype=torch.float64, requires_grad=True)
    tensors = [tensor.detach().clone().requires_grad_() for tensor in adapter.parameters()]
    assert torch.autograd.gradcheck(call, (x, *tensors))
    assert torch.autograd.gradgradcheck(call, (x, *tensors))
    assert torch.autograd.gradcheck(call, (x.detach(), *tensors))
    assert torch.autograd.gradcheck(call, (x, *[t.detach() for t in tensors]))


@pytest.mark.parametrize("plan", PLANS)
def test_any_strides_will_do(plan: str, rng: Generator) -> None:
    adapter, (weight, bias) = drawn(plan, rng), layer(rng)
    x = torch.randn(IN, 6, generator=rng, dtype=torch.float64).t()
    grad = torch.randn(OUT, 6, generator=rng, dtype=torch.float64).t()
    found: list[tuple[Tensor, ...]] = []
    for given, back in ((x, grad), (x.contiguous(), grad.contiguous())):
        given = given.detach().requires_grad_()
        y = adapter.linear(given, weight, bias)
        found.append((y, *torch.autograd.grad(y, [given, *adapter.parameters()], back)))
    for got, wanted in zip(*found, strict=True):
        close(got, wanted, 1e-12)


@pytest.mark.parametrize("plan", sorted(PLANS.keys() - {"lokr-pair", "lokr-both"}))  # mm of pairs
def test_autocast_around_the_backward_pass(plan: str, rng: Generator) -> None:
    adapter, (weight, bias) = drawn(plan, rng, torch.float32), layer(rng, torch.float32)
    x = torch.randn(4, IN, generator=rng, requires_grad=True)
    inputs = [x, *adapter.parameters()]
    y = adapter.linear(x, weight, bias)
    wanted = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    total = y.square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(total, inputs)
    for got, right in zip(found, wanted, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_not_for_it(plan: str, rng: Generator) -> None:
    adapter = drawn(plan, rng, torch.float32)
    weight, bias = layer(rng, torch.float32)
    x = torch.randn(4, IN, generator=rng)
    assert adapter.takes(x, weight, bias)
    assert not adapter.takes(x.double(), weight, bias)
    assert not adapter.takes(x.bfloat16(), weight.bfloat16(), None)
    assert not adapter.takes(x, weight.clone().requires_grad_(), bias)
    assert not adapter.takes(x, weight, bias.clone().requires_grad_())
    assert not copy.deepcopy(adapter).double().takes(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert not adapter.takes(x, weight, bias)
    with torch.autograd.forward_ad.dual_level():
        assert not adapter.takes(x, weight, bias)
    torch.func.vmap(lambda x: _refused(adapter.takes(x, weight, bias), x))(x)


def _refused(taken: bool, x: Tensor) -> Tensor:
    assert not taken
    return x


@pytest.mark.parametrize("plan", PLANS)
def test_a_model_uses_it_and_can_do_without(plan: str, rng: Generator) -> None:
    algorithm, options = PLANS[plan]
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh())
    attached = runtime.attach(model, algorithm, targets="0", generator=rng, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in runtime.trainable_parameters(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=rng) * 0.3)
    x = torch.randn(4, IN, generator=rng, requires_grad=True)
    y = model(x)
    stack = stacks(model)["0"]
    assert stack.joining == {x.shape: True}
    names, tensors = zip(*attached.modules["0"].named_parameters(), strict=True)
    found = torch.autograd.grad(y.square().sum(), [x, *tensors])

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        named = {f"0.adapters.default.{name}": value for name, value in values.items()}
        return torch.func.functional_call(model, named, (x,)).square().sum()

    values = dict(zip(names, (t.detach() for t in tensors), strict=True))
    of_values, of_x = torch.func.grad(loss, argnums=(0, 1))(values, x.detach())
    for got, wanted in zip(found, [of_x, *of_values.values()], strict=True):
        close(got, wanted, 1e-4)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x.detach())
    for got, name in zip(found[1:], names, strict=True):
        close(each[name].sum(0), got, 1e-4)


def test_the_scale_is_read_when_it_changes(rng: Generator) -> None:
    adapter = drawn("lokr", rng)
    first = adapter.number
    assert first == float(adapter.scale) == adapter.number
    adapter.scale.mul_(2)
    assert adapter.number == 2 * first
    adapter.scale = torch.tensor(0.25)
    assert adapter.number == 0.25
    again = pickle.loads(pickle.dumps(adapter))
    assert again.number == 0.25
    with torch.inference_mode():
        adapter.scale = torch.tensor(3.0)
        assert adapter.number == 3
        adapter.scale.mul_(2)
        assert adapter.number == 6
    assert adapter.number == 6


def test_a_frozen_input_keeps_no_folded_weight(rng: Generator) -> None:
    adapter, (weight, bias) = drawn("loha", rng), layer(rng)
    for for_x in (True, False):
        saved: list[tuple[int, ...]] = []

        def pack(tensor: Tensor, saved: list[tuple[int, ...]] = saved) -> Tensor:
            saved.append(tuple(tensor.shape))
            return tensor

        x = torch.randn(4, IN, generator=rng, dtype=torch.float64, requires_grad=for_x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            adapter.linear(x, weight, bias)
        assert saved.count((OUT, IN)) == 1 + for_x
