"""What the target language selects, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Generator, nn

from peftsurgery import runtime
from peftsurgery.algorithms import Full, LoHa, LoKr, LoRA
from peftsurgery.errors import UsageError
from tests.runtime.models import layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.out_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 7)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


LINEAR = [f"blocks.{n}.{m}" for n in (0, 1) for m in ("q_proj", "out_proj")]


@pytest.mark.parametrize(
    ("targets", "exclude", "wanted"),
    [
        ("proj", (), ["proj"]),
        (["q_proj"], (), ["blocks.0.q_proj", "blocks.1.q_proj"]),
        ("blocks.1.*_proj", (), ["blocks.1.q_proj", "blocks.1.out_proj"]),
        ("*.q_proj", "blocks.0.*", ["blocks.1.q_proj"]),
        (re.compile(r".*\.0\.q_proj"), (), ["blocks.0.q_proj"]),
        ("all-linear", (), [*LINEAR, "proj"]),
        ("all-linear", ["q_proj", "proj"], ["blocks.0.out_proj", "blocks.1.out_proj"]),
        (lambda path, module: isinstance(module, nn.Linear) and "1" in path, (), LINEAR[2:]),
        ("lm_head", (), ["lm_head"]),
    ],
)
def test_targets(targets: object, exclude: object, wanted: list[str]) -> None:
    found = runtime.attach(Model(), "lora", targets=targets, exclude=exclude, rank=2)  # type: ignore[arg-type]
    assert list(found.modules) == wanted


def test_patterns_and_maps_first_match_wins() -> None:
    model = Model()
    found = runtime.attach(
        model,
        {"blocks.0.*": LoHa, "q_proj": ("lokr", {"rank": 2, "factor": 2}), "all-linear": LoRA},
        rank=4,
        alpha=8,
        rank_pattern={"out_proj": 3, "blocks.1.out_proj": 1},
        alpha_pattern={"proj": 2.0},
        exclude="norm",
    ).modules
    kinds = {path: type(adapter) for path, adapter in found.items()}
    assert kinds == {
        "blocks.0.q_proj": LoHa,
        "blocks.0.out_proj": LoHa,
        "blocks.1.q_proj": LoKr,
        "blocks.1.out_proj": LoRA,
        "proj": LoRA,
    }
    assert {p: a.rank for p, a in found.items() if not isinstance(a, LoKr)} == {
        "blocks.0.q_proj": 4,
        "blocks.0.out_proj": 3,
        "blocks.1.out_proj": 3,
        "proj": 4,
    }
    assert float(found["proj"].scale) == 0.5
    assert float(found["blocks.1.out_proj"].scale) == pytest.approx(8 / 3)


def test_whole_modules_and_biases_train_beside() -> None:
    model = Model()
    found = runtime.attach(
        model, "lora", targets="q_proj", rank=2, modules_to_save=["lm_head"], bias="all"
    ).modules
    assert found["lm_head"].algorithm == "set"
    assert isinstance(found["proj"], Full)
    assert found["blocks.0.norm"].bias is not None
    assert found["blocks.0.q_proj"].bias is not None
    totals = runtime.counts(model)
    own = sum(p.numel() for p in Model().parameters())
    assert totals.base == own
    assert totals.trainable == totals.adapters == 2 * (16 + 4) + 35 + 2 * (4 + 4) + 4
    assert totals.share == totals.trainable / (own + totals.adapters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_proj", "k_proj"]}, "target 'k_proj' names no layer.*q_proj"),
        ({}, "needs `targets`"),
        ({"targets": "q_proj", "rank": 0}, "blocks.0.q_proj: LoRA: got rank 0"),
        ({"targets": "q_proj", "name": "a.b"}, "adapter name 'a.b'"),
        ({"targets": "q_proj", "bias": "some"}, "bias='some'"),
        ({"targets": "q_proj", "modules_to_save": ["q_proj"]}, "both a target and in"),
        ({"targets": "q_proj", "modules_to_save": ["hed"]}, "'hed' names no module"),
        ({"targets": "q_proj", "dropout": 1.5}, "dropout of inputs: got 1.5"),
        ({"targets": "q_proj", "init": "pisa"}, "init 'pisa': expected one of"),
        ({"targets": "q_proj", "ranks": 3}, "has no option 'ranks'"),
    ],
)
def test_refusals_leave_the_model_alone(options: dict[str, object], message: str) -> None:
    model = Model()
    with pytest.raises(UsageError, match=message):
        runtime.attach(model, "lora", **{"rank": 2, **options})  # type: ignore[arg-type]
    assert type(model.proj) is nn.Linear
    assert runtime.adapter_names(model) == ()
    assert all(p.requires_grad for p in model.parameters())


def test_a_wrong_name_is_neither_algorithm_nor_file() -> None:
    with pytest.raises(UsageError, match="no algorithm has that name; closest: lora"):
        runtime.attach(Model(), "lorra", targets="proj", rank=2)


def test_shared_modules_get_one_adapter(rng: Generator) -> None:
    model = layers(rng)
    model.again = model.lin  # type: ignore[assignment]
    found = runtime.attach(model, "lora", targets=["lin"], rank=2)
    assert list(found.modules) == ["lin"]
    assert torch.equal(model.again.weight, model.lin.weight)  # type: ignore[union-attr, arg-type]
