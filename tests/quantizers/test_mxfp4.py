"""MXFP4: gpt-oss against transformers, compressed-tensors against the package, DeepSeek's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils.quantization_config import Mxfp4Config

from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import by_name, logical
from peftsurgery.quantizers.grids import Grid, keep_equal
from peftsurgery.quantizers.rounding import subspace
from tests.quantizers.packages import arguments, compress, decompress
from tests.quantizers.scaled import (
    check_opens,
    check_rows,
    check_steps,
    check_unchanged,
    file_of,
    fresh,
    heavy,
    quantized,
    raw,
    seen,
)

FORM = "mxfp4-pack-quantized"
WEIGHTS = arguments("group", 4, group_size=32, scale_dtype=torch.uint8)


def experts(seed: int, count: int = 3, outputs: int = 5, groups: int = 2) -> dict[str, Tensor]:
    """Every byte may stand in the blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, outputs, groups, 16), generator=generator)
    scales = torch.randint(90, 140, (count, outputs, groups), generator=generator)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    return {
        f"{name}_blocks": blocks.to(torch.uint8),
        f"{name}_scales": scales.to(torch.uint8),
        f"{name}_bias": torch.zeros(count, outputs),
    }


def loaded(tensors: dict[str, Tensor]) -> Tensor:
    """What transformers makes of blocks and scales, fp32."""
    blocks, scales = (
        next(t for name, t in tensors.items() if name.endswith(end)) for end in ("blocks", "scales")
    )
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def test_decodes_as_transformers(tmp_path: Path) -> None:
    tensors = experts(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    checkpoint = file_of(tmp_path, tensors, {"quant_method": "mxfp4"})
    view = seen(checkpoint)
    assert set(view) == {name, f"{name}_bias"}
    assert view[name].shape == (3, 64, 5)
    for dtype in (torch.float32, torch.bfloat16):
        wanted = convert_moe_packed_tensors(
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=dtype
        )
        assert torch.equal(view[name].torch().to(dtype), wanted)
    check_unchanged(checkpoint)
    check_rows(checkpoint)


def test_fresh_experts(tmp_path: Path) -> None:
    weights = {
        "mlp.experts.gate_up_proj": heavy(3, 64, 6, seed=1),
        "mlp.experts.down_proj": heavy(2, 32, 7, seed=2) * 1e-4,
        "mlp.experts.zero_proj": torch.zeros(1, 32, 2),
    }
    view = fresh(tmp_path, "mxfp4", weights)
    check_steps(view, weights, slack=0.25)
    check_unchanged(view.stored)
    for name, weight in weights.items():
        stored = {key: view.stored[key].torch() for key in (f"{name}_blocks", f"{name}_scales")}
        assert torch.equal(loaded(stored), view[name].torch())
        error = (loaded(stored) - weight).square().sum()
        for moved in (-1, 1):  # no other exponent serves all groups better
            packed = view.packed[name]
            grid, _ = packed.format.grid(packed, 0, packed.rows)
            shifted = Grid(grid.book, grid.scale * 2.0**moved, group=32)
            matrix = packed.format.to_matrix(packed, weight)
            other = shifted.values(shifted.nearest(matrix))
            assert float((other - matrix).square().sum()) >= float(error) * (1 - 1e-6)


def test_decodes_and_packs_as_compressed_tensors(tmp_path: Path) -> None:
    weight = heavy(6, 96, seed=3) + 1e-4
    groups = weight.unflatten(1, (-1, 32))
    scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), WEIGHTS)
    theirs = compress(FORM, weight, scale, WEIGHTS)
    tensors = {f"a.{name}": tensor for name, tensor in theirs.items()}
    checkpoint = file_of(tmp_path / "theirs", tensors)
    view = seen(checkpoint)
    assert view.packed["a.weight"].format.name == "mxfp4-compressed"
    wanted = decompress(FORM, theirs, WEIGHTS)
    assert torch.equal(view["a.weight"].torch().to(wanted.dtype), wanted)
    check_unchanged(checkpoint)
    check_rows(checkpoint)
    mine = fresh(tmp_path / "mine", "mxfp4-compressed", {"a.weight": weight})
    for name, tensor in tensors.items():
        assert bytes(mine.stored[name].read()) == raw(tensor), name
    check_steps(mine, {"a.weight": weight}, slack=0.15)


@pytest.mark.parametrize("scale", ["scale", "weight_scale_inv"])
def test_decodes_deepseek(tmp_path: Path, scale: str) -> None:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-128, 128, (5, 48), generator=generator).to(torch.int8)
    bytes_ = torch.randint(100, 140, (5, 3), generator=generator).to(torch.uint8)
    held = bytes_.view(torch.float8_e8m0fnu)
    tensors = {"experts.0.w1.weight": codes, f"experts.0.w1.{scale}": held}
    checkpoint = file_of(tmp_path, tensors)
    wanted = Fp8Dequantize(None)._dequantize_one(codes, held, torch.float32)
    assert torch.equal(seen(checkpoint)["experts.0.w1.weight"].torch(), wanted)
    check_unchanged(checkpoint)
    check_rows(checkpoint)
    with pytest.raises(UnsupportedError, match="not made afresh"):
        by_name("mxfp4-deepseek").fresh("a.weight", (4, 32), "F32")


def test_transformers_opens_what_is_made(tmp_path: Path) -> None:
    torch.manual_seed(8)
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=3,
        num_experts_per_tok=2,
        vocab_size=40,
    )
    state = GptOssForCausalLM(config).bfloat16().state_dict()
    format = by_name("mxfp4")
    tensors, names = {}, []
    for name, tensor in state.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed = format.fresh(name, tuple(tensor.shape), "BF16")
            tensors |= quantized(packed, tensor.float())
            names.append(name)
        else:
            tensors[name] = tensor
    assert len(names) == 2
    file_of(tmp_path, tensors, format.config(), {"format": "pt"})
    config.quantization_config = format.config()
    config.save_pretrained(tmp_path)
    view = seen(open_checkpoint(tmp_path))
    loaded = GptOssForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    for name in names:
        assert torch.equal(loaded[name], view[name].torch().bfloat16()), name


def test_a_change_of_one_expert_leaves_the_others(tmp_path: Path) -> None:
    tensors = experts(5, groups=8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"] % 3 + 117
    packed = seen(file_of(tmp_path, tensors)).packed[name]
    before = packed.dequantize()
    generator = torch.Generator().manual_seed(6)
    down, up = (torch.randn(shape, generator=generator) for shape in ((256, 2), (2, 5)))
    change = torch.zeros_like(before)
    change[1] = down @ up * before[1].abs().mean() * 0.02
    basis = torch.linalg.qr(down)[0]

    def fed(weight: Tensor, grid: Grid, previous: Tensor | None) -> Tensor:
        assert previous is not None
        codes = previous.clone()
        rows = slice(5, 10)
        codes[rows] = subspace(weight[rows], grid.rows(5, 10), basis)
        return keep_equal(codes, previous, grid)

    made = quantized(packed, before + change, fed)
    for stored, tensor in made.items():
        assert raw(tensor[[0, 2]]) == raw(tensors[stored][[0, 2]])
    after = loaded(made)
    kept = ((after - before) * change).sum() / change.square().sum()
    assert 0.9 < float(kept) < 1.1
    plain = loaded(quantized(packed, before + change))
    lost, held = ((some - before - change)[1].T @ basis for some in (plain, after))
    assert float(held.norm()) < 0.5 * float(lost.norm())


def test_transformers_opens_compressed_tensors(tmp_path: Path) -> None:
    check_opens(tmp_path, "mxfp4-compressed")


def test_refuses(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = experts(7)
    cases: list[tuple[type[Exception], str, dict[str, Tensor]]] = [
        (UsageError, "without", {f"{name}_blocks": tensors[f"{name}_blocks"]}),
        (
            UsageError,
            r"needs bytes of shape \[3, 5, 2\]",
            {**tensors, f"{name}_scales": torch.zeros(3, 5, 1, dtype=torch.uint8)},
        ),
        (
            UnsupportedError,
            r"expected \(experts, outputs, groups, 16\)",
            {**tensors, f"{name}_blocks": torch.zeros(3, 5, 2, 8, dtype=torch.uint8)},
        ),
        (UsageError, "without", {"a.weight_packed": torch.zeros(4, 16, dtype=torch.uint8)}),
        (
            UsageError,
            r"needs bytes of shape \[4, 1\]",
            {
                "a.weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
                "a.weight_scale": torch.zeros(4, 2, dtype=torch.uint8),
            },
        ),
    ]
    for i, (error, message, bad) in enumerate(cases):
        checkpoint = file_of(tmp_path / str(i), bad)
        with pytest.raises(error, match=message):
            logical(checkpoint)
    with pytest.raises(UnsupportedError, match="mxfp4-compressed"):
        by_name("mxfp4").fresh("a.weight", (4, 32), "F32")
    with pytest.raises(UnsupportedError, match="multiple of 32"):
        by_name("mxfp4").fresh("x.experts.down_proj", (2, 40, 4), "F32")
    with pytest.raises(UnsupportedError, match="multiple of 32"):
        by_name("mxfp4-compressed").fresh("a.weight", (4, 40), "F32")
    packed = seen(file_of(tmp_path / "good", tensors)).packed[name]
    with pytest.raises(UsageError, match="NaN"):
        quantized(packed, torch.full(packed.shape, torch.inf))
