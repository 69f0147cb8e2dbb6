"""Wrong shapes, missing fields, NaN, empty tensors: refused by name, before any arithmetic."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from peftsurgery.algorithms import Full, LoHa, LoKr, LoRA, Replace, WeightAdapter
from peftsurgery.errors import UsageError
from tests.algorithms.cases import close, draw
from tests.counting import calls


def z(*shape: int) -> Tensor:
    return torch.ones(*shape)


Build = Callable[[], WeightAdapter]

BROKEN: list[tuple[str, str, Build]] = [
    (
        "lora ranks",
        r"LoRA\.up: got shape \(6, 2\), expected \(out, 3\)",
        lambda: LoRA(z(6, 2), z(3, 5)),
    ),
    ("lora kernel on up", r"LoRA\.up", lambda: LoRA(z(6, 2, 3, 3), z(2, 5, 3, 3))),
    ("lora 1-D down", r"LoRA\.down: got shape \(2,\)", lambda: LoRA(z(6, 2), z(2))),
    ("lora 1-D up", r"LoRA\.up", lambda: LoRA(z(6), z(6, 2))),
    ("tucker up", r"LoRA\.up", lambda: LoRA(z(6, 2), z(2, 5), z(3, 2, 3))),
    ("tucker down", r"LoRA\.mid", lambda: LoRA(z(6, 2), z(2, 5), z(2, 3, 3))),
    ("tucker kernel", r"LoRA\.down", lambda: LoRA(z(6, 2), z(2, 5, 3), z(2, 2, 3))),
    ("empty", r"LoRA\.down.*no elements", lambda: LoRA(z(6, 2), z(2, 0))),
    ("rank 0", r"LoRA\.up.*no elements", lambda: LoRA(z(6, 0), z(0, 5))),
    ("integers", r"LoRA\.up: got torch.int64", lambda: LoRA(z(6, 2).long(), z(2, 5))),
    ("loha b", r"LoHa\.w1_b", lambda: LoHa(z(6, 2), z(3, 5), z(6, 2), z(2, 5))),
    ("loha sizes", r"LoHa\.w2_a", lambda: LoHa(z(6, 2), z(2, 5), z(7, 2), z(2, 5))),
    ("loha columns", r"LoHa\.w2_a", lambda: LoHa(z(6, 2), z(2, 5), z(6, 2), z(2, 6))),
    ("loha one core", r"LoHa\.t2", lambda: LoHa(z(2, 6), z(2, 5), z(6, 2), z(2, 5), z(2, 2))),
    (
        "loha core",
        r"LoHa\.w1_a",
        lambda: LoHa(z(6, 2), z(2, 5), z(2, 6), z(2, 5), z(2, 2), z(2, 2)),
    ),
    (
        "loha hint",
        r"LoHa\.w1_b.*kernel \(3, 3\)",
        lambda: LoHa(z(6, 2), z(2, 5), z(6, 2), z(2, 5), kernel=(3, 3)),
    ),
    ("lokr nothing", "either w1, or both", lambda: LoKr(w2=z(2, 3))),
    ("lokr half a pair", "either w1, or both", lambda: LoKr(w1_a=z(2, 1), w2=z(2, 3))),
    (
        "lokr twice",
        "either w2, or both",
        lambda: LoKr(w1=z(2, 2), w2=z(2, 3), w2_a=z(2, 1), w2_b=z(1, 3)),
    ),
    ("lokr w1", r"LoKr\.w1", lambda: LoKr(w1=z(2, 2, 3), w2=z(2, 3))),
    ("lokr pair", r"LoKr\.w1_b", lambda: LoKr(w1_a=z(2, 1), w1_b=z(2, 2), w2=z(2, 3))),
    ("lokr w2 pair", r"LoKr\.w2_b", lambda: LoKr(w1=z(2, 2), w2_a=z(2, 1), w2_b=z(2, 3))),
    (
        "lokr core",
        r"LoKr\.w2_a",
        lambda: LoKr(w1=z(2, 2), w2_a=z(3, 2), w2_b=z(2, 3), t2=z(2, 2, 3)),
    ),
    ("lokr stray core", r"LoKr\.t2", lambda: LoKr(w1=z(2, 2), w2=z(3, 2), t2=z(2, 2, 3))),
    ("lokr hint", "no multiple of kernel", lambda: LoKr(w1=z(2, 2), w2=z(3, 5), kernel=(3,))),
    ("full nothing", "neither", Full),
    ("set nothing", "neither", Replace),
    ("set delta", r"Replace\.bias", lambda: Replace(bias=z(3), bias_is_value=False)),
    ("set scale", r"Replace\.scale", lambda: Replace(z(3), scale=0.5)),
    ("bias", r"LoRA\.bias: got shape \(5,\)", lambda: LoRA(z(6, 2), z(2, 5), bias=z(5))),
    ("no axis", "needs magnitude_axis", lambda: LoRA(z(6, 2), z(2, 5), magnitude=z(6))),
    ("no magnitude", "without a magnitude", lambda: LoRA(z(6, 2), z(2, 5), magnitude_axis="in")),
    (
        "magnitude",
        r"LoRA\.magnitude: got shape \(5,\), expected \(6,\)",
        lambda: LoRA(z(6, 2), z(2, 5), magnitude=z(5), magnitude_axis="out"),
    ),
    ("padding", r"LoRA\.padded_shape", lambda: LoRA(z(6, 2), z(2, 5), padded_shape=(6, 4))),
]


@pytest.mark.parametrize(("message", "build"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_construction_names_the_field(message: str, build: Build) -> None:
    with pytest.raises(UsageError, match=message):
        build()


def test_magnitudes_of_any_stored_shape_are_flat(rng: Generator) -> None:
    for shape in ((6,), (6, 1), (6, 1, 1, 1), (1, 6, 1, 1)):
        adapter = LoRA(z(6, 2), z(2, 5), magnitude=z(*shape), magnitude_axis="out")
        assert adapter.magnitude is not None
        assert adapter.magnitude.shape == (6,)


def test_weights_that_do_not_fit(rng: Generator) -> None:
    adapter = LoRA(z(4, 2), z(2, 6))
    for shape in ((6, 4), (4, 7), (24,)):
        with pytest.raises(UsageError, match="does not fit"):
            adapter.delta(z(*shape))
        with pytest.raises(UsageError, match="does not fit"):
            adapter.merged(z(*shape))
    conv = LoRA(z(4, 2), z(2, 6, 3, 1))
    with pytest.raises(UsageError, match="does not fit"):
        conv.delta(z(4, 6, 1, 3))
    with pytest.raises(UsageError, match="does not fit a bias"):
        LoRA(z(4, 2), z(2, 6), bias=z(4)).merged(z(4, 6), z(5))


def test_nan_is_named(rng: Generator) -> None:
    bad = draw(rng, 2, 5)
    bad[1, 2] = math.nan
    adapter = LoRA(draw(rng, 6, 2), bad, scale=math.inf)
    assert adapter.nonfinite() == ("down", "scale")
    with pytest.raises(UsageError, match=r"LoRA\.down: NaN or Inf"):
        adapter.svd()
    lokr = LoKr(w1=draw(rng, 2, 2), w2=bad)
    with pytest.raises(UsageError, match=r"LoKr\.w2: NaN or Inf"):
        lokr.svd()
    assert LoRA(draw(rng, 6, 2), draw(rng, 2, 5)).nonfinite() == ()
    fp8 = LoRA(z(6, 2).to(torch.float8_e4m3fn), z(2, 5).to(torch.float8_e5m2))
    assert fp8.nonfinite() == ()


def test_extreme_but_legal_sizes(rng: Generator) -> None:
    tall = LoRA(draw(rng, 3, 9), draw(rng, 9, 2))  # rank above both sides
    close(tall.delta(), tall.up @ tall.down)
    assert tall.svd()[1].numel() == 2
    row = LoRA(draw(rng, 1, 4), draw(rng, 4, 50))
    u, s, vh = row.svd()
    close(u * s @ vh, row.delta(), 1e-5)
    dot = LoKr(w1=z(1, 1), w2=z(1, 1))
    assert dot.delta().shape == (1, 1)
    zero = LoRA(torch.zeros(5, 2), draw(rng, 2, 4))
    assert float(zero.svd()[1].abs().max()) == 0


def test_fp16_factors_are_multiplied_in_fp32(rng: Generator) -> None:
    big = LoRA(torch.full((4, 8), 300.0).half(), torch.full((8, 4), 300.0).half())
    assert float(big.delta().max()) == 720000.0  # beyond fp16


def test_a_thousand_modules_are_built_quickly() -> None:
    """A file holds a thousand: setting attributes of nn.Module is five times as many calls."""
    tensors = [(z(8, 2).half(), z(2, 8).half()) for _ in range(788)]
    assert calls(lambda: [LoRA(up, down, scale=0.5) for up, down in tensors]) < 70 * 788
