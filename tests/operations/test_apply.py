"""Row tiles: whatever the tile size, a target comes out as one dense computation gives it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peftsurgery.algorithms import Full, LoHa, LoKr, LoRA, Replace, WeightAdapter
from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.operations import apply
from peftsurgery.operations.apply import Renderer, Settings, Survival, needs_whole, spans
from peftsurgery.operations.pipeline import Pipeline
from peftsurgery.operations.plan import Edit, Target
from tests.operations.merging import random

SHAPE = (36, 10)


def modules(seed: int) -> dict[str, WeightAdapter]:
    n = random(seed)
    o, i = SHAPE
    return {
        "lora": LoRA(n(o, 3), n(3, i), scale=0.3),
        "loha": LoHa(n(o, 2), n(2, i), n(o, 2), n(2, i), scale=0.2),
        "lokr": LoKr(w1=n(9, 2), w2=n(4, 5)),
        "full": Full(n(o, i), scale=0.5),
        "set": Replace(n(o, i)),
        "dora-out": LoRA(n(o, 3), n(3, i), magnitude=n(o).abs(), magnitude_axis="out"),
        "dora-in": LoRA(n(o, 3), n(3, i), magnitude=n(i).abs(), magnitude_axis="in"),
        "lokr-dora": LoKr(w1=n(9, 2), w2=n(4, 5), magnitude=n(o).abs(), magnitude_axis="out"),
    }


def target_of(
    folder: Path, weight: Tensor, edits: list[Edit], shape: tuple[int, ...] | None = None
) -> Target:
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    save_file({"w": weight.contiguous()}, path)
    return Target("w", open_checkpoint(path)["w"], shape or tuple(weight.shape), edits)


def edit(
    module: WeightAdapter, t: float, start: int = 0, stop: int = SHAPE[0], offset: int = 0
) -> Edit:
    return Edit(0, "m", module, t, start, stop, offset, module.shape[0])


def rendered(target: Target, settings: Settings) -> tuple[Tensor, Survival]:
    renderer, total, tiles = Renderer(target, settings), Survival(), []
    for a, b in spans(target):
        tile, survival = renderer.tile(a, b)
        tiles.append(tile.clone())
        total.add(survival)
    return torch.cat(tiles).reshape(target.shape), total


@pytest.mark.parametrize("tile", [1, 30, 70, 1 << 20])
@pytest.mark.parametrize("name", list(modules(0)))
@pytest.mark.parametrize("relative_to", ["current", "base"])
def test_tiles_are_the_merge_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int, name: str, relative_to: str
) -> None:
    monkeypatch.setattr(apply, "TILE", tile)
    one, two = modules(1)[name], modules(2)["lora"]
    weight = random(3)(*SHAPE)
    target = target_of(tmp_path, weight, [edit(two, 0.5), edit(one, 0.8)])
    result, survival = rendered(target, Settings(relative_to))
    first = two.merged(weight, None, 0.5)[0]
    source = weight if relative_to == "base" else first
    expected = first + (one.merged(source, None, 0.8)[0] - source)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert survival.share == pytest.approx(1, abs=1e-5)
    assert survival.total == pytest.approx(float((expected - weight).square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", [n for n in modules(0) if n != "dora-in"])
@pytest.mark.parametrize("tile", [25, 1 << 20])
def test_slices_and_turned_rows_of_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tile: int
) -> None:
    """Rows 6:23 of the module on rows 2:19 of a tensor, and all rows with the halves swapped."""
    monkeypatch.setattr(apply, "TILE", tile)
    module = modules(4)[name]
    whole = random(5)(*SHAPE)
    full = module.merged(whole, None, 0.6)[0]
    part = torch.cat([random(6)(2, 10), whole[6:23], random(7)(3, 10)])
    target = target_of(tmp_path, part, [edit(module, 0.6, 2, 19, 6)])
    result, _ = rendered(target, Settings())
    torch.testing.assert_close(result[2:19], full[6:23], rtol=1e-5, atol=1e-5)
    assert torch.equal(result[:2], part[:2])
    assert torch.equal(result[19:], part[19:])
    swapped = torch.cat([whole[18:], whole[:18]])
    target = target_of(tmp_path, swapped, [edit(module, 0.6, offset=18)])
    result, _ = rendered(target, Settings())
    torch.testing.assert_close(result, torch.cat([full[18:], full[:18]]), rtol=1e-5, atol=1e-5)


def test_swapped_rows_of_a_map_that_needs_them_all(tmp_path: Path) -> None:
    module, whole = modules(4)["dora-in"], random(5)(*SHAPE)
    target = target_of(
        tmp_path, torch.cat([whole[18:], whole[:18]]), [edit(module, 0.6, offset=18)]
    )
    assert needs_whole(target)
    result, _ = rendered(target, Settings())
    full = module.merged(whole, None, 0.6)[0]
    torch.testing.assert_close(result, torch.cat([full[18:], full[:18]]), rtol=1e-5, atol=1e-5)


def test_transposed_weights(tmp_path: Path) -> None:
    module, whole = modules(8)["dora-out"], random(9)(*SHAPE)
    one = Edit(0, "m", module, 0.7, 0, SHAPE[1], 0, SHAPE[0], "weight", True)
    result, _ = rendered(target_of(tmp_path, whole.T, [one]), Settings())
    torch.testing.assert_close(result, module.merged(whole, None, 0.7)[0].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [5, 1 << 20])
def test_stacked_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(apply, "TILE", tile)
    stack = random(10)(4, 6, 5)
    change = LoRA(random(11)(6, 2), random(12)(2, 5))
    target = target_of(tmp_path, stack, [edit(change, 0.5, 12, 18)])
    target.lead = 2
    assert (target.rows, target.columns) == (24, 5)
    result, _ = rendered(target, Settings())
    expected = stack.clone()
    expected[2] += 0.5 * change.delta()
    torch.testing.assert_close(result, expected)


def test_the_same_seed_does_not_depend_on_what_else_is_merged(tmp_path: Path) -> None:
    weight = random(13)(*SHAPE).bfloat16()
    module = modules(14)["lora"]
    settings = Settings(rounding="stochastic", seed=3)
    one, _ = rendered(target_of(tmp_path, weight, [edit(module, 1e-3)]), settings)
    two, _ = rendered(target_of(tmp_path, weight, [edit(module, 1e-3)]), settings)
    assert torch.equal(one, two)
    assert not torch.equal(
        one, rendered(target_of(tmp_path, weight, [edit(module, 1e-3)]), Settings())[0]
    )


def test_an_error_in_the_pipeline_reaches_the_reader(tmp_path: Path) -> None:
    bad = LoRA(torch.full((36, 1), math.inf), torch.ones(1, 10))
    target = target_of(tmp_path, random(15)(*SHAPE), [edit(bad, 1.0)])
    with Pipeline([target], Settings()) as pipeline, pytest.raises(Exception, match="NaN or Inf"):
        list(pipeline.chunks("w"))


def test_survival_of_a_sample_estimates_the_whole(tmp_path: Path) -> None:
    n = random(8)
    weight, lora = n(320, 64).bfloat16(), LoRA(n(320, 4), n(4, 64), scale=0.001)
    target = target_of(tmp_path, weight, [edit(lora, 1.0, 0, 320)])
    renderer = Renderer(target, Settings())
    _, exact = renderer.tile(0, 320)
    written, sampled = renderer.tile(0, 320, sample=16)
    assert torch.equal(written, renderer.tile(0, 320)[0])
    assert exact.total < lora.delta().square().sum() * 1.01
    assert sampled.total == pytest.approx(exact.total, rel=0.5)
    assert sampled.share == pytest.approx(exact.share, abs=0.1)
    assert sampled.total != exact.total
