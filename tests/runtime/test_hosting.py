"""The class swap is invisible: names, classes, state dicts, copies; detach leaves nothing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Generator, nn

from peftsurgery import runtime
from peftsurgery.errors import UnsupportedError, UsageError
from tests.algorithms.cases import close
from tests.runtime.models import WEIGHTS, Layers, ids, layers, scramble


def attached(rng: Generator, **options: object) -> Layers:
    model = layers(rng)
    found = runtime.attach(model, "lora", targets=WEIGHTS, rank=2, **options)  # type: ignore[arg-type]
    scramble(found, rng)
    return model


def test_the_base_looks_as_before(rng: Generator) -> None:
    plain = layers(rng)
    model = copy.deepcopy(plain)
    runtime.attach(model, "lora", targets=WEIGHTS, rank=2)
    assert isinstance(model.lin, nn.Linear)
    assert type(model.lin).__name__ == "Linear"
    assert type(model.lin) is type(runtime_linear())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.state_dict().items())
    assert model.head.weight is model.embed.weight
    assert model.load_state_dict(plain.state_dict()).missing_keys == []
    with pytest.raises(RuntimeError, match=r"Missing key.*lin.weight"):
        model.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "lin.weight"})
    broken = model.load_state_dict({}, strict=False)
    assert sorted(broken.missing_keys) == sorted(plain.state_dict())
    assert model.lin.adapters["default"].rank == 2  # type: ignore[union-attr, index]


def runtime_linear() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    runtime.attach(model, "lora", targets="0", rank=1)
    return model[0]


def test_copies_and_pickles_keep_their_own_adapters(rng: Generator) -> None:
    model, x = attached(rng), ids(rng)
    y = model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(other(x), y)
        runtime.set_strength(other, 0.0)
        assert torch.equal(model(x), y)
        runtime.detach(other)
        assert type(other.lin) is nn.Linear
    assert runtime.adapter_names(model) == ("default",)


def test_moves_and_modes_reach_the_adapters(rng: Generator) -> None:
    model = attached(rng, dropout=0.5)
    model.double()
    assert all(p.dtype == torch.float64 for p in runtime.adapter_parameters(model).values())
    x = ids(rng)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_detach_leaves_the_model_to_the_bit(rng: Generator) -> None:
    model = layers(rng)
    model.norm.bias.requires_grad_(False)
    model.lin.register_forward_hook(lambda *a: None)
    before = {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    classes = {n: type(m) for n, m in model.named_modules()}
    contents = {n: set(m.__dict__) for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) for n, m in model.named_modules()}
    runtime.attach(model, "lora", targets=WEIGHTS, rank=2)
    assert not any(model.get_parameter(n).requires_grad for n in before)
    runtime.attach(model, "lokr", targets="lin", rank=2, name="two")
    runtime.merge(model)
    runtime.unmerge(model)
    runtime.delete(model, "default")
    assert type(model.conv) is nn.Conv1d
    runtime.detach(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == contents
    assert {n: len(m._forward_hooks) for n, m in model.named_modules()} == hooks
    for name, parameter in model.named_parameters():
        identity, value, required = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == required


def test_deleting_the_last_adapter_unfreezes(rng: Generator) -> None:
    model = attached(rng)
    runtime.delete(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UsageError, match="no adapter 'default' is attached"):
        runtime.delete(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_puts_back_the_bytes_also_of_tied_weights(
    dtype: torch.dtype, rng: Generator
) -> None:
    model = attached(rng).to(dtype)
    x = ids(rng)
    plain = {n: p.detach().clone() for n, p in model.state_dict().items()}
    live = model(x)
    for _ in range(3):
        runtime.merge(model)
        assert model.head.weight is not model.embed.weight
        close(model(x), live, 2e-5 if dtype == torch.float32 else 0.05)
        for verb in (runtime.merge, runtime.detach):
            with pytest.raises(UsageError, match="merged"):
                verb(model)
        runtime.unmerge(model)
    assert model.head.weight is model.embed.weight
    assert all(torch.equal(model.state_dict()[n], t) for n, t in plain.items())
    assert torch.equal(model(x), live)
    with pytest.raises(UsageError, match="nothing is merged"):
        runtime.unmerge(model)


def test_merge_and_detach_leaves_a_plain_model(rng: Generator) -> None:
    model, x = attached(rng), ids(rng)
    live = model(x)
    runtime.merge_and_detach(model)
    close(model(x), live, 2e-5)
    assert type(model.lin) is nn.Linear
    assert not [n for n, _ in model.named_modules() if "adapters" in n]


def test_what_cannot_be_hosted_is_refused(rng: Generator) -> None:
    model = layers(rng)
    model.lin.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match="lin: its forward was replaced"):
        runtime.attach(model, "lora", targets="lin", rank=2)
    model = layers(rng)
    model.lin.adapters = {}  # type: ignore[assignment]
    with pytest.raises(UsageError, match="an attribute 'adapters' of its own"):
        runtime.attach(model, "lora", targets="lin", rank=2)
