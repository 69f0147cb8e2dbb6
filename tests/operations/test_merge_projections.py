"""Merging AdaLoRA, VeRA, FourierFT, C3A, MiSS, Bat and SHiRA into checkpoints: by tiles, at every
strength, in stacks; sizes that only the base tells; and their conversion to LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import peftsurgery as ps
from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import (
    C3A,
    AdaLoRA,
    Bat,
    FourierFT,
    LoRA,
    MiSS,
    SHiRA,
    VeRA,
    WeightAdapter,
    difference,
)
from peftsurgery.errors import CheckFailed, UnsupportedError
from peftsurgery.operations import apply
from tests.operations.merging import random, state, write

OUT, IN = 24, 12
Make = Callable[[Callable[..., Tensor]], WeightAdapter]


def places(count: int) -> Tensor:
    flat = torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(3))[:count]
    return torch.stack([flat // IN, flat % IN])


CHANGES: dict[str, Make] = {
    "adalora": lambda r: AdaLoRA(r(OUT, 3), r(3, 1), r(3, IN), scale=8 / (5 + 1e-5)),
    "vera": lambda r: VeRA(r(OUT), r(5), r(5, IN + 3), r(OUT + 2, 5)),
    "vera_drawn": lambda r: VeRA(r(OUT), r(5), seed=7, widest=(OUT, IN)),
    "fourierft": lambda r: FourierFT(r(40), scale=150.0),
    "c3a": lambda r: C3A(r(6, 3, 4), scale=1 / IN),
    "miss": lambda r: MiSS(r(5, OUT)),
    "mini": lambda r: MiSS(r(5, 8), mini=True),
    "bat": lambda r: Bat(0.3 * r(6, 4, 4)),
    "shira": lambda r: SHiRA(r(2 * (OUT + IN)), places(2 * (OUT + IN))),
}


def base(folder: Path, draw: Callable[..., Tensor]) -> Path:
    tensors = {"block.proj.weight": draw(OUT, IN), "block.proj.bias": draw(OUT), "other.x": draw(5)}
    return write(folder / "base.safetensors", tensors)


def adapter_of(**modules: WeightAdapter) -> Adapter:
    return Adapter(
        {f"transformer:{p.replace('__', '.')}": m for p, m in modules.items()}, "generic"
    )


def merged(folder: Path, source: Path, *stack: tuple[Adapter, float]) -> dict[str, Tensor]:
    out = folder / "out.safetensors"
    ps.merge(source, list(stack), out, overwrite=True)
    return state(out)


@pytest.mark.parametrize("strength", [1.0, 0.35, -0.5])
@pytest.mark.parametrize("name", CHANGES)
def test_tiles_give_the_whole_change(
    name: str, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "TILE", 5 * IN)  # five rows: no multiple of any block
    draw = random(1)
    source = base(tmp_path, draw)
    module = CHANGES[name](draw)
    before = state(source)
    found = merged(tmp_path, source, (adapter_of(block__proj=module), strength))
    weight, _ = module.on((OUT, IN)).merged(before["block.proj.weight"], None, strength)
    got = found["block.proj.weight"]
    torch.testing.assert_close(got, weight.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, before["block.proj.weight"], atol=0.01)
    assert torch.equal(found["block.proj.bias"], before["block.proj.bias"])
    assert torch.equal(found["other.x"], before["other.x"])


def test_a_stack_is_the_composition_of_its_maps(tmp_path: Path) -> None:
    draw = random(2)
    source = base(tmp_path, draw)
    weight = state(source)["block.proj.weight"].clone()
    stack = [(CHANGES[n](draw), 0.5 + n.count("a")) for n in ("fourierft", "bat", "shira", "c3a")]
    for module, t in stack:
        weight = module.on((OUT, IN)).merged(weight, None, t)[0].detach()
    found = merged(tmp_path, source, *((adapter_of(block__proj=m), t) for m, t in stack))
    torch.testing.assert_close(found["block.proj.weight"], weight, rtol=1e-5, atol=1e-4)


def test_changes_of_another_size_do_not_land(tmp_path: Path) -> None:
    draw = random(3)
    source = base(tmp_path, draw)
    wrong = (
        FourierFT(draw(OUT * IN + 1)),
        MiSS(draw(4, OUT + 1)),
        MiSS(draw(4, 7), mini=True),
        SHiRA(draw(1), torch.tensor([[OUT], [0]])),
        VeRA(draw(OUT), draw(2), draw(2, IN - 1), draw(OUT, 2)),
        Bat(draw(OUT // 8, 8, 8)),
    )
    for module in wrong:
        with pytest.raises(CheckFailed, match="does not fit a weight"):
            merged(tmp_path, source, (adapter_of(block__proj=module), 1.0))
    with pytest.raises(CheckFailed, match="the change has shape"):
        merged(tmp_path, source, (adapter_of(block__proj=C3A(draw(6, 4, 4))), 1.0))


@pytest.mark.parametrize("name", ["fourierft", "mini", "miss", "bat", "shira", "vera", "c3a"])
def test_a_record_on_a_group_is_cut_where_the_base_stores_parts(name: str, tmp_path: Path) -> None:
    draw = random(5)
    tensors = {f"block.{n}.weight": draw(OUT // 2, IN) for n in "ab"}
    source = write(tmp_path / "base.safetensors", tensors)
    module = CHANGES[name](draw)
    found = merged(tmp_path, source, (adapter_of(**{"block__[a,b]": module}), 0.6))
    whole = module.on((OUT, IN)).merged(torch.cat(list(tensors.values())), None, 0.6)[0].detach()
    both = torch.cat([found["block.a.weight"], found["block.b.weight"]])
    torch.testing.assert_close(both, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CHANGES)
def test_a_lora_made_of_it_beside_its_base_does_the_same(name: str, tmp_path: Path) -> None:
    draw = random(4)
    source = base(tmp_path, draw)
    module = CHANGES[name](draw)
    # PEFT's r of a SHiRA depends on the weight
    known = adapter_of(block__proj=module.on((OUT, IN)) if name == "shira" else module)
    first, written = tmp_path / "src", tmp_path / "lora"
    ps.save_adapter(known, first, layout="peft")
    if name not in ("adalora", "c3a"):
        with pytest.raises(UnsupportedError, match="--base"):
            ps.convert(first, written, to="peft", algorithm="lora", architecture="generic")
    ps.convert(first, written, to="peft", algorithm="lora", base=source, architecture="generic")
    again = ps.load_adapter(written, architecture="generic")
    assert {m.algorithm for m in again.modules.values()} == {"lora"}
    found = merged(tmp_path, source, (again, 1.0))
    wanted = merged(tmp_path, source, (known, 1.0))
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CHANGES)
def test_folders_read_back_as_they_were(name: str, tmp_path: Path) -> None:
    draw = random(6)
    source = base(tmp_path, draw)
    module = CHANGES[name](draw)
    known = adapter_of(block__proj=module.on((OUT, IN)) if name == "shira" else module)
    ps.save_adapter(known, tmp_path / "a", layout="peft")
    report = ps.convert(tmp_path / "a", tmp_path / "b", to="peft", architecture="generic")
    assert report.ok
    with_base = {"architecture": "generic", "base": source}
    (again,) = ps.load_adapter(tmp_path / "b", **with_base).modules.values()  # type: ignore[arg-type]
    assert difference(again, module) < 1e-6
    assert ps.convert(
        tmp_path / "a", tmp_path / "c", to="peft", architecture="generic", dry_run=True
    ).ok
    assert ps.inspect(tmp_path / "a", architecture="generic", norms=True).ok


def test_projections_of_two_layers_come_from_the_larger(tmp_path: Path) -> None:
    draw = random(8)
    tensors = {"a.weight": draw(OUT, IN), "b.weight": draw(5, IN + 9)}
    source = write(tmp_path / "base.safetensors", tensors)
    vectors = [(draw(OUT), draw(3)), (draw(5), draw(3))]
    one, two = (VeRA(b, d, seed=2, widest=(OUT, 0)) for b, d in vectors)
    found = merged(tmp_path, source, (adapter_of(a=one, b=two), 1.0))
    for key, (b, d) in zip("ab", vectors, strict=True):
        shape = tuple(tensors[f"{key}.weight"].shape)
        wanted = VeRA(b, d, seed=2, widest=(OUT, IN + 9), sized=shape).delta()
        torch.testing.assert_close(found[f"{key}.weight"] - tensors[f"{key}.weight"], wanted)


def test_combining_and_resizing_go_through_a_lora(tmp_path: Path) -> None:
    draw = random(9)
    source = base(tmp_path, draw)
    first = CHANGES["adalora"](draw)
    second = LoRA(draw(OUT, 2), draw(2, IN))
    out = tmp_path / "both"
    ps.combine(
        [(adapter_of(block__proj=first), 1.0), (adapter_of(block__proj=second), 0.5)],
        out, method="linear", to="peft", architecture="generic",
    )  # fmt: skip
    (found,) = ps.load_adapter(out, architecture="generic").modules.values()
    wanted = first.delta() + 0.5 * second.delta()
    torch.testing.assert_close(found.delta(), wanted.detach(), rtol=1e-4, atol=1e-4)
    ps.save_adapter(
        adapter_of(block__proj=CHANGES["fourierft"](draw)), tmp_path / "f", layout="peft"
    )
    ps.resize_rank(
        tmp_path / "f", tmp_path / "r", rank="4", algorithm="lora", base=source,
        architecture="generic",
    )  # fmt: skip
    (small,) = ps.load_adapter(tmp_path / "r", architecture="generic").modules.values()
    assert small.rank == 4
