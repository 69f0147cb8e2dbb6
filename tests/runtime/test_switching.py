"""Names, strengths, disabling, hot swaps; and that torch.compile does not start over."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, fx

from peftsurgery import runtime
from peftsurgery.errors import UsageError
from tests.algorithms.cases import close
from tests.runtime.models import WEIGHTS, ids, layers, scramble


def test_active_strength_and_disabled(rng: Generator) -> None:
    model, x = layers(rng), ids(rng)
    base = model(x)
    scramble(runtime.attach(model, "lora", targets=WEIGHTS, rank=2, name="one"), rng)
    one = model(x)
    scramble(runtime.attach(model, "loha", targets=WEIGHTS, rank=2, name="two"), rng)
    both = model(x)
    assert runtime.adapter_names(model) == ("one", "two")
    runtime.activate(model, "one")
    assert torch.equal(model(x), one)
    with runtime.disabled(model):
        assert torch.equal(model(x), base)
        with runtime.disabled(model):
            pass
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), one)
    runtime.activate(model, ())
    assert torch.equal(model(x), base)
    runtime.activate(model)
    assert torch.equal(model(x), both)
    runtime.set_strength(model, 0.0, "two")
    close(model(x), one, 1e-6)
    runtime.delete(model, "two")
    assert torch.equal(model(x), one)
    with pytest.raises(UsageError, match=r"no adapter 'on' is attached .closest: one"):
        runtime.activate(model, "on")
    with pytest.raises(UsageError, match="an adapter 'one' is attached; delete it first"):
        runtime.attach(model, "lora", targets="lin", rank=2, name="one")


def test_hot_swap_copies_in_place(rng: Generator) -> None:
    first, second, x = layers(rng), layers(rng), ids(rng)
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        scramble(runtime.attach(model, "lora", targets=WEIGHTS, rank=2, dora=True), rng)
    places = [p.data_ptr() for p in runtime.adapter_parameters(first).values()]
    assert not torch.allclose(first(x), second(x))
    runtime.hot_swap(first, runtime.adapters(second), "default")
    assert torch.equal(first(x), second(x))
    assert [p.data_ptr() for p in runtime.adapter_parameters(first).values()] == places
    before = first(x)
    other = layers(rng)
    runtime.attach(other, "lora", targets=WEIGHTS, rank=3)
    with pytest.raises(UsageError, match="has other tensors"):
        runtime.hot_swap(first, runtime.adapters(other), "default")
    assert torch.equal(first(x), before)


@pytest.mark.parametrize(
    "algorithm", ["lora", "glora", "hira", "vera", "hra", "boft", "loha", "lokr"]
)
def test_compiled_models_do_not_recompile(algorithm: str, rng: Generator) -> None:
    graphs: list[fx.GraphModule] = []

    def count(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    for name in ("one", "two"):
        scramble(runtime.attach(model, algorithm, targets=["0", "2"], rank=2, name=name), rng)
    runtime.activate(model, "one")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    x = torch.randn(3, 4, generator=rng)

    def agrees() -> None:
        close(compiled(x), model(x), 1e-6)

    agrees()
    first = len(graphs)
    for strength in (0.5, 2.0, 1.0, -1.0):
        runtime.set_strength(model, strength, "one")
        agrees()
    swapped = {p: a.with_tensors() for p, a in runtime.adapters(model, "two").items()}
    runtime.hot_swap(model, swapped, "one")
    agrees()
    assert len(graphs) == first
    runtime.activate(model, "two")
    agrees()
    runtime.activate(model, "one")
    agrees()
    assert len(graphs) == first
    torch._dynamo.reset()
