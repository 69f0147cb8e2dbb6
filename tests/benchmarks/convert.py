"""How fast `convert` and `inspect` are, beside `cp` and beside diffusers doing the same job.

    python tests/benchmarks/convert.py             # an 800 MB SDXL LoRA, five rounds
    python tests/benchmarks/convert.py --quick     # rank 16, 100 MB, two rounds

A benchmark and not a test: it prints figures, targets and whether they were met, and always ends
with 0. The file is generated: Kohya's SDXL names, fp16, every linear and convolution of the UNet,
alpha half of the rank. Every round measures every row once, after a `sync`.

* whole process: from start to exit of a fresh interpreter, imports and verification included.
* data path: open, decode, encode and save, in a process that has imported everything. The proof
  adds reopening, decoding and comparing every module, `convert()` the SHA-256 of the input. `cp` is
  coreutils', of the same file in the same round. With fsync both wait for the disk.
* a speed against cp is a ratio of two figures of one round; the median over the rounds is shown.
* cpu is user and system time of all threads, which neighbours on the machine lengthen less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.processes import Run, run  # noqa: E402

LISTING = ROOT / "fixtures" / "keys" / "base__sdmecha_sdxl-sgm.json"
UNET = "model.diffusion_model."
HEAVY = ("torch", "numpy", "huggingface_hub")
SLACK = 500e6  # bytes of memory beside the adapter's size


# the file -----------------------------------------------------------------------------------------


def make(path: str, rank: str) -> None:
    """Write the LoRA with the safetensors library: down ~ N(0, 1/in), up ~ N(0, 1e-4)."""
    import torch
    from safetensors.torch import save_file

    r = int(rank)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(std).half()

    tensors: dict[str, torch.Tensor] = {}
    for key, shape in json.loads(LISTING.read_text())["keys"].items():
        if not key.startswith(UNET) or not key.endswith(".weight") or len(shape) < 2:
            continue
        module = "lora_unet_" + key.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
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


# jobs in processes of their own -------------------------------------------------------------------


def help_imports() -> None:
    """Print which heavy packages `peftsurgery --help` imports."""
    from peftsurgery.cli import main

    try:
        main(["--help"], prog_name="peftsurgery")
    except SystemExit:
        print("\nIMPORTED", *[name for name in HEAVY if name in sys.modules])


def data_path(source: str, target: str, *steps: str) -> None:
    """Print the seconds of `convert()` with the `steps` proof, fsync and hash, or without."""
    from peftsurgery.checkpoint import Checkpoint
    from peftsurgery.operations import writing_adapter
    from peftsurgery.operations.convert import convert

    if "fsync" not in steps:
        os.fsync = lambda _: None
    if "hash" not in steps:
        Checkpoint.sha256 = lambda self: {}
    if "proof" not in steps:
        writing_adapter.prove = lambda *_: 0.0
    begin = time.perf_counter()
    report = convert(source, target, to="diffusers")
    seconds = time.perf_counter() - begin
    assert report.largest_error == 0, report.largest_error
    print(f"\nSECONDS {seconds}")


def peer(source: str, folder: str) -> None:
    """diffusers' loader and saver; prints the seconds behind its imports.

    Its saver keeps no alpha, checks nothing and does not wait for the disk.
    """
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
        StableDiffusionXLPipeline,
    )

    begin = time.perf_counter()
    state = StableDiffusionXLPipeline.lora_state_dict(
        source, unet_config=SimpleNamespace(layers_per_block=2)
    )[0]
    layers = {key.removeprefix("unet."): value for key, value in state.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    print(f"\nSECONDS {time.perf_counter() - begin}")


JOBS: dict[str, Callable[..., None]] = {
    "make": make,
    "help": help_imports,
    "data-path": data_path,
    "peer": peer,
}


def job(name: str, *arguments: str | Path) -> Run:
    return run(sys.executable, Path(__file__).resolve(), "--job", name, *arguments)


def seconds(finished: Run) -> float:
    """What the job printed behind SECONDS."""
    return float(finished.output.rpartition("SECONDS ")[2])


# measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row of the table: how to measure it, and what is asked of it."""

    name: str
    measure: Callable[[], float | Run]
    limit: float | None = None  # s
    against: str | None = None  # another row; `share` of its speed is asked for
    share: float | None = None
    memory: float | None = None  # bytes, peak


def cases(folder: Path, source: Path) -> Iterator[Case]:
    """The rows, in the order of measuring: cp next to what is compared with it."""
    target, copy = folder / "out.safetensors", folder / "copy.safetensors"
    memory = source.stat().st_size + SLACK

    def cli(*arguments: str | Path) -> Run:
        return run(sys.executable, "-m", "peftsurgery", *arguments)

    def convert(to: str, *more: str) -> Run:
        return cli("convert", source, "-o", target, "--to", to, "-q", *more)

    def cp(sync: bool) -> float:
        begin = time.perf_counter()
        subprocess.run(["cp", source, copy], check=True)
        if sync:
            with open(copy, "rb+") as file:
                os.fsync(file.fileno())
        return time.perf_counter() - begin

    def path(*steps: str) -> float:
        return seconds(job("data-path", source, target, *steps))

    yield Case("--help", lambda: cli("--help"), limit=0.25)
    yield Case("inspect", lambda: cli("inspect", source), limit=1.0)
    yield Case("cp", lambda: cp(False))
    yield Case("data path", path, against="cp", share=0.5)
    yield Case("data path, proof", lambda: path("proof"), against="cp")
    yield Case("cp, fsync", lambda: cp(True))
    yield Case(
        "data path, proof, fsync", lambda: path("proof", "fsync"), against="cp, fsync", share=0.5
    )
    yield Case("convert(), fsync", lambda: path("proof", "fsync", "hash"), against="cp, fsync")
    yield Case("import torch", lambda: run(sys.executable, "-c", "import torch"))
    yield Case("convert to diffusers", lambda: convert("diffusers"), limit=4.0, memory=memory)
    yield Case("convert to kohya-hf", lambda: convert("kohya-hf"), memory=memory)
    yield Case("the same, --dtype bf16", lambda: convert("diffusers", "--dtype", "bf16"))
    yield Case("diffusers, whole process", lambda: job("peer", source, folder / "peer"))
    yield Case("diffusers, load and save", lambda: seconds(job("peer", source, folder / "peer")))


def measure(folder: Path, source: Path, rounds: int) -> dict[str, list[float | Run]]:
    """Figures by row, one for each round."""
    found: dict[str, list[float | Run]] = {}
    for _ in range(rounds):
        for case in cases(folder, source):
            os.sync()
            found.setdefault(case.name, []).append(case.measure())
            for written in (folder / "peer").iterdir():
                written.unlink()
            for written in (folder / "out.safetensors", folder / "copy.safetensors"):
                written.unlink(missing_ok=True)
    return found


def wall(figure: float | Run) -> float:
    return figure.wall if isinstance(figure, Run) else figure


def table(folder: Path, source: Path, found: dict[str, list[float | Run]]) -> Iterator[str]:
    """Lines: name, seconds (median and least), cpu, memory, speed against cp, target."""
    columns = f"{'median s':>9}{'min s':>8}{'cpu s':>8}{'RSS MB':>8}{'anon MB':>9}{'speed':>7}"
    yield f"{'':26}{columns}  target"
    for case in cases(folder, source):
        figures = found[case.name]
        walls = [wall(figure) for figure in figures]
        line = f"{case.name:26}{statistics.median(walls):9.2f}{min(walls):8.2f}"
        runs = [figure for figure in figures if isinstance(figure, Run)]
        rss = max((r.rss for r in runs), default=0)
        line += (
            f"{min(r.cpu for r in runs):8.2f}{rss / 1e6:8.0f}"
            f"{max(r.anonymous for r in runs) / 1e6:9.0f}"
            if runs
            else " " * 25
        )
        targets = []
        if case.against:
            others = [wall(figure) for figure in found[case.against]]
            speeds = [other / own for other, own in zip(others, walls, strict=True)]
            line += f"{statistics.median(speeds):7.2f}"
            if case.share:
                met = statistics.median(speeds) >= case.share
                targets.append(f"at least {case.share} of {case.against}: {verdict(met)}")
        else:
            line += " " * 7
        if case.limit:
            met = statistics.median(walls) < case.limit
            targets.append(f"under {case.limit:g} s: {verdict(met)}")
        if case.memory:
            targets.append(f"RSS under {case.memory / 1e6:.0f} MB: {verdict(rss < case.memory)}")
        yield line + "  " + "; ".join(targets)


def verdict(met: bool) -> str:
    return "met" if met else "NOT MET"


def main() -> None:
    """Make the file, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="rank 16 and two rounds")
    parser.add_argument("--rounds", type=int, help="how often everything is measured")
    parser.add_argument("--folder", type=Path, help="keep the generated file here")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        JOBS[arguments.job[0]](*arguments.job[1:])
        return
    rank = 16 if arguments.quick else 128
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        source = (arguments.folder or folder) / f"kohya_sdxl_r{rank}.safetensors"
        if not source.exists():
            job("make", source, str(rank))
        (folder / "peer").mkdir()
        imported = job("help").output.rpartition("IMPORTED")[2].split()
        load = os.getloadavg()[0]
        found = measure(folder, source, arguments.rounds or (2 if arguments.quick else 5))
        print(
            f"{source.name}, {source.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores,", end=""
        )
        print(f" load before and after {load:.1f}, {os.getloadavg()[0]:.1f}\n")
        print("\n".join(table(folder, source, found)))
        print(f"\n--help imports of {', '.join(HEAVY)}: {', '.join(imported) or 'none'}")


if __name__ == "__main__":
    main()
