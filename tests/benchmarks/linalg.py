"""How fast the commands that do linear algebra on adapters are, and what memory they take.

    python tests/benchmarks/linalg.py combine            # three rank-64 FLUX LoRAs
    python tests/benchmarks/linalg.py combine --quick    # every eighth module only

    python tests/benchmarks/linalg.py resize             # an 800 MB SDXL LoRA; see resize.py
    python tests/benchmarks/linalg.py extract            # a TinyLlama fine-tune; see extract.py

A benchmark and not a test: it prints figures, targets and whether they were met, and always ends
with 0. Files are generated with fixed seeds.

* combine: the linear layers of every block of FLUX.1 by their Kohya names (fixtures/keys), rank 64,
  bf16, three files. Each row is a process of its own, imports, hashes and proof included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.extract import extract  # noqa: E402
from tests.benchmarks.processes import run  # noqa: E402
from tests.benchmarks.resize import resize  # noqa: E402

FLUX = ROOT / "fixtures" / "keys" / "published__flux_lora_kohya_format.json"
LIMIT = 2e9  # bytes of memory for combine


# combine ------------------------------------------------------------------------------------------


def make_flux(path: Path, rank: int, seed: int, every: int) -> int:
    """A Kohya FLUX LoRA: down ~ N(0, 1/in), up ~ N(0, 1e-4); returns the number of modules."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    keys = json.loads(FLUX.read_text())["keys"]
    modules = sorted({key.partition(".")[0] for key in keys})[::every]
    for module in modules:
        out, into = keys[f"{module}.lora_up.weight"][0], keys[f"{module}.lora_down.weight"][1]
        down = torch.randn(rank, into, generator=generator).mul_(into**-0.5)
        tensors[f"{module}.lora_down.weight"] = down.bfloat16()
        up = torch.randn(out, rank, generator=generator).mul_(1e-2)
        tensors[f"{module}.lora_up.weight"] = up.bfloat16()
        tensors[f"{module}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path, {"ss_network_module": "networks.lora_flux"})
    return len(modules)


def combine(quick: bool) -> None:
    """Three rank-64 FLUX LoRAs by several methods."""
    every = 8 if quick else 1
    rows = (
        ("linear", "linear", ""),
        ("linear, rank 64", "linear", "--rank 64"),
        ("svd", "svd", ""),
        ("slerp of two", "slerp", ""),
        ("tsv", "tsv", ""),
        ("ties", "ties", "--density 0.3 --rank 64"),
        ("dare_ties", "dare_ties", "--density 0.3 --rank 64"),
    )
    folder = Path(tempfile.mkdtemp(prefix="linalg-combine-"))
    try:
        files = [folder / f"{n}.safetensors" for n in range(3)]
        count = max(make_flux(path, 64, n, every) for n, path in enumerate(files))
        size = files[0].stat().st_size
        print(f"three LoRAs of {count} modules, rank 64, {size / 1e6:.0f} MB each\n")
        print(
            f"{'method':18} {'wall s':>8} {'cpu s':>8} {'anon MB':>8} {'rss MB':>8} {'out MB':>7}"
        )
        for title, method, more in rows:
            used = files[:2] if method == "slerp" else files
            out = folder / "out.safetensors"
            sources = [part for path in used for part in ("-a", f"{path}=0.5")]
            command = [sys.executable, "-m", "peftsurgery", "combine", *sources, "-o", str(out)]
            took = run(*command, "--method", method, "-q", *more.split())
            written = out.stat().st_size / 1e6
            out.unlink()
            met = "" if took.anonymous <= LIMIT else f"  over {LIMIT / 1e6:.0f} MB"
            print(
                f"{title:18} {took.wall:8.1f} {took.cpu:8.1f} {took.anonymous / 1e6:8.0f} "
                f"{took.rss / 1e6:8.0f} {written:7.0f}{met}",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


BENCHMARKS: dict[str, Callable[[bool], None]] = {
    "resize": resize,
    "combine": combine,
    "extract": extract,
}


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="a part of the modules")
    arguments = parser.parse_args()
    BENCHMARKS[arguments.benchmark](arguments.quick)


if __name__ == "__main__":
    main()
