"""Merging maps of the weight (OFT, IA3, RoAd, HiRA, …) into checkpoints: by tiles, with biases, at
every strength, in stacks; and their conversion to LoRA beside a base."""

# peft is typed loosely
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import peftsurgery as ps
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import (
    BOFT,
    HRA,
    IA3,
    OFT,
    DeLoRA,
    GLoRA,
    HiRA,
    LoRA,
    RoAd,
    Tokens,
    WeightAdapter,
)
from peftsurgery.errors import CheckFailed, UnsupportedError
from peftsurgery.operations import apply
from tests.operations.merging import random, state, write

OUT, IN = 24, 12
SHAPES = {"weight": (OUT // 2, IN), "bias": (OUT // 2,)}
Make = Callable[[Callable[..., Tensor]], WeightAdapter]
MAPS: dict[str, Make] = {
    "oft_in": lambda r: OFT(0.3 * r(3, 6), series=5),
    "oft_in_exact": lambda r: OFT(0.3 * r(2, 15), inverse=True),
    "oft_shared": lambda r: OFT(0.3 * r(1, 3), series=5, shared=True),
    "oft_out": lambda r: OFT(
        None, r(6, 4, 4), 1 + 0.3 * r(OUT, 1), acts_on="out", inverse=True, constraint=2.0
    ),
    "boft_in": lambda r: BOFT(r(2, 3, 4, 4)[:, :, :2, :2].repeat(1, 2, 1, 1), 1 + 0.3 * r(OUT, 1)),
    "boft_out": lambda r: BOFT(0.3 * r(2, 12, 2, 2), form="lycoris"),
    "hra": lambda r: HRA(r(IN, 4)),
    "ia3_out": lambda r: IA3(1 + 0.5 * r(OUT, 1), on_bias=True),
    "ia3_in": lambda r: IA3(1 + 0.5 * r(1, IN), acts_on="in"),
    "glora": lambda r: GLoRA(r(IN, 2), r(2, IN), r(OUT, 2), r(2, IN), scale=0.3),
    "road_1": lambda r: RoAd(r(OUT // 2), 1 + 0.3 * r(OUT // 2), variant=1, group=6),
    "road_4": lambda r: RoAd(r(OUT * 2), 1 + 0.3 * r(OUT * 2), variant=4, group=4),
    "delora": lambda r: DeLoRA(r(OUT, 3), r(3, IN), 4 + r(1), r(IN)),
    "hira": lambda r: HiRA(r(OUT, 3), r(3, IN)),
    "tokens": lambda r: Tokens(r(3, IN), indices=(20, 3, 7)),
}


def base(folder: Path, draw: Callable[..., Tensor]) -> Path:
    tensors = {"block.proj.weight": draw(OUT, IN), "block.proj.bias": draw(OUT), "other.x": draw(5)}
    return write(folder / "base.safetensors", tensors)


def adapter_of(**modules: WeightAdapter) -> Adapter:
    return Adapter(
        {f"transformer:{p.replace('__', '.')}": m for p, m in modules.items()}, "generic"
    )


def merged(folder: Path, source: Path, *stack: tuple[Adapter, float], **options) -> dict:
    out = folder / "out.safetensors"
    ps.merge(source, list(stack), out, overwrite=True, **options)
    return state(out)


@pytest.mark.parametrize("strength", [1.0, 0.35, -0.5])
@pytest.mark.parametrize("name", MAPS)
def test_tiles_give_the_whole_map(
    name: str, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "TILE", 5 * IN)  # five rows: no multiple of any block
    draw = random(1)
    source = base(tmp_path, draw)
    module = MAPS[name](draw)
    before = state(source)
    found = merged(tmp_path, source, (adapter_of(block__proj=module), strength))
    weight, bias = module.on((OUT, IN)).merged(
        before["block.proj.weight"], before["block.proj.bias"], strength
    )
    assert bias is not None
    for got, wanted in ((found["block.proj.weight"], weight), (found["block.proj.bias"], bias)):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["block.proj.weight"], before["block.proj.weight"], atol=0.01)
    moved = not torch.equal(found["block.proj.bias"], before["block.proj.bias"])
    assert moved == (name in ("ia3_out", "road_1", "road_4"))
    assert torch.equal(found["other.x"], before["other.x"])


@pytest.mark.parametrize("relative", ["current", "base"])
def test_a_stack_is_the_composition_of_its_maps(relative: str, tmp_path: Path) -> None:
    draw = random(2)
    source = base(tmp_path, draw)
    before = state(source)["block.proj.weight"]
    lora = LoRA(draw(OUT, 3), draw(3, IN), scale=0.2)
    stack = [(MAPS["oft_in"](draw), 0.8), (lora, 1.0), (MAPS["oft_out"](draw), 0.5)]
    stack.append((MAPS["ia3_out"](draw), 1.0))
    weight = before.clone()
    for module, t in stack:
        seen = before if relative == "base" else weight
        weight = weight + module.on((OUT, IN)).merged(seen, None, t)[0].detach() - seen
    adapters = [(adapter_of(block__proj=m), t) for m, t in stack]
    found = merged(tmp_path, source, *adapters, relative_to=relative)
    torch.testing.assert_close(found["block.proj.weight"], weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_tokens_behind_the_last_row_make_the_vocabulary_grow(
    strength: float, tmp_path: Path
) -> None:
    draw = random(6)
    source = write(tmp_path / "base.safetensors", {"block.proj.weight": draw(OUT, IN)})
    module = Tokens(draw(3, IN), indices=(OUT + 1, 5, OUT))
    if strength != 1:
        with pytest.raises(CheckFailed, match=r"no meaning at strength 0\.5"):
            merged(tmp_path, source, (adapter_of(block__proj=module), strength))
        return
    found = merged(tmp_path, source, (adapter_of(block__proj=module), strength))
    wanted = torch.cat([state(source)["block.proj.weight"], torch.zeros(2, IN)])
    assert module.values is not None
    wanted[[OUT + 1, 5, OUT]] = module.values.detach()
    assert torch.equal(found["block.proj.weight"], wanted)
    assert torch.equal(module.merged(state(source)["block.proj.weight"])[0], wanted)
    gap = Tokens(draw(1, IN), indices=(OUT + 1,))
    with pytest.raises(CheckFailed, match="Resize the base"):
        merged(tmp_path, source, (adapter_of(block__proj=gap), 1.0))


def test_rotations_of_the_bias_are_cut_where_the_base_stores_parts(tmp_path: Path) -> None:
    draw = random(7)
    tensors = {f"block.{n}.{w}": draw(*s) for n in ("a", "b") for w, s in SHAPES.items()}
    source = write(tmp_path / "base.safetensors", tensors)
    module = MAPS["road_4"](draw)
    found = merged(tmp_path, source, (adapter_of(**{"block__[a,b]": module}), 0.6))
    for place, name in enumerate("ab"):
        part = module.on((OUT, IN)).rows(place * OUT // 2, (place + 1) * OUT // 2)
        weight, bias = part.merged(
            tensors[f"block.{name}.weight"], tensors[f"block.{name}.bias"], 0.6
        )
        assert bias is not None
        torch.testing.assert_close(found[f"block.{name}.weight"], weight.detach())
        torch.testing.assert_close(found[f"block.{name}.bias"], bias.detach())


def test_a_map_of_another_size_does_not_land(tmp_path: Path) -> None:
    draw = random(3)
    source = base(tmp_path, draw)
    for module in (OFT(draw(4, 6), series=5), HRA(draw(IN + 1, 2)), IA3(draw(OUT + 1, 1))):
        with pytest.raises(CheckFailed, match="does not fit a weight"):
            merged(tmp_path, source, (adapter_of(block__proj=module), 1.0))


@pytest.mark.parametrize("name", MAPS)
def test_a_lora_made_of_it_beside_its_base_does_the_same(name: str, tmp_path: Path) -> None:
    draw = random(4)
    source = base(tmp_path, draw)
    module = MAPS[name](draw)
    written = tmp_path / "lora"
    known = adapter_of(block__proj=module)
    layout = "lycoris" if name in ("oft_out", "boft_out", "glora") else "peft"
    first = tmp_path / ("src" if layout == "peft" else "src.safetensors")
    ps.save_adapter(known, first, layout=layout)
    if layout == "peft" and not module.additive:  # flattened names need the base anyhow
        with pytest.raises(UnsupportedError, match="--base"):
            ps.convert(first, written, to="peft", algorithm="lora", architecture="generic")
    ps.convert(first, written, to="peft", algorithm="lora", base=source, architecture="generic")
    again = ps.load_adapter(written, architecture="generic")
    assert {m.algorithm for m in again.modules.values()} == {"lora"}
    found = merged(tmp_path, source, (again, 1.0))
    wanted = merged(tmp_path, source, (known, 1.0))
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4)
