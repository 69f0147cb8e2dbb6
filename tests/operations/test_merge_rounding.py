"""One rounding, what survives it, stochastic rounding, and numbers that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftsurgery as ps
from peftsurgery.errors import CheckFailed
from peftsurgery.operations.rounding import stochastic
from tests.operations.merging import GOLDEN, off_rounding, random, saved, state

NAME = "model.layers.0.self_attn.q_proj"


def llama(folder: Path, weights: dict[str, Tensor]) -> Path:
    """A file in a llama's names."""
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "base.safetensors", {"format": "pt"})
    return folder / "base.safetensors"


def lora(folder: Path, up: Tensor, down: Tensor) -> Path:
    tensors = {
        f"base_model.model.{NAME}.lora_A.weight": down,
        f"base_model.model.{NAME}.lora_B.weight": up,
    }
    path = folder / "adapter_model.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_the_result_is_the_exact_sum_rounded_once(
    tmp_path: Path, dtype: torch.dtype, factors: torch.dtype
) -> None:
    normal = random(1)
    weight = (normal(700, 333) * 0.05).to(dtype)
    up, down = (normal(700, 5) * 0.02).to(factors), normal(5, 333).to(factors)
    base = llama(tmp_path, {f"{NAME}.weight": weight})
    ps.merge(
        base, [(lora(tmp_path / "a", up, down), 0.7)], tmp_path / "out.safetensors", verify="full"
    )
    result = load_file(tmp_path / "out.safetensors")[f"{NAME}.weight"]
    exact = weight.double() + 0.7 * (up.double() @ down.double())
    assert result.dtype == dtype
    wrong, far = off_rounding(result, exact)
    assert far == 0
    if dtype != torch.float32:
        assert wrong < 1e-3 * result.numel()


def small_change(folder: Path, dtype: torch.dtype, size: float) -> tuple[Path, Path]:
    normal = random(2)
    base = llama(folder, {f"{NAME}.weight": normal(256, 256).to(dtype)})
    return base, lora(folder / "a", normal(256, 2) * size, normal(2, 256))


def share(base: Path, out: Path, adapter: Path) -> float:
    """<written - base, Δ> / <Δ, Δ> in fp64."""
    file = load_file(adapter)
    up, down = (file[f"base_model.model.{NAME}.lora_{x}.weight"].double() for x in "BA")
    delta = up @ down
    kept = load_file(out)[f"{NAME}.weight"].double() - load_file(base)[f"{NAME}.weight"].double()
    return float((kept * delta).sum() / (delta * delta).sum())


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 1e-3), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)]
)
def test_survival_is_the_share_of_the_change_that_was_written(
    tmp_path: Path, dtype: torch.dtype, size: float
) -> None:
    base, adapter = small_change(tmp_path, dtype, size)
    report = ps.merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors")
    expected = share(base, tmp_path / "out.safetensors", adapter)
    assert report.survival == pytest.approx(expected, abs=1e-4)
    assert report.touched[f"{NAME}.weight"] == pytest.approx(expected, abs=1e-4)
    assert report.modules[0]["survival"] == report.touched[f"{NAME}.weight"]


def test_min_survival_fails_and_names_the_dtypes_that_would_keep_it(tmp_path: Path) -> None:
    base, adapter = small_change(tmp_path, torch.bfloat16, 3e-5)
    out = tmp_path / "out.safetensors"
    with pytest.raises(CheckFailed) as caught:
        ps.merge(base, [(adapter, 1.0)], out, min_survival=0.9)
    assert caught.value.exit_code == 1
    text = str(caught.value)
    assert "--dtype fp32 keeps 100.0%" in text
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["base.safetensors"]
    stated = float(text.split("--dtype fp16 keeps ")[1].split("%")[0]) / 100
    ps.merge(base, [(adapter, 1.0)], out, dtype="fp16")
    assert share(base, out, adapter) == pytest.approx(stated, abs=2e-3)
    ps.merge(
        base, [(adapter, 1.0)], tmp_path / "fp32.safetensors", dtype="fp32", min_survival=0.999
    )
    low = ps.merge(base, [(adapter, 1.0)], tmp_path / "low.safetensors")
    assert any(f.code == "low-survival" and "--dtype fp32" in str(f.remedy) for f in low.findings)


def test_fp16_is_not_advised_where_it_overflows(tmp_path: Path) -> None:
    normal = random(3)
    base = llama(tmp_path, {f"{NAME}.weight": (1e5 * normal(64, 64)).bfloat16()})
    adapter = lora(tmp_path / "a", normal(64, 2), normal(2, 64))
    with pytest.raises(CheckFailed, match="fp32") as caught:
        ps.merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors", min_survival=0.99)
    assert "fp16" not in str(caught.value)


# stochastic
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_stochastic_rounding_is_unbiased_and_gives_a_neighbour(dtype: torch.dtype) -> None:
    exact = torch.cat([random(4)(400) * 3, torch.tensor([0.0, 1.0, -1.0, 1e-9, -1e-9])])
    rounds = 4000
    total = torch.zeros(exact.numel(), dtype=torch.float64)
    for seed in range(rounds):
        drawn = stochastic(exact, dtype, torch.Generator().manual_seed(seed)).double()
        total += drawn
        if seed < 5:
            nearest = exact.to(dtype)
            step = (nearest.double() - exact.double()).abs()
            assert bool(((drawn - exact.double()).abs() >= step - 1e-12).all())
    mean = total / rounds
    info = torch.finfo(dtype)
    gap = exact.double().abs() * info.eps + info.smallest_normal * info.eps
    deviation = gap / (2 * rounds**0.5)  # a Bernoulli between neighbours a gap apart
    assert bool(((mean - exact.double()).abs() <= 6 * deviation + 1e-12).all())
    assert float(((mean - exact.double()) / deviation).mean().abs()) < 6 / exact.numel() ** 0.5 * 2


def test_stochastic_rounding_keeps_exact_values_and_stays_finite() -> None:
    exact = torch.tensor([0.5, -3.0, 65504.0, 65510.0, 448.0])
    for seed in range(20):
        drawn = stochastic(exact, torch.float16, torch.Generator().manual_seed(seed))
        assert torch.equal(drawn[:3], exact[:3].half())
        assert bool(torch.isfinite(drawn).all())


def test_stochastic_merges_are_seeded_and_keep_the_change_on_average(tmp_path: Path) -> None:
    base, adapter = small_change(tmp_path, torch.bfloat16, 3e-5)

    def merged(name: str, seed: int) -> Path:
        out = tmp_path / f"{name}.safetensors"
        ps.merge(base, [(adapter, 1.0)], out, rounding="stochastic", seed=seed, verify="full")
        return out

    one, again, other = merged("one", 1), merged("again", 1), merged("other", 2)
    assert one.read_bytes() == again.read_bytes()
    assert one.read_bytes() != other.read_bytes()
    nearest = tmp_path / "nearest.safetensors"
    ps.merge(base, [(adapter, 1.0)], nearest)
    assert share(base, nearest, adapter) < 0.5
    shares = [share(base, merged(f"s{seed}", seed), adapter) for seed in range(3, 19)]
    spread = torch.tensor(shares).std() / len(shares) ** 0.5
    assert abs(sum(shares) / len(shares) - 1) < 5 * float(spread)


# numbers that do not fit
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_an_adapter_are_refused_by_name(tmp_path: Path, value: float) -> None:
    normal = random(5)
    base = llama(tmp_path, {f"{NAME}.weight": normal(64, 64)})
    up = normal(64, 2)
    up[3, 1] = value
    with pytest.raises(CheckFailed, match=rf"{NAME}.*NaN or Inf"):
        ps.merge(
            base, [(lora(tmp_path / "a", up, normal(2, 64)), 1.0)], tmp_path / "out.safetensors"
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_a_base_that_holds_nan_already_is_named_as_such(tmp_path: Path) -> None:
    normal = random(5)
    weight = normal(64, 64)
    weight[0, 0] = float("nan")
    base = llama(tmp_path, {f"{NAME}.weight": weight})
    with pytest.raises(CheckFailed, match="the base holds NaN or Inf there already"):
        ps.merge(
            base,
            [(lora(tmp_path / "a", normal(64, 2), normal(2, 64)), 1.0)],
            tmp_path / "out.safetensors",
        )


def test_fp16_overflow_is_refused(tmp_path: Path) -> None:
    normal = random(6)
    base = llama(
        tmp_path, {f"{NAME}.weight": normal(64, 64).half(), "other.weight": normal(4, 4).half()}
    )
    up = normal(64, 2)
    up[0] = 4e4
    adapter = lora(tmp_path / "a", up, torch.ones(2, 64))
    with pytest.raises(CheckFailed, match=r"does not fit F16.*bf16 or fp32"):
        ps.merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors")
    ps.merge(base, [(adapter, 1.0)], tmp_path / "ok.safetensors", dtype="bf16")


def test_overflow_of_untouched_tensors_under_dtype_is_refused(tmp_path: Path) -> None:
    normal = random(6)
    base = llama(
        tmp_path, {f"{NAME}.weight": normal(64, 64), "other.weight": torch.full((4, 4), 1e6)}
    )
    adapter = lora(tmp_path / "a", normal(64, 2), normal(2, 64))
    with pytest.raises(CheckFailed, match=r"'other.weight'.*does not fit F16"):
        ps.merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors", dtype="fp16")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_dtype_rounds_everything_that_is_dense(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    import json

    base = saved("tiny_llama")
    ps.merge(base, [(GOLDEN / "peft_llama_lora", 1.0)], tmp_path / "out", dtype=name, verify="full")
    after = state(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {dtype}
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(after[norm], state(base)[norm].to(dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
