"""What survives of a small change in packed weights, and how long merging into them takes.

    python tests/benchmarks/quantized.py survival            # every format and rounding: minutes
    python tests/benchmarks/quantized.py survival --markdown # the table of the README
    python tests/benchmarks/quantized.py speed --folder F    # merges of a TinyLlama-shaped base

A benchmark and not a test: it prints figures of one run and always ends with 0.

* survival: a Gaussian 1024 x 1024 weight packed in a format and unpacked, W; a LoRA change D of
  rank 16 with ‖D‖ = 0.3, 1, 3 and 10 % of ‖W‖; W + D packed again. Shown are the share of D that is
  there afterwards, <Q - W, D> / ‖D‖², and the whole error ‖Q - W - D‖ / ‖D‖ in brackets. PEFT:
  its own merge of such a LoRA into a bitsandbytes layer.
* speed: the packed base is made by `peftsurgery quantize` of the plain one; both are merged with
  the same LoRA (rank 16 on every linear) in the same run, as whole processes.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from peftsurgery.checkpoint import open_checkpoint, save  # noqa: E402
from peftsurgery.quantizers import (  # noqa: E402
    FORMATS,
    Format,
    Packed,
    PackedTensor,
    logical,
    nearest,
)
from peftsurgery.quantizers.rounding import Subspace, stochastic  # noqa: E402
from tests.benchmarks.merge import LLAMA, make_llama  # noqa: E402
from tests.benchmarks.processes import Run, run  # noqa: E402

SIDE, RANK = 1024, 16
SIZES = (0.003, 0.01, 0.03, 0.1)
NAME = "model.layers.0.mlp.up_proj.weight"
SPEED = ("nf4", "fp8-compressed", "int8")


# survival -----------------------------------------------------------------------------------------


def packed_weight(format: Format, folder: Path) -> Packed:
    """A Gaussian weight, packed afresh and written; UnsupportedError for formats of experts."""
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 0.02
    fresh = format.fresh(NAME, (SIDE, SIDE), "BF16")
    parts = format.quantize(fresh, weight)
    file = {fresh.outlines[role].name: part.contiguous() for role, part in parts.items()}
    path = folder / f"{format.name}.safetensors"
    file |= format.markers([fresh])
    save(path, file, format.metadata([fresh], []), overwrite=True)
    checkpoint = open_checkpoint(path)
    if config := format.config():
        known: dict[str, object] = {"quantization_config": config}
        checkpoint.config = known
    tensor = logical(checkpoint)[NAME]
    assert isinstance(tensor, PackedTensor)
    return tensor.packed


def change(weight: Tensor, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """D with ‖D‖ = size · ‖W‖, and its factors up and down."""
    random = torch.Generator().manual_seed(2)
    up = torch.randn(SIDE, RANK, generator=random)
    down = torch.randn(RANK, SIDE, generator=random)
    up *= size * weight.norm() / (up @ down).norm()
    return up @ down, up, down


def shares(weight: Tensor, delta: Tensor, written: Tensor) -> tuple[float, float]:
    """<Q - W, D> / ‖D‖² and ‖Q - W - D‖ / ‖D‖."""
    kept = ((written - weight) * delta).sum() / delta.square().sum()
    return float(kept), float((written - weight - delta).norm() / delta.norm())


def survivals(format: Format, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Rounding -> (share, error) at every size."""
    packed = packed_weight(format, folder)
    weight = packed.dequantize()
    found: dict[str, list[tuple[float, float]]] = {}
    for size in SIZES:
        delta, up, down = change(weight, size)
        matrix = format.to_matrix(packed, weight + delta)
        grid, _ = format.fit(packed, matrix)
        basis = torch.linalg.qr(down.T).Q
        random = torch.Generator().manual_seed(3)
        ways = {
            "nearest": lambda: nearest(matrix, grid),  # noqa: B023
            "stochastic": lambda: stochastic(matrix, grid, random),  # noqa: B023
            "subspace": lambda: Subspace.of(basis, grid.group).codes(matrix, grid),  # noqa: B023
        }
        for name, codes in ways.items():
            written = format.to_weight(packed, grid.values(codes()))
            found.setdefault(name, []).append(shares(weight, delta, written))
        if format.name in PEFT:
            written = PEFT[format.name](weight, up, down)
            found.setdefault("PEFT", []).append(shares(weight, delta, written))
    return found


def _peft(weight: Tensor, up: Tensor, down: Tensor, layer: torch.nn.Module) -> Tensor:
    """The weight of a bitsandbytes layer after PEFT's merge of a LoRA."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    model = torch.nn.Sequential(layer)
    four = type(layer).__name__ == "Linear4bit"  # how PEFT tells: by what transformers would set
    setattr(model, "is_loaded_in_4bit" if four else "is_loaded_in_8bit", True)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    wrapped = get_peft_model(model, config)
    target = wrapped.get_submodule("base_model.model.0")
    assert isinstance(target, LoraLayer)
    target.lora_A["default"].weight.data = down.clone()
    target.lora_B["default"].weight.data = up.clone()
    target.merge()  # pyright: ignore[reportCallIssue]
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(target.base_layer).detach().float()


def _peft4(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def merged(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit

        layer = Linear4bit(SIDE, SIDE, bias=False, quant_type=kind)
        layer.weight = Params4bit(
            weight.clone(),
            requires_grad=False,
            quant_type=kind,  # pyright: ignore[reportCallIssue]
        )
        return _peft(weight, up, down, layer.to("cpu"))

    return merged


def _peft8(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

    layer = Linear8bitLt(SIDE, SIDE, bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(
        weight.half(),
        requires_grad=False,
        has_fp16_weights=False,  # pyright: ignore[reportCallIssue]
    )
    return _peft(weight, up, down, layer.to("cpu"))


PEFT = {"nf4": _peft4("nf4"), "fp4": _peft4("fp4"), "int8": _peft8}


def survival_table(markdown: bool) -> None:
    """Print a row for every format and rounding."""
    head = ["format", "rounding", *(f"{size:.1%}" for size in SIZES)]
    print("| " + " | ".join(head) + " |" if markdown else "  ".join(f"{cell:18}" for cell in head))
    if markdown:
        print("|" + "---|" * len(head))
    with tempfile.TemporaryDirectory() as folder:
        for format in FORMATS:
            try:
                found = survivals(format, Path(folder))
            except Exception as error:
                if not markdown:
                    print(f"{format.name}: {type(error).__name__}: {error}")
                continue
            for rounding, row in found.items():
                cells = [f"{kept:.0%} ({error:.2g})" for kept, error in row]
                if markdown:
                    print("| " + " | ".join([format.name, rounding, *cells]) + " |", flush=True)
                else:
                    line = [f"{cell:18}" for cell in (format.name, rounding, *cells)]
                    print("  ".join(line), flush=True)


# speed --------------------------------------------------------------------------------------------


def speed(folder: Path, rounds: int) -> None:
    """Print the time and memory of the plain merge, and of those into packed bases."""
    place = folder / "tinyllama"
    if not place.exists():
        make_llama(place, LLAMA["tinyllama"])
    command = [sys.executable, "-m", "peftsurgery"]
    bases = {"plain": place / "base"}
    for name in SPEED:
        bases[name] = place / name
        if not bases[name].exists():
            run(*command, "quantize", place / "base", "-o", bases[name], "--format", name, "-q")
    runs: dict[str, list[Run]] = {name: [] for name in bases}
    for _ in range(rounds):
        for name, base in bases.items():
            out = place / "merged"
            shutil.rmtree(out, ignore_errors=True)
            given = [base, "-a", place / "adapter", "-o", out, "-q", "--min-survival", "0"]
            runs[name].append(run(*command, "merge", *given))
            shutil.rmtree(out)
    plain = [r.wall for r in runs["plain"]]
    for name, found in runs.items():
        walls = [r.wall for r in found]
        ratio = statistics.median(w / p for w, p in zip(walls, plain, strict=True))
        print(
            f"{name:16} {statistics.median(walls):6.1f} s  {ratio:4.1f} x plain  "
            f"{statistics.median(r.cpu for r in found):6.1f} cpu s  "
            f"{max(r.anonymous for r in found) / 1e6:5.0f} MB anonymous"
        )


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("case", choices=("survival", "speed"))
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the generated files here")
    arguments = parser.parse_args()
    if arguments.case == "survival":
        survival_table(arguments.markdown)
        return
    with tempfile.TemporaryDirectory() as temporary:
        speed(arguments.folder or Path(temporary), arguments.rounds)


if __name__ == "__main__":
    main()
