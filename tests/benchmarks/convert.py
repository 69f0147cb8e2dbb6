"""How fast `convert` and `inspect` are, beside `cp` and beside diffusers doing the same job.

    python tests/benchmarks/convert.py             # an 800 MB SDXL LoRA, five rounds, about three minutes
    python tests/benchmarks/convert.py --quick     # rank 16, 100 MB, two rounds

A benchmark and not a test: it prints figures, targets and whether they were met, and always ends with 0. The file is
generated: Kohya's SDXL names, fp16, every linear and convolution of the UNet, alpha half of the rank.

What the rows mean:

* whole process: wall time from start to exit of a fresh interpreter, imports and verification included.
* data path: open, decode, encode, save and prove (reopen, decode, compare every module) in a process that has imported
  everything; `convert()` adds the SHA-256 of the input. cp: coreutils' `cp` of the same file in the same round, with
  `fsync` of the copy where the row says so. A ratio is of two figures of the same round; the median is shown.
* peak RSS is `ru_maxrss`. It counts the resident pages of the mapped input, which the system may drop at any time;
  peak anonymous is the largest RssAnon seen in /proc/PID/status every 5 ms, the memory that is really taken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LISTING = ROOT / "fixtures" / "keys" / "base__sdmecha_sdxl-sgm.json"
PREFIX = "model.diffusion_model."
HEAVY = ("torch", "numpy", "huggingface_hub")
MB = 1e6


@dataclass(frozen=True)
class Run:
    """One child process."""

    wall: float  # s
    cpu: float  # s, user and system
    rss: float  # bytes, ru_maxrss
    anonymous: float  # bytes, peak RssAnon
    output: str


def run(*command: str | Path) -> Run:
    """Run a command to its end; raises CalledProcessError when it fails."""
    begin = time.perf_counter()
    child = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    status = Path(f"/proc/{child.pid}/status")
    anonymous = 0
    while True:
        done, code, usage = os.wait4(child.pid, os.WNOHANG)
        if done:
            break
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                anonymous = max(anonymous, int(line.split()[1]) * 1024)
        time.sleep(0.005)
    wall = time.perf_counter() - begin
    assert child.stdout is not None
    output = child.stdout.read()
    child.returncode = os.waitstatus_to_exitcode(code)
    if child.returncode:
        print(output, file=sys.stderr)
        raise subprocess.CalledProcessError(child.returncode, child.args)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, anonymous, output)


def cli(*arguments: str | Path) -> Run:
    """`peftsurgery …` as a process of its own."""
    return run(sys.executable, "-m", "peftsurgery", *arguments)


def child(job: str, *arguments: str | Path) -> Run:
    """One of JOBS in a process of its own."""
    return run(sys.executable, Path(__file__).resolve(), "--job", job, *arguments)


# the file ----------------------------------------------------------------------------------------


def make(path: str, rank: str) -> None:
    """Write the Kohya SDXL LoRA: down ~ N(0, 1/in), up ~ N(0, 1e-4), fp16, by the safetensors library."""
    import torch
    from safetensors.torch import save_file

    r = int(rank)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(std).half()

    tensors: dict[str, torch.Tensor] = {}
    for key, shape in json.loads(LISTING.read_text())["keys"].items():
        if not key.startswith(PREFIX) or not key.endswith(".weight") or len(shape) < 2:
            continue
        module = "lora_unet_" + key.removeprefix(PREFIX).removesuffix(".weight").replace(".", "_")
        out, into, *kernel = shape
        tensors[f"{module}.lora_down.weight"] = normal(r, into, *kernel, std=into**-0.5)
        tensors[f"{module}.lora_up.weight"] = normal(out, r, *[1] * len(kernel), std=1e-2)
        tensors[f"{module}.alpha"] = torch.tensor(r / 2).half()
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(r),
        "ss_network_alpha": f"{r / 2:g}",
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    save_file(tensors, path, metadata)
    print(len(tensors))


# jobs that run in a process of their own ------------------------------------------------------------


def help_imports() -> None:
    """Print which heavy packages `peftsurgery --help` imports."""
    from peftsurgery.cli import main

    try:
        main(["--help"], prog_name="peftsurgery")
    except SystemExit:
        pass
    print("\nIMPORTED", *[name for name in HEAVY if name in sys.modules])


def data_path(source: str, target: str, to: str, sync: str) -> None:
    """Time the conversion after the imports, without and with the SHA-256 of the input."""
    from peftsurgery.algorithms import difference
    from peftsurgery.codec import decode, encode, open_adapter, write_encoded
    from peftsurgery.operations.convert import convert

    if sync == "no":
        os.fsync = lambda _: None
    begin = time.perf_counter()
    adapter = decode(open_adapter(source))
    encoded = encode(adapter, to)
    planned = time.perf_counter()
    write_encoded(encoded, Path(target), to)
    written = time.perf_counter()
    again = decode(open_adapter(target), architecture=adapter.architecture)
    worst = max(difference(module, again.modules[path]) for path, module in adapter.modules.items())
    end = time.perf_counter()
    os.unlink(target)
    os.sync()
    start = time.perf_counter()
    report = convert(source, target, to=to)
    stop = time.perf_counter()
    assert worst == 0 == report.largest_error, (worst, report.largest_error)
    times = {
        "data path": end - begin,
        "plan": planned - begin,
        "write": written - planned,
        "prove": end - written,
        "convert()": stop - start,
    }
    print(json.dumps(times))


def diffusers_convert(source: str, folder: str) -> None:
    """The same job with diffusers' own loader and saver."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    config = UNet2DConditionModel(
        **json.loads(Path(__file__).with_name("sdxl_unet.json").read_text())
    ).config if False else None
    del torch, config, folder, source
    raise NotImplementedError(StableDiffusionXLPipeline)


JOBS: dict[str, Callable[..., None]] = {
    "make": make,
    "help": help_imports,
    "data-path": data_path,
    "diffusers": diffusers_convert,
}
