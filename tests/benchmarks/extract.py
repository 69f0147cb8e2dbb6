"""How fast `extract` is beside a dense SVD of every difference; run by `linalg.py extract`.

A fine-tune of TinyLlama's shapes: bf16, every projection changed by a random matrix of rank 100
with noise of a third of its norm upon it, whose spectrum has no gap anywhere. Rank 64.

* extract: the whole command as a process of its own: comparing, two SVD threads, writing, proof.
* dense: torch.linalg.svd in fp32 of one weight of each shape of the first layer, with torch's own
  threads, scaled to all layers by count. Reading and writing are not counted.
* error: each of those weights against the optimum, which the dense singular values tell.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.processes import run

HIDDEN, INNER, KEYS, LAYERS, RANK = 2048, 5632, 256, 22, 64
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def make(folder: Path, layers: int) -> None:
    """`base` and `tuned`, a file for every layer."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for side in ("base", "tuned"):
        (folder / side).mkdir()
        (folder / side / "config.json").write_text(json.dumps(config))
    for layer in range(layers):
        before, after = {}, {}
        for module, (rows, columns) in SHAPES.items():
            name = f"model.layers.{layer}.{module}.weight"
            weight = torch.randn(rows, columns, generator=generator) * 0.02
            up = torch.randn(rows, 100, generator=generator)
            down = torch.randn(100, columns, generator=generator)
            noise = torch.randn(rows, columns, generator=generator)
            before[name] = weight.bfloat16()
            after[name] = (before[name].float() + 1e-4 * (up @ down) + 3e-4 * noise).bfloat16()
            index[name] = f"model-{layer}.safetensors"
        save_file(before, folder / "base" / f"model-{layer}.safetensors")
        save_file(after, folder / "tuned" / f"model-{layer}.safetensors")
    for side in ("base", "tuned"):
        path = folder / side / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": index}))


def extract(quick: bool) -> None:
    """A TinyLlama-shaped fine-tune at rank 64."""
    import torch
    from safetensors.torch import load_file

    layers = 2 if quick else LAYERS
    folder = Path(tempfile.mkdtemp(prefix="linalg-extract-"))
    try:
        make(folder, layers)
        os.sync()  # or the disk is at it while the command runs
        report = folder / "report.json"
        command = [sys.executable, "-m", "peftsurgery", "extract", str(folder / "tuned")]
        command += [str(folder / "base"), "-o", str(folder / "out"), "--rank", str(RANK)]
        took = run(*command, "--dtype", "fp32", "-q", "--report", str(report))
        rows = {row["module"]: row for row in json.loads(report.read_text())["modules"]}
        base, tuned = (load_file(folder / s / "model-0.safetensors") for s in ("base", "tuned"))
        print(f"{layers * len(SHAPES)} weights of {layers} layers, rank {RANK}\n")
        print(f"{'weight':18} {'dense SVD s':>12} {'error / optimum':>16}")
        seconds: dict[tuple[int, int], float] = {}
        busy: dict[tuple[int, int], float] = {}
        worst = 0.0
        for module, shape in SHAPES.items():
            if shape in seconds:
                continue
            name = f"model.layers.0.{module}.weight"
            delta = tuned[name].float() - base[name].float()
            begun, used = time.perf_counter(), time.process_time()
            values = torch.linalg.svd(delta, full_matrices=False).S.double()
            seconds[shape] = time.perf_counter() - begun
            busy[shape] = time.process_time() - used
            optimum = float(values[RANK:].norm() / values.norm())
            ratio = rows[f"model:{name.removesuffix('.weight')}"]["loss"] / optimum
            worst = max(worst, ratio)
            print(f"{module:18} {seconds[shape]:12.2f} {ratio:16.4f}", flush=True)
        dense = layers * sum(seconds[shape] for shape in SHAPES.values())
        cpu = layers * sum(busy[shape] for shape in SHAPES.values())
        print(
            f"\nextract  {took.wall:8.1f} s wall, {took.cpu:.1f} s cpu, "
            f"{took.anonymous / 1e6:.0f} MB"
        )
        print(
            f"dense    {dense:8.1f} s wall, {cpu:.1f} s cpu, scaled from one weight of each of "
            f"{len(seconds)} shapes"
        )
        print(
            f"{dense / took.wall:.0f} times faster (wanted: 20), {cpu / took.cpu:.0f} times less "
            f"cpu; worst error {worst:.5f} (wanted: 1.01)"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
