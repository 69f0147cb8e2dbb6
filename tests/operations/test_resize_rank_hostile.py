"""resize-rank on hostile numbers and shapes: the right answer, or a clear error and no file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from peftsurgery.cli import main
from peftsurgery.codec import load_adapter
from peftsurgery.errors import CheckFailed, UsageError
from peftsurgery.operations import truncating
from peftsurgery.operations.resize_rank import resize_rank
from tests.codec.build import dense, gap, read, write
from tests.codec.parts import Maker

ATTENTION = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
OTHER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v"
HOME = "unet:down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def lora(up: torch.Tensor, down: torch.Tensor, alpha: float | None = None) -> dict:
    found = {f"{ATTENTION}.lora_up.weight": up, f"{ATTENTION}.lora_down.weight": down}
    return found | ({} if alpha is None else {f"{ATTENTION}.alpha": torch.tensor(alpha)})


def resized(tensors: dict, tmp_path: Path, rank: str | int = 2, **options: object):
    source = write(tmp_path / "in.safetensors", tensors)
    out = tmp_path / "o.safetensors"
    settings: dict = {"rank": rank, "architecture": "sd1", **options}
    report = resize_rank(source, out, **settings)
    return report, load_adapter(out, architecture="sd1").modules[HOME]


def product(tensors: dict, alpha: float | None = None) -> np.ndarray:
    up, down = (tensors[f"{ATTENTION}.lora_{x}.weight"].double().numpy() for x in ("up", "down"))
    return (1.0 if alpha is None else alpha / down.shape[0]) * (up @ down)


def truncated(matrix: np.ndarray, k: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


@pytest.mark.parametrize("rule", ["2", "energy:0.99", "ratio:10", "noise", "total-rank:2"])
@pytest.mark.parametrize("zero", ["up", "down", "alpha"])
def test_zero_changes(zero: str, rule: str, tmp_path: Path) -> None:
    maker = Maker(1)
    up, down = maker.draw(9, 4), maker.draw(4, 7)
    tensors = lora(up * (zero != "up"), down * (zero != "down"), 0.0 if zero == "alpha" else 2.0)
    report, module = resized(tensors, tmp_path, rule)
    assert not dense(module).any()
    assert module.rank in (1, 2)
    assert all(np.isfinite(t).all() for t in read(tmp_path / "o.safetensors").values())
    assert "zero" in [f.code for f in report.findings]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["lora_up.weight", "lora_down.weight", "dora_scale"])
def test_nan_is_named_and_nothing_is_written(where: str, bad: float, tmp_path: Path) -> None:
    tensors = Maker(1).dora(ATTENTION, 9, 7, "out", 4)
    tensors[f"{ATTENTION}.{where}"].reshape(-1)[3] = bad
    with pytest.raises(UsageError, match=r"unet:.*to_k.*NaN or Inf"):
        resized(tensors, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"in.safetensors"}


@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1), (3, 200), (200, 3)])
@pytest.mark.parametrize("rank", [1, 5, 64])
def test_thin_matrices(shape: tuple[int, int], rank: int, tmp_path: Path) -> None:
    maker = Maker(sum(shape))
    tensors = lora(maker.draw(shape[0], rank), maker.draw(rank, shape[1]))
    _, module = resized(tensors, tmp_path, 2)
    assert module.rank == min(2, rank, *shape)
    assert gap(dense(module), truncated(product(tensors), 2)) < 1e-5


def test_duplicated_rows_and_ranks(tmp_path: Path) -> None:
    maker = Maker(2)
    up, down = maker.draw(20, 3), maker.draw(3, 16)
    up, down = torch.cat([up, up, up[:, :1]], 1), torch.cat([down, down, down[:1]])
    up[5:10] = up[:5]
    tensors = lora(up, down)
    report, module = resized(tensors, tmp_path, "energy:1")
    assert module.rank in (3, 4, 5)  # by rounding of the last bits
    assert gap(dense(module), product(tensors)) < 1e-5
    assert report.modules[0]["old_rank"] == 7


def test_a_large_layer(tmp_path: Path) -> None:
    """12288 x 3072: from the factors; a dense ΔW of it would take 150 MB in fp32."""
    maker = Maker(3, dtype=torch.float16)
    up, down = maker.draw(12288, 12) * torch.logspace(0, -3, 12), maker.draw(12, 3072)
    tensors = lora(up.half(), down)
    report, module = resized(tensors, tmp_path, 4)
    x, y = up.half().double(), down.double()
    core = torch.linalg.qr(x)[1] @ torch.linalg.qr(y.T)[1].T
    s = torch.linalg.svdvals(core)
    tail = float((s[4:].square().sum() / s.square().sum()).sqrt())
    assert report.modules[0]["frobenius_error"] == pytest.approx(tail, abs=4e-3)
    assert module.shape == (12288, 3072)


# the range of fp16 --------------------------------------------------------------------------------


@pytest.mark.parametrize("up_size", [1e-7, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("down_size", [1e-7, 1e-3, 1e3])
@pytest.mark.parametrize("dtype", ["keep", "fp16", "bf16"])
def test_small_and_large_values_survive_fp16(
    up_size: float, down_size: float, dtype: str, tmp_path: Path
) -> None:
    maker = Maker(4)
    up, down = (maker.draw(64, 6) * up_size).half(), (maker.draw(6, 48) * down_size).half()
    tensors = lora(up, down, 3.0)
    if not (up.any() and down.any()):
        return
    report, module = resized(tensors, tmp_path, 3, dtype=dtype)
    eps = 8e-3 if dtype == "bf16" else 1e-3
    assert gap(dense(module), truncated(product(tensors, 3.0), 3)) < 4 * eps
    stored = {t.dtype for t in module.tensors().values()}
    assert stored == {torch.bfloat16 if dtype == "bf16" else torch.float16}
    moved = "scale-moved" in [f.code for f in report.findings]
    assert moved or float(module.scale) == 0.5


def test_factors_of_very_different_size_are_balanced(tmp_path: Path) -> None:
    maker = Maker(4)
    tensors = lora((maker.draw(64, 6) * 1e-7).half(), (maker.draw(6, 48) * 6e3).half())
    _, module = resized(tensors, tmp_path, 3)
    up, down = (t.double().norm() for t in module.tensors().values())
    assert float(up / down) == pytest.approx(1.0, rel=1e-3)


# the proof can fail -------------------------------------------------------------------------------


def test_a_wrong_truncation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = truncating._rounded

    def wrong(subject, up, down):
        up, down, shift = original(subject, up, down)
        return up * 1.01, down, shift

    maker = Maker(4)
    tensors = lora(maker.draw(20, 6) * torch.logspace(0, -2, 6), maker.draw(6, 18))
    monkeypatch.setattr(truncating, "_rounded", wrong)
    with pytest.raises(CheckFailed, match=r"unet:.*to_k: at rank 4 .* discarded singular values"):
        resized(tensors, tmp_path, 4)
    assert {p.name for p in tmp_path.iterdir()} == {"in.safetensors"}


def test_a_file_that_reads_back_differently_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftsurgery.operations import resize_rank as module

    original = module.encode_as

    def wrong(*args, **kwargs):
        encoded = original(*args, **kwargs)
        key = f"{ATTENTION}.lora_up.weight"
        encoded.tensors[""][key] = encoded.tensors[""][key] * 1.001
        return encoded

    monkeypatch.setattr(module, "encode_as", wrong)
    maker = Maker(4)
    with pytest.raises(CheckFailed, match="does not read back"):
        resized(lora(maker.draw(20, 6), maker.draw(6, 18)), tmp_path, 4)
    assert {p.name for p in tmp_path.iterdir()} == {"in.safetensors"}


# options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": "ratio:0.5"}, "p > 1"),
        ({"rank": "4", "conv_rank": "size:1MB"}, "belongs into --rank"),
        ({"rank": "size:1MB", "kohya_compat": True}, "no budget"),
        ({"rank": "energy:0.9", "kohya_compat": True}, "kohya-compat"),
        ({"rank": "4", "algorithm": "loha"}, "algorithm 'loha' is not known"),
        ({"rank": "4", "dtype": "int8"}, "dtype 'int8' is not known"),
        ({"rank": "4", "device": "warp:9"}, "--device warp:9"),
        ({"rank": "4", "device": "mps"}, "--device mps"),
        ({"rank": "4", "to": "nowhere"}, "layout 'nowhere' is not known"),
        ({"rank": "total-rank:1"}, "the smallest that works is total-rank:2"),
    ],
)
def test_wrong_options_are_named(options: dict, match: str, tmp_path: Path) -> None:
    maker = Maker(1)
    tensors = maker.lora(ATTENTION, 9, 7, 4) | maker.lora(OTHER, 9, 7, 4)
    source = write(tmp_path / "in.safetensors", tensors)
    with pytest.raises(UsageError, match=match):
        resize_rank(source, tmp_path / "o.safetensors", architecture="sd1", **options)
    assert {p.name for p in tmp_path.iterdir()} == {"in.safetensors"}


@pytest.mark.parametrize("rule", ["ratio:3,max:9", "fro:0.8,max:9", "cumulative:0.6,max:3"])
def test_kohya_compat_takes_the_ranks_of_sd_scripts(rule: str, tmp_path: Path) -> None:
    from tests.linalg.test_rank_rules import sd_scripts

    maker = Maker(5)
    up = maker.draw(20, 8) * torch.logspace(0, -1.5, 8)
    tensors = lora(up, maker.draw(8, 30), 4.0)
    _, module = resized(tensors, tmp_path, rule, kohya_compat=True)
    (method, p), (_, cap) = (part.split(":") for part in rule.split(","))
    s = torch.linalg.svdvals(torch.from_numpy(product(tensors)))
    wanted = min(sd_scripts(method, float(p), s, int(cap)), 8)
    assert module.rank == wanted
    assert float(module.scale) == 0.5
    assert gap(dense(module), truncated(product(tensors, 4.0), wanted)) < 1e-5


def test_command_line(tmp_path: Path) -> None:
    maker = Maker(5)
    source = write(tmp_path / "in.safetensors", maker.lora(ATTENTION, 20, 30, 8, alpha=4))
    out = tmp_path / "o.safetensors"
    arguments = ["resize-rank", str(source), "-o", str(out), "--architecture", "sd1", "--json"]
    done = CliRunner().invoke(main, [*arguments, "--rank", "max:3,energy:0.9", "-q"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["modules"][0]["rank"] == 3
    assert report["outputs"] == [str(out)]
    done = CliRunner().invoke(main, [*arguments, "--rank", "noise", "--dry-run", "-q"])
    assert done.exit_code == 2  # exists
    done = CliRunner().invoke(main, [*arguments, "--rank", "noise", "--dry-run", "--overwrite"])
    assert done.exit_code == 0, done.output
    assert CliRunner().invoke(main, [*arguments, "--rank", "what"]).exit_code == 2
