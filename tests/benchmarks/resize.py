"""The resize part of `linalg.py`: SDXL-shaped LoRAs from the factors, beside dense SVDs.

    python tests/benchmarks/linalg.py resize             # rank 128 to 32, 790 MB, three rounds
    python tests/benchmarks/linalg.py resize --quick     # rank 16 to 4, one round

An SDXL-shaped fp16 LoRA of rank 128 (every linear and convolution of the UNet, 790 MB) to
rank 32, as a whole process: imports, SHA-256 of the input, the SVDs, the proof by reading back. The
dense way is that of sd-scripts: up @ down, torch.linalg.svd in fp32, both factors cut; it is
measured in the same run on some modules, one of each kind, and scaled by how many there are of the
kind, which is said. cpu is user and system time of all threads, which neighbours on the machine
lengthen less.
"""

from __future__ import annotations

import collections
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.convert import make, verdict  # noqa: E402
from tests.benchmarks.processes import Run, run  # noqa: E402

SLACK = 500e6  # bytes of memory that may be taken beside the adapter's size
DENSE_LIMIT = 1 << 21  # elements up to which a dense SVD is measured; larger ones are scaled


def job(name: str, *arguments: str | Path) -> Run:
    """A function of `JOBS` in a process of its own."""
    return run(sys.executable, Path(__file__).resolve(), name, *arguments)


def make_lora(path: str, rank: str) -> None:
    """The SDXL file of the convert benchmark, with a decaying spectrum: column j of up times
    (j + 1)^-½."""
    import torch
    from safetensors.torch import load_file, save_file

    make(path, rank)
    tensors = load_file(path)
    decay = torch.arange(1, int(rank) + 1).float().rsqrt()
    for key, tensor in tensors.items():
        if key.endswith("lora_up.weight"):
            shape = (1, int(rank), *[1] * (tensor.ndim - 2))
            tensors[key] = (tensor.float() * decay.reshape(shape)).half()
    save_file(tensors, path, {"ss_network_module": "networks.lora", "ss_network_dim": rank})


def dense_way(path: str, target: str) -> None:
    """Print the seconds sd-scripts' way would take, from one module of each shape."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = [k.removesuffix(".lora_up.weight") for k in file.keys() if "lora_up" in k]  # noqa: SIM118
        shapes: dict[tuple[int, int], list[str]] = collections.defaultdict(list)
        for name in names:
            o = file.get_slice(f"{name}.lora_up.weight").get_shape()[0]
            n = torch.Size(file.get_slice(f"{name}.lora_down.weight").get_shape()[1:]).numel()
            shapes[o, n].append(name)
        total, measured, modules = 0.0, 0.0, 0
        per_flop: list[float] = []
        large: list[tuple[float, int]] = []
        for (o, n), found in sorted(shapes.items()):
            flops = float(max(o, n)) * min(o, n) ** 2
            if o * n > DENSE_LIMIT:
                large.append((flops, len(found)))
                continue
            up = file.get_tensor(f"{found[0]}.lora_up.weight").float().flatten(1)
            down = file.get_tensor(f"{found[0]}.lora_down.weight").float().flatten(1)
            begin = time.perf_counter()
            u, s, vh = torch.linalg.svd(up @ down, full_matrices=False)
            k = int(target)
            _ = (u[:, :k] * s[:k]).half(), vh[:k].half()
            seconds = time.perf_counter() - begin
            total += seconds * len(found)
            measured, modules = measured + seconds, modules + 1
            if flops > 1e8:
                per_flop.append(seconds / flops)
        rate = statistics.median(per_flop)
        total += sum(rate * flops * count for flops, count in large)
        rest = sum(count for _, count in large)
    figures = [total, measured, modules, len(names), rest, torch.get_num_threads()]
    print(f"\nDENSE {json.dumps(figures)}")


def resize(quick: bool) -> None:
    """Resize one generated file by several rules, then the dense way on a subset of it."""
    with tempfile.TemporaryDirectory(prefix="linalg-resize-") as folder:
        _resize(Path(folder), quick)


def _resize(folder: Path, quick: bool) -> None:
    rank, target, rounds = ("16", "4", 1) if quick else ("128", "32", 3)
    source, out = folder / f"sdxl_r{rank}.safetensors", folder / "resized.safetensors"
    job("make-lora", source, rank)
    size = source.stat().st_size
    rules = {f"--rank {target}": target, "energy:0.9": "energy:0.9", "a budget": "size:25%"}
    print(f"resize {source.name}, {size / 1e6:.0f} MB")
    best = 0.0
    for label, rule in rules.items():
        found = []
        for _ in range(rounds):
            os.sync()
            rule_given = rule.replace("25%", f"{size // 4}B")
            found.append(
                run(
                    *(sys.executable, "-m", "peftsurgery", "resize-rank", source, "-o", out, "-q"),
                    *("--rank", rule_given, "--overwrite"),
                )
            )
        wall = statistics.median(f.wall for f in found)
        cpu = statistics.median(f.cpu for f in found)
        memory = max(f.anonymous for f in found)
        line = f"  {label:14} {wall:6.1f} s   cpu {cpu:6.1f} s   memory {memory / 1e6:5.0f} MB"
        if not best:
            best = wall
            line += f"   under 10 s: {verdict(wall < 10)}"
        print(f"{line}   under {(size + SLACK) / 1e6:.0f} MB: {verdict(memory < size + SLACK)}")
    text = job("dense-way", source, target).output.rpartition("DENSE ")[2]
    total, measured, modules, count, rest, threads = json.loads(text)
    print(
        f"  dense SVD      {total:6.0f} s   scaled: {modules} of {count} modules measured, one of "
        f"each shape, {measured:.0f} s on {threads} threads; {rest} larger than "
        f"{DENSE_LIMIT:,} elements by their flops"
    )
    print(f"  ratio          {total / best:6.0f}     at least 100: {verdict(total / best >= 100)}")


JOBS: dict[str, Callable[..., None]] = {"make-lora": make_lora, "dense-way": dense_way}

if __name__ == "__main__":  # what `job` starts
    JOBS[sys.argv[1]](*sys.argv[2:])
