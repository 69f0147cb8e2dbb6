"""What lies beside the products: biases, new values, DoRA, IA3, vectors, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftsurgery.algorithms import IA3, Full, LoRA, WeightAdapter
from peftsurgery.codec import load_adapter as load
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from peftsurgery.linalg import RankRule
from peftsurgery.merge_methods import METHODS
from peftsurgery.operations.combine import combine as operation
from peftsurgery.operations.combine_modules import Combined, Plan, combine_module
from peftsurgery.operations.deltas import Entry
from peftsurgery.operations.merge import merge
from tests.codec.build import write
from tests.codec.parts import Maker

KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
HOME = "unet:down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
BASE = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
load_adapter = partial(load, architecture="sd1")
combine = partial(operation, architecture="sd1")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, *, bias: bool = False, rows: int = 9, **more: object) -> LoRA:
    extra = {"bias": normal(seed + 50, rows)} if bias else {}
    return LoRA(normal(seed, rows, 2), normal(seed + 20, 2, 7), **extra, **more)  # type: ignore[arg-type]


def run(
    modules: list[WeightAdapter], weights: list[float], method: str = "linear", **options: object
) -> Combined:
    chosen = METHODS[method]
    plan_options = {k: options.pop(k) for k in ("scale", "normalize", "density") if k in options}
    plan = Plan(chosen, chosen.choose(plan_options), len(modules), **options)  # type: ignore[arg-type]
    pairs = enumerate(zip(modules, weights, strict=True))
    entries = [Entry(i, f"file{i}", weight, module) for i, (module, weight) in pairs]
    return combine_module("unet:some.path", entries, sum(weights), plan)


# biases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "tsv"])
def test_bias_changes_add_up(method: str) -> None:
    a, b, c = lora(1, bias=True), lora(2), lora(3, bias=True)
    found = run([a, b, c], [0.5, 1.0, -2.0], method, scale=3.0).module
    assert a.bias is not None
    assert c.bias is not None
    assert found.bias is not None
    torch.testing.assert_close(found.bias.data, 3 * (0.5 * a.bias.data - 2 * c.bias.data))


def test_bias_alone() -> None:
    a, b = Full(None, bias=normal(1, 9)), Full(None, bias=normal(2, 9))
    found = run([a, b], [0.5, 2.0]).module
    assert found.bias is not None
    assert a.bias is not None
    assert b.bias is not None
    torch.testing.assert_close(found.bias.data, 0.5 * a.bias.data + 2 * b.bias.data)
    mixed = run([a, lora(3)], [1.0, 1.0]).module
    assert mixed.bias is not None
    assert mixed.algorithm == "lora"


def test_a_new_bias_is_no_change_of_it() -> None:
    with pytest.raises(UnsupportedError, match=r"file1 holds a new bias.*--base"):
        run([lora(1), lora(2, bias=True, bias_is_value=True)], [1.0, 1.0])


def test_norms_are_vectors() -> None:
    a, b = Full(normal(1, 12)), Full(normal(2, 12))
    for method in ("linear", "svd", "tsv", "core_ties"):
        found = run([a, b], [0.5, -1.0], method).module
        torch.testing.assert_close(found.delta(), 0.5 * a.delta() - b.delta())
    trimmed = run([a], [1.0], "ties", density=0.25).module.delta()
    assert int((trimmed != 0).sum()) == 3


def test_stored_orientation_must_agree() -> None:
    with pytest.raises(UnsupportedError, match="stored is linear in file0 and conv1d in file1"):
        run([lora(1), lora(2, stored="conv1d")], [1.0, 1.0])


# numbers ------------------------------------------------------------------------------------------


def test_overflow_is_an_error() -> None:
    big = LoRA(normal(1, 9, 2).half() * 100, normal(2, 2, 7).half(), scale=1.0)
    with pytest.raises(CheckFailed, match="up does not fit float16"):
        run([big, lora(2).with_tensors(**{n: t.half() for n, t in lora(2).tensors().items()})],
            [1e6, 1.0])  # fmt: skip


def test_a_common_weight_leaves_the_factors_their_bits() -> None:
    parts = [
        LoRA(normal(i, 33, 4).bfloat16(), normal(i + 9, 4, 21).bfloat16(), scale=0.3)
        for i in range(3)
    ]
    found = run(list(parts), [0.7, -0.7, 0.7])
    assert isinstance(found.module, LoRA)
    assert torch.equal(found.module.down, torch.cat([p.down for p in parts]))
    signed = [parts[0].up, -parts[1].up, parts[2].up]
    assert torch.equal(found.module.up, torch.cat(signed, 1))
    expected = 0.7 * (parts[0].delta() - parts[1].delta() + parts[2].delta())
    torch.testing.assert_close(found.module.delta(), expected)
    assert (found.rounding, found.loss) == (0.0, 0.0)
    assert found.size == pytest.approx(float(expected.norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_of_unlike_weights_is_measured(dtype: torch.dtype) -> None:
    parts = [LoRA(normal(i, 33, 4).to(dtype), normal(i + 9, 4, 21).to(dtype)) for i in range(3)]
    weights = [0.3, 0.5, -1.1]  # the second one exact, the others not
    found = run(list(parts), weights)
    exact = sum(w * (p.up.double() @ p.down.double()) for w, p in zip(weights, parts, strict=True))
    assert isinstance(exact, Tensor)
    lost = float((exact - found.module.delta().double()).norm() / exact.norm())
    if dtype == torch.float32:
        assert found.rounding == 0
        assert lost < 1e-6
    else:
        assert 1e-5 < lost < 1e-2
        assert found.rounding == pytest.approx(lost, rel=0.02)
    assert {t.dtype for t in found.module.tensors().values()} == {dtype}
    assert found.size == pytest.approx(float(exact.norm()), rel=1e-4)


def test_opposite_ones_cancel() -> None:
    one = LoRA(normal(1, 30, 3), normal(2, 3, 20))
    other = LoRA(one.up.detach().clone(), one.down.detach() * (1 + 2**-20))
    found = run([one, other], [1.0, -1.0])
    exact = one.up.double() @ (one.down.double() - other.down.double())
    assert found.size == pytest.approx(float(exact.norm()), rel=1e-3)
    torch.testing.assert_close(found.module.delta().double(), exact, rtol=0, atol=1e-5)


def test_tiny_half_factors() -> None:
    small = LoRA(normal(1, 9, 2).half() * 1e-3, (normal(2, 2, 7) * 1e-4).half())
    for method in ("svd", "tsv", "iso_c", "knots", "ties"):
        found = run([small, small], [1.0, 1.0], method, rank=RankRule.parse(2)).module
        assert {t.dtype for t in found.tensors().values()} == {torch.float16}
        assert bool(torch.isfinite(found.delta()).all())
        assert 0 < float(found.delta().norm()) < 1


def test_rank_above_the_sides() -> None:
    wide = [LoRA(normal(i, 5, 12), normal(i + 9, 12, 4)) for i in range(2)]
    found = run(list(wide), [1.0, 1.0])
    assert found.module.rank is not None
    assert found.module.rank <= 4
    torch.testing.assert_close(
        found.module.delta(), wide[0].delta() + wide[1].delta(), rtol=1e-4, atol=1e-4
    )
    assert found.loss == 0
    one_row = [LoRA(normal(i, 1, 3), normal(i + 9, 3, 4)) for i in range(2)]
    for name in ("linear", "svd", "ties", "knots", "tsv", "iso_cts"):
        assert run(list(one_row), [1.0, 1.0], name).module.shape == (1, 4)


# IA3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
def test_ia3_multipliers(centred: bool) -> None:
    vectors = [normal(1, 9), normal(2, 9)]
    modules = [IA3(v, centred=centred) for v in vectors]
    found = run(list(modules), [0.5, -0.25]).module
    weight = normal(3, 9, 7)
    expected = weight + 0.5 * modules[0].delta(weight) - 0.25 * modules[1].delta(weight)
    torch.testing.assert_close(found.merged(weight)[0], expected)
    assert run([modules[0]], [1.0]).module is modules[0]


def test_ia3_refusals() -> None:
    ia3 = IA3(normal(1, 9))
    with pytest.raises(UnsupportedError, match=r"file0 adds to the weight .* multiplies it"):
        run([lora(1), ia3], [1.0, 1.0])
    with pytest.raises(UnsupportedError, match="combined with --method linear"):
        run([ia3, ia3], [1.0, 1.0], "ties")
    with pytest.raises(UnsupportedError, match="different sides or sizes"):
        run([ia3, IA3(normal(1, 9), acts_on="in")], [1.0, 1.0])


# what needs the base ------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(
        tmp_path / "base.safetensors",
        {
            BASE: normal(5, 40, 24),
            "down_blocks.1.attentions.0.transformer_blocks.0.norm1.weight": normal(6, 40),
            "conv_in.weight": normal(7, 8, 4, 3, 3),
        },
    )


def test_dora_needs_the_base(base: Path, tmp_path: Path) -> None:
    dora = write(tmp_path / "dora.safetensors", Maker(1).dora(KEY, 40, 24, "out"))
    plain = write(tmp_path / "plain.safetensors", Maker(2).lora(KEY, 40, 24, 3))
    sources = [(dora, 0.5), (plain, 2.0)]
    out = tmp_path / "o.safetensors"
    with pytest.raises(UnsupportedError, match=r"dora.safetensors: unet.* DoRA depends .*--base"):
        combine(sources, out)
    with pytest.raises(UnsupportedError, match="--base"):
        combine(sources, out, dry_run=True)
    combine(sources, out, base=base, algorithm="lora")
    weight = normal(5, 40, 24)
    one, other = (load_adapter(f).modules[HOME] for f in (dora, plain))
    expected = 0.5 * one.delta(weight) + 2.0 * other.delta()
    found = load_adapter(out).modules[HOME].delta()
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_one_dora_of_weight_one_keeps_its_change(base: Path, tmp_path: Path) -> None:
    dora = write(tmp_path / "dora.safetensors", Maker(1).dora(KEY, 40, 24, "in"))
    combine([(dora, 1.0)], tmp_path / "o.safetensors", base=base, algorithm="full", to="comfy")
    found = load_adapter(tmp_path / "o.safetensors").modules[HOME].delta()
    expected = load_adapter(dora).modules[HOME].delta(normal(5, 40, 24))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weights", [(0.5, 2.0), (1.0, -0.7)])
def test_combine_then_merge_is_merging_each(
    weights: tuple[float, float], base: Path, tmp_path: Path
) -> None:
    files = [
        write(tmp_path / "one.safetensors", Maker(1).lora(KEY, 40, 24, 2, alpha=1)),
        write(tmp_path / "two.safetensors", Maker(2).loha(KEY, 40, 24, 2, alpha=3)),
    ]
    sources = list(zip(files, weights, strict=True))
    combine(sources, tmp_path / "both.safetensors")
    merge(base, sources, tmp_path / "each.safetensors", architecture="sd1")
    both = [(tmp_path / "both.safetensors", 1.0)]
    merge(base, both, tmp_path / "merged.safetensors", architecture="sd1")
    one, other = (load_file(tmp_path / f"{n}.safetensors")[BASE] for n in ("each", "merged"))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert float((one - normal(5, 40, 24)).norm()) > 1


def values(folder: Path, name: str, seed: int) -> Path:
    """A ComfyUI file with a LoRA and a new value of a norm."""
    prefix = "diffusion_model."
    maker = Maker(seed)
    norm = "input_blocks.4.1.transformer_blocks.0.norm1"
    tensors = maker.lora(prefix + "input_blocks.4.1.transformer_blocks.0.attn2.to_k", 40, 24, 2)
    return write(folder / name, tensors | {f"{prefix}{norm}.set_weight": normal(seed, 40)})


def test_new_values(tmp_path: Path, base: Path) -> None:
    norm = "unet:down_blocks.1.attentions.0.transformer_blocks.0.norm1"
    a, b = values(tmp_path, "a.safetensors", 1), values(tmp_path, "b.safetensors", 2)
    plain = write(tmp_path / "p.safetensors", Maker(2).lora(KEY, 40, 24, 3))
    out = tmp_path / "o.safetensors"

    def found() -> Tensor:
        module = load_adapter(out).modules[norm]
        return module.delta(torch.zeros(40)) if module.algorithm == "set" else module.delta()

    combine([(a, 0.25), (b, 0.75)], out)
    torch.testing.assert_close(found(), 0.25 * normal(1, 40) + 0.75 * normal(2, 40))
    report = combine([(a, 0.5), (plain, 1.0)], out, overwrite=True)
    torch.testing.assert_close(found(), normal(1, 40))
    assert any(f.code == "value-carried" and f.key == norm for f in report.findings)
    with pytest.raises(UnsupportedError, match=r"norm1: .*a.safetensors and .*sum to 2, not 1"):
        combine([(a, 1.0), (b, 1.0)], out, overwrite=True)
    combine([(a, 1.0), (b, 1.0)], out, base=base, overwrite=True)
    origin = normal(6, 40)
    torch.testing.assert_close(found(), normal(1, 40) + normal(2, 40) - 2 * origin)


# carried tensors ----------------------------------------------------------------------------------


def bundled(folder: Path, name: str, seed: int, size: int = 16) -> Path:
    """A Kohya file with a textual-inversion vector, as InvokeAI and A1111 bundle them."""
    tensors = Maker(seed).lora(KEY, 40, 24, 2, alpha=1)
    return write(
        folder / name, tensors | {"bundle_emb.word.string_to_param.*": normal(seed, 2, size)}
    )


def test_vectors_of_one_name_are_weighted(tmp_path: Path) -> None:
    a, b = bundled(tmp_path, "a.safetensors", 1), bundled(tmp_path, "b.safetensors", 2)
    plain = write(tmp_path / "p.safetensors", Maker(4).lora(KEY, 40, 24, 2, alpha=1))
    out = tmp_path / "o.safetensors"
    key = "bundle_emb.word.string_to_param.*"
    combine([(a, 0.5), (b, -0.5), (plain, 1.0)], out)
    expected = 0.5 * normal(1, 2, 16) - 0.5 * normal(2, 2, 16)
    torch.testing.assert_close(load_adapter(out).extras[key], expected)
    combine([(a, 0.5), (plain, 1.0)], out, overwrite=True)
    torch.testing.assert_close(load_adapter(out).extras[key], normal(1, 2, 16))
    other = bundled(tmp_path, "c.safetensors", 3, size=24)
    with pytest.raises(UnsupportedError, match=r"a.safetensors, .*c.safetensors with different"):
        combine([(a, 0.5), (other, 1.0)], out, overwrite=True)


def test_prompt_methods_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", Maker(1).lora(KEY, 40, 24, 2))
    prompt = tmp_path / "prompt"
    write(prompt / "adapter_model.safetensors", {"prompt_embeddings": normal(1, 8, 16)})
    (prompt / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises((UnsupportedError, UsageError), match="prompt"):
        combine([(good, 1.0), (prompt, 1.0)], tmp_path / "o.safetensors")
