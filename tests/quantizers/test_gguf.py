"""Blocks of GGUF files against the gguf package, bit for bit, and what requantizing keeps."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.checkpoint.gguf import GGUFCheckpoint
from peftsurgery.errors import CheckFailed, UnsupportedError, UsageError
from peftsurgery.quantizers import Packed, PackedTensor, logical
from peftsurgery.quantizers.gguf_blocks import Blocks
from peftsurgery.quantizers.gguf_plain import Floats
from peftsurgery.quantizers.gguf_view import GGUF_FORMATS
from peftsurgery.quantizers.rounding import stochastic, subspace

ALL = tuple(GGUF_FORMATS)
REFERENCE = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # those the package quantizes
K = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def random_blocks(rng: np.random.Generator, format: Blocks, count: int) -> np.ndarray:
    """Blocks whose codes and small scales are any, and whose fp16 numbers are finite."""
    raw = rng.integers(0, 256, (count, format.size), dtype=np.uint8)
    for place in halves_of(format):
        numbers = rng.normal(0, 0.02, count).astype(np.float16)
        numbers[rng.random(count) < 0.1] = 0
        raw[:, place : place + 2] = numbers[:, None].view(np.uint8)
    return raw


def halves_of(format: Blocks) -> tuple[int, ...]:
    """Where fp16 numbers lie, after the block structures of ggml-common.h."""
    by_name = {
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
    }
    return by_name.get(format.name, (0,))


def file_of(
    folder: Path,
    tensors: dict[str, tuple[np.ndarray, str]],
    *,
    architecture: str = "flux",
    shapes: dict[str, tuple[int, ...]] | None = None,
    heads: tuple[int, int] | None = None,
) -> GGUFCheckpoint:
    """A file of stored arrays: name -> (array, type)."""
    path = folder / "m.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    if heads:
        writer.add_head_count(heads[0])
        writer.add_head_count_kv(heads[1])
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind_of(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(path)
    assert isinstance(found, GGUFCheckpoint)
    return found


def packed_of(folder: Path, raw: np.ndarray, name: str, **options) -> Packed:
    """The one weight `w.weight` of a file."""
    view = logical(file_of(folder, {"w.weight": (raw, name)}, **options))
    tensor = view["w.weight"]
    assert isinstance(tensor, PackedTensor)
    return tensor.packed


def values_of(format: Blocks, raw: np.ndarray) -> torch.Tensor:
    scale, shift, codes = format.unpack(torch.from_numpy(raw))
    return format._flat(scale, shift).values(codes)


def bits(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).view(np.uint32)


# blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_decodes_as_the_package(np_rng: np.random.Generator, name: str) -> None:
    format = GGUF_FORMATS[name]
    raw = np_rng.integers(0, 256, (97, format.size), dtype=np.uint8)  # NaN and infinity too
    with np.errstate(all="ignore"):
        expected = quants.dequantize(raw, kind_of(name))
    mine = values_of(format, raw).numpy()
    both = np.isnan(expected) & np.isnan(mine)
    assert np.array_equal(bits(expected)[~both], bits(mine)[~both])
    assert np.isfinite(mine).any()


@pytest.mark.parametrize("name", ALL)
def test_every_bit_of_a_block_is_a_scale_or_a_code(np_rng: np.random.Generator, name: str) -> None:
    format = GGUF_FORMATS[name]
    raw = torch.from_numpy(np_rng.integers(0, 256, (33, format.size), dtype=np.uint8))
    placed = format.place(format.unpack(raw)[2])
    assert torch.equal((raw & format.scale_bits) | placed, raw)
    assert not (placed & format.scale_bits).any()


def difficult(rng: np.random.Generator, block: int, count: int = 40) -> np.ndarray:
    """Normal values, and blocks of one value, of one sign, of an outlier, of zeros, of halves."""
    found = rng.normal(0, 0.05, (count, block)).astype(np.float32)
    found[0] = 0
    found[1] = 0.25
    found[2] = -0.25
    found[3] = np.abs(found[3])
    found[4] = -np.abs(found[4])
    found[5, 7] = 30
    found[6] = np.arange(block) - block // 2
    found[7] = (np.arange(block) % 16 - 8) / 2
    found[8] *= 1e-6
    found[9, 3:] = 0
    return found


@pytest.mark.parametrize("name", REFERENCE)
def test_quantizes_as_the_package(tmp_path: Path, np_rng: np.random.Generator, name: str) -> None:
    format = GGUF_FORMATS[name]
    values = difficult(np_rng, 96)
    expected = quants.quantize(values, kind_of(name))
    outline = format.fresh("w.weight", values.shape, "F32")
    made = format.quantize(outline, torch.from_numpy(values))["weight"]
    assert made.shape == outline.outlines["weight"].shape
    assert np.array_equal(made.numpy(), expected)


@pytest.mark.parametrize("name", ALL)
def test_fresh_is_near(np_rng: np.random.Generator, name: str) -> None:
    """Between its lowest and highest value, a block is off by no more than half a step; values
    outside are those next to it. fp16 scales shift the ends a little.
    """
    format = GGUF_FORMATS[name]
    values = torch.from_numpy(difficult(np_rng, 512))
    raw = format.quantize(format.fresh("w", tuple(values.shape), "F32"), values)["weight"]
    blocks, flat = raw.reshape(-1, format.size), values.reshape(-1, format.block)
    scale, shift, codes = format.unpack(blocks)
    grid = format._flat(scale, shift)
    step = grid.spread(scale.abs(), 0, format.block)
    low = grid.values(torch.full_like(codes, 0 if codes.dtype == torch.uint8 else -127))
    high = grid.values(
        torch.full_like(codes, 127 if codes.dtype == torch.int8 else format.largest_code)
    )
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    inside = flat.clamp(low, high)
    error = (grid.values(codes) - inside).abs()
    # codes are chosen before scale and shift are rounded to fp16, whose least value is 6e-8
    slack = step * format.largest_code / 2048 + 1e-6
    if shift is not None:
        slack = slack + grid.spread(shift.abs(), 0, format.block) / 2048
    assert bool((error <= step / 2 + slack).all())
    zero = (flat == 0).all(1)
    assert bool((grid.values(codes)[zero] == 0).all())
    ceiling = {"Q2_K": 0.45, "Q3_K": 0.25}.get(name, 0.15)
    normal = slice(20 * 512 // format.block, None)
    off = (grid.values(codes) - flat)[normal].norm() / flat[normal].norm()
    assert float(off) < ceiling


def plain_loop_minima(x: np.ndarray, name: str) -> tuple[float, float]:
    """make_qkx2_quants of ggml-quants.c for one group, float64: (scale, -min)."""
    largest, start, count = {"Q4_K": (15, -1.0, 20), "Q5_K": (31, -0.5, 15), "Q2_K": (3, -0.5, 15)}[
        name
    ]
    x = x.astype(np.float64)
    weight = np.abs(x) + (0 if name == "Q2_K" else math.sqrt(float((x * x).mean())))
    low, high = min(float(x.min()), 0.0), float(x.max())
    if high == low:
        return 0.0, -low
    scale, least = (high - low) / largest, low
    codes = np.clip(np.rint((x - low) / scale), 0, largest)
    best = float((weight * (scale * codes + low - x) ** 2).sum())
    for i in range(count + 1):
        codes = np.clip(np.rint((start + 0.1 * i + largest) / (high - low) * (x - low)), 0, largest)
        system = np.array(
            [
                [(weight * codes * codes).sum(), (weight * codes).sum()],
                [(weight * codes).sum(), weight.sum()],
            ]
        )
        if np.linalg.det(system) <= 0:
            continue
        s, m = np.linalg.solve(system, [(weight * codes * x).sum(), (weight * x).sum()])
        if m > 0:
            s, m = (weight * codes * x).sum() / (weight * codes * codes).sum(), 0.0
        error = float((weight * (s * codes + m - x) ** 2).sum())
        if error < best:
            best, scale, least = error, float(s), float(m)
    return scale, -least


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K"])
def test_search_with_minima_against_loops(np_rng: np.random.Generator, name: str) -> None:
    """Equal for most groups; fp32 sums decide a near tie otherwise now and then, at no cost."""
    format = GGUF_FORMATS[name]
    groups = np_rng.normal(0.01, 0.05, (200, format.group)).astype(np.float32)
    scales, lows = format._search(torch.from_numpy(groups))  # pyright: ignore[reportAttributeAccessIssue]
    mine = np.stack((scales.numpy(), lows.numpy()), 1).astype(np.float64)
    expected = np.array([plain_loop_minima(group, name) for group in groups])
    alike = np.isclose(mine, expected, rtol=1e-3, atol=1e-6).all(1)
    assert alike.mean() > 0.85

    def error(pairs: np.ndarray) -> float:
        x, scale, low = groups.astype(np.float64), pairs[:, :1], pairs[:, 1:]
        weight = np.abs(x) + (0 if name == "Q2_K" else np.sqrt((x * x).mean(1, keepdims=True)))
        codes = np.clip(np.rint((x + low) / scale), 0, format.largest_code)
        return float((weight * (scale * codes - low - x) ** 2).sum())

    assert error(mine) == pytest.approx(error(expected), rel=0.02)


@pytest.mark.parametrize(("name", "zero"), [("Q3_K", 4), ("Q6_K", 32)])
def test_centred_search_against_loops(np_rng: np.random.Generator, name: str, zero: int) -> None:
    """As above: the scale of least weighted error among the nineteen."""
    groups = np_rng.normal(0, 0.05, (200, 16)).astype(np.float32)
    found = GGUF_FORMATS[name]._search(torch.from_numpy(groups)).numpy()  # pyright: ignore[reportAttributeAccessIssue]
    alike = 0
    for x, scale in zip(groups.astype(np.float64), found, strict=True):
        furthest = x[np.abs(x).argmax()]
        errors = {}
        for i in range(-9, 10):
            codes = np.clip(np.rint(-(zero + 0.1 * i) / furthest * x), -zero, zero - 1)
            s = (x**3 * codes).sum() / (x**2 * codes**2).sum()
            errors[float(s)] = (x**2 * (x - s * codes) ** 2).sum()
        best = min(errors, key=lambda s: errors[s])
        nearest = min(errors, key=lambda s: abs(s - scale))
        alike += scale == pytest.approx(best, rel=1e-4)
        assert errors[nearest] <= 1.1 * errors[best]
        assert scale == pytest.approx(nearest, rel=0.01)
    assert alike > 0.85 * len(groups)


# whole weights ------------------------------------------------------------------------------------


def rows_of(rng: np.random.Generator, name: str, rows: int, columns: int) -> np.ndarray:
    """Stored rows of any codes."""
    format = GGUF_FORMATS[name]
    blocks = random_blocks(rng, format, rows * columns // format.block)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", ALL)
def test_unchanged_keeps_its_bytes(tmp_path: Path, np_rng: np.random.Generator, name: str) -> None:
    raw = rows_of(np_rng, name, 9, 768)
    packed = packed_of(tmp_path, raw, name)
    weight = packed.dequantize()
    assert np.array_equal(bits(weight), bits(quants.dequantize(raw, kind_of(name))))
    again = packed.format.quantize(packed, weight)
    assert np.array_equal(again["weight"].numpy(), raw)


@pytest.mark.parametrize("name", ALL)
def test_windows_of_rows(tmp_path: Path, np_rng: np.random.Generator, name: str) -> None:
    view = logical(file_of(tmp_path, {"w.weight": (rows_of(np_rng, name, 7, 512), name)}))
    whole = view["w.weight"].torch()
    for start, stop in ((0, 7), (2, 3), (3, 7), (5, 5)):
        assert torch.equal(view["w.weight"].rows(start, stop).torch(), whole[start:stop])


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q4_K", "Q6_K"])
@pytest.mark.parametrize(
    "shape", [(16, 12, 4, 4), (48, 16, 2, 2), (64, 4, 3, 3), (96, 8), (32, 56)]
)
def test_rows_that_do_not_fit_blocks(
    tmp_path: Path, np_rng: np.random.Generator, name: str, shape: tuple[int, ...]
) -> None:
    """ComfyUI-GGUF lays weights out in rows of 256 and keeps their shape beside."""
    count = math.prod(shape)
    if count % 256:
        shape = (shape[0] * 8, *shape[1:])
        count *= 8
    raw = rows_of(np_rng, name, count // 256, 256)
    packed = packed_of(tmp_path, raw, name, shapes={"w.weight": shape})
    expected = torch.from_numpy(quants.dequantize(raw, kind_of(name))).reshape(shape)
    assert torch.equal(packed.dequantize(), expected)
    for start, stop in ((1, 4), (shape[0] - 3, shape[0])):
        assert torch.equal(PackedTensor(packed).rows(start, stop).torch(), expected[start:stop])
    assert np.array_equal(packed.format.quantize(packed, expected)["weight"].numpy(), raw)
    changed = expected.clone()
    row = int(expected.flatten(1).norm(dim=1).argmax())  # scales of random bits may be nothing
    changed[row] *= 0.5
    made = packed.format.quantize(packed, changed)["weight"].numpy()
    back = torch.from_numpy(quants.dequantize(made, kind_of(name))).reshape(shape)
    assert not torch.equal(back[row], expected[row])
    far = torch.ones(shape[0], dtype=torch.bool)
    near = 256 // math.prod(shape[1:]) + 1
    far[max(0, row - near) : row + near + 1] = False
    assert torch.equal(back[far], expected[far])


@pytest.mark.parametrize("name", ALL)
def test_a_change_of_some_rows(tmp_path: Path, np_rng: np.random.Generator, name: str) -> None:
    """W + Δ, Δ of rank 2 on rows 3 to 6: the other rows keep their bytes, and the changed ones are
    nearer than the old ones; error feedback keeps Δ V better than nearest rounding does.
    """
    values = np_rng.normal(0, 0.05, (8, 512)).astype(np.float32)
    format = GGUF_FORMATS[name]
    outline = format.fresh("w", values.shape, "F32")
    raw = format.quantize(outline, torch.from_numpy(values))["weight"].numpy()
    packed = packed_of(tmp_path, raw, name)
    weight = packed.dequantize()
    basis = torch.linalg.qr(torch.randn(512, 2))[0]
    delta = torch.zeros(8, 512)
    delta[3:6] = 0.2 * torch.randn(3, 2) @ basis.T
    made = format.quantize(packed, weight + delta)["weight"].numpy()
    assert np.array_equal(made[:3], raw[:3])
    assert np.array_equal(made[6:], raw[6:])
    back = torch.from_numpy(quants.dequantize(made, kind_of(name)))
    assert (back - weight - delta).norm() < delta.norm()
    held = format.quantize(packed, weight + delta, lambda w, grid, old: subspace(w, grid, basis))
    other = torch.from_numpy(quants.dequantize(held["weight"].numpy(), kind_of(name)))
    lost = [((values - weight - delta)[3:6] @ basis).norm() for values in (back, other)]
    assert lost[1] < 0.5 * lost[0]


@pytest.mark.parametrize("name", ALL)
def test_scales_follow_values_that_outgrow_or_leave_them(
    tmp_path: Path, np_rng: np.random.Generator, name: str
) -> None:
    format = GGUF_FORMATS[name]
    values = torch.from_numpy(np_rng.normal(0, 0.05, (4, 512)).astype(np.float32))
    raw = format.quantize(format.fresh("w", (4, 512), "F32"), values)["weight"].numpy()
    packed = packed_of(tmp_path, raw, name)
    for factor in (8.0, 0.02):
        made = format.quantize(packed, values * factor)["weight"].numpy()
        back = torch.from_numpy(quants.dequantize(made, kind_of(name)))
        fresh = format.quantize(format.fresh("w", (4, 512), "F32"), values * factor)["weight"]
        best = torch.from_numpy(quants.dequantize(fresh.numpy(), kind_of(name)))
        wanted = values * factor
        assert (back - wanted).norm() <= 1.05 * (best - wanted).norm()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K"])
def test_random_rounding_is_right_on_average(
    tmp_path: Path, np_rng: np.random.Generator, name: str
) -> None:
    format = GGUF_FORMATS[name]
    values = torch.from_numpy(np_rng.normal(0, 0.05, (2, 256)).astype(np.float32))
    raw = format.quantize(format.fresh("w", (2, 256), "F32"), values)["weight"].numpy()
    packed = packed_of(tmp_path, raw, name)
    weight = packed.dequantize()
    wanted = weight * 0.97
    random = torch.Generator().manual_seed(int(np_rng.integers(1 << 30)))
    total = torch.zeros_like(wanted)
    for _ in range(200):
        made = format.quantize(packed, wanted, lambda w, g, old: stochastic(w, g, random))
        total += torch.from_numpy(quants.dequantize(made["weight"].numpy(), kind_of(name)))
    moved = float(
        ((total / 200 - weight) * (wanted - weight)).sum() / (wanted - weight).norm() ** 2
    )
    assert moved == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_in_the_order_of_rope(tmp_path: Path, np_rng: np.random.Generator, heads: int) -> None:
    """Stored rows are the model's, the halves of every head interleaved."""
    values = torch.from_numpy(np_rng.normal(0, 0.05, (24, 64)).astype(np.float32))
    half = 24 // heads // 2
    interleaved = values.reshape(heads, 2, half, 64).swapaxes(1, 2).reshape(24, 64).numpy()
    raw = quants.quantize(interleaved, kind_of("Q5_1"))
    plain = interleaved.astype(np.float16)
    view = logical(
        file_of(
            tmp_path,
            {"blk.0.attn_q.weight": (raw, "Q5_1"), "blk.1.attn_k.weight": (plain, "F16")},
            architecture="llama",
            heads=(heads, heads),
        )
    )
    tensor = view["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(tensor, PackedTensor)
    straight = quants.dequantize(quants.quantize(values.numpy(), kind_of("Q5_1")), kind_of("Q5_1"))
    assert torch.equal(tensor.torch(), torch.from_numpy(straight))
    assert torch.equal(tensor.rows(5, 17).torch(), torch.from_numpy(straight[5:17]))
    packed = tensor.packed
    assert np.array_equal(packed.format.quantize(packed, tensor.torch())["weight"].numpy(), raw)
    changed = tensor.torch().clone()
    changed[4] *= 0.5
    made = packed.format.quantize(packed, changed)["weight"].numpy()
    place = 4 // (2 * half) * 2 * half + (4 % half) * 2 + (4 % (2 * half)) // half
    assert [i for i in range(24) if not np.array_equal(made[i], raw[i])] == [place]
    other = view["model.layers.1.self_attn.k_proj.weight"]
    assert isinstance(other, PackedTensor)
    assert torch.equal(other.torch(), values.half().float())
    assert torch.equal(other.rows(3, 9).torch(), values.half().float()[3:9])
    made = other.packed.format.quantize(other.packed, values.half().float())["weight"]
    assert np.array_equal(made.numpy(), plain)


def test_refusals(tmp_path: Path, np_rng: np.random.Generator) -> None:
    format = GGUF_FORMATS["Q4_K"]
    with pytest.raises(UnsupportedError, match="multiple of 256"):
        format.fresh("w", (4, 320), "F32")
    outline = format.fresh("w.weight", (1, 256), "F32")
    with pytest.raises(UsageError, match="NaN"):
        format.quantize(outline, torch.full((1, 256), torch.nan))
    with pytest.raises(UsageError, match="fp16"):
        format.quantize(outline, torch.full((1, 256), 1e9))
    raw = np_rng.integers(0, 256, (3, 66), dtype=np.uint8)
    view = logical(file_of(tmp_path, {"w.weight": (raw, "IQ2_XXS")}))
    tensor = view["w.weight"]
    assert isinstance(tensor, PackedTensor)
    assert tensor.shape == (3, 256)
    for attempt in (
        tensor.torch,
        lambda: tensor.packed.format.quantize(tensor.packed, torch.zeros(3, 256)),
    ):
        with pytest.raises(UnsupportedError, match="IQ2_XXS"):
            attempt()


# plain weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_floats_as_codes(np_rng: np.random.Generator, name: str, dtype: torch.dtype) -> None:
    book = Floats(name)
    exact = torch.randn(200).to(dtype)
    codes = book.nearest(exact.float())
    assert torch.equal(codes.view(dtype), exact)
    assert torch.equal(book.values(codes), exact.float())
    wanted = torch.cat((torch.randn(500), torch.randn(100) * 1e-6, torch.zeros(3), exact.float()))
    lower, upper, share = book.between(wanted)
    below, above = book.values(lower), book.values(upper)
    assert bool((below <= wanted).all() and (wanted <= above).all())
    assert bool(((share >= 0) & (share <= 1)).all())
    middle = (below.double() + above.double()) / 2
    nearest = wanted.to(dtype).float()
    assert torch.equal(nearest[wanted < middle], below[wanted < middle])
    assert torch.equal(nearest[wanted > middle], above[wanted > middle])
    raised = Floats(name, -1.0)
    assert torch.equal(raised.values(codes), exact.float() - 1)
    assert torch.equal(raised.values(raised.nearest(exact.float() - 1)), exact.float() - 1)
    if name != "F32":
        assert bool((below < above).any())
        with pytest.raises(CheckFailed, match="does not fit"):
            book.nearest(torch.tensor([3.4e38 * 2 if name == "BF16" else 7e4]).clamp(max=3.4e38))
