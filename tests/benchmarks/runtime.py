"""How fast and how big a training step with adapters is, beside PEFT, LyCORIS and a LoRA by hand.

    python tests/benchmarks/runtime.py             # both models, all rounds: some minutes
    python tests/benchmarks/runtime.py --quick     # few rounds
    python tests/benchmarks/runtime.py --only lora,hra --model small

A benchmark and not a test: it prints figures, targets and whether they were met, and always ends
with 0. The models are llamas from a config: "wide" with d = 512, 4 layers, 4 x 64 tokens, where
arithmetic counts, and "small" with d = 64, 4 layers, 1 x 8 tokens, where calls count. Every linear
layer has an adapter with the same number of trained values in every tool; all values are drawn.

* step: forward, backward and optimizer (fused AdamW), in CPU seconds of one thread, which
  neighbours on the machine lengthen less than seconds on the wall. Every round runs every tool
  once, in an order that turns; a ratio is of two figures of one round, the median over the rounds
  is shown.
* floor: the same without any adapter, gradients flowing through; PEFT/floor is what an adapter
  that costs nothing would reach.
* kept: bytes that lie between forward and backward for the backward pass, each storage once, but
  for the model's and the adapters' own tensors.
* memory: the most that one step takes on top of what lies there before it (VmHWM less VmRSS), in a
  process of its own where freed blocks go back to the system at once.
* attach: a llama of 1.1 billion values on the meta device, every linear layer, least of some runs.
* recompiles: graphs dynamo makes, counted, after the first call of a compiled model.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.processes import run  # noqa: E402
from tests.benchmarks.training import (  # noqa: E402
    HAND,
    LYCORIS,
    OURS,
    PEFT,
    ROWS,
    SIZES,
    Options,
    Row,
    Size,
    bare,
    tools,
    training,
)

FLOOR = "floor"
TRIM = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


# measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was measured of one row, by tool."""

    times: dict[str, list[float]]  # CPU seconds, one for each round
    counts: dict[str, int]  # trained values
    kept: dict[str, int]  # bytes


def measured(size: Size, row: Row, rounds: int) -> Measured:
    """All tools of a row, and the floor among the times."""
    made = {tool: training(size, row, tool) for tool in tools(row)}
    counts = {name: t.count for name, t in made.items()}
    kept = {name: t.kept() for name, t in made.items()}
    made[FLOOR] = bare(size)
    made[FLOOR].step()
    names = list(made)
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.thread_time()
            made[name].step()
            found[name].append(time.thread_time() - begin)
    gc.enable()
    return Measured(found, counts, kept)


def status(field: str) -> float:
    """Bytes of VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(n for n in lines if n.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def memory_job(size: str, name: str) -> None:
    """Print MEMORY tool bytes for every tool of a row."""
    row = ROWS[name]
    for tool in tools(row):
        made = training(SIZES[size], row, tool)
        gc.collect()
        assert made.optimizer is not None
        made.optimizer.zero_grad(set_to_none=True)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        made.step()
        print(f"\nMEMORY {tool}={status('VmHWM') - before:.0f}")
        del made


def memory(size: str, name: str) -> dict[str, float]:
    settings = [f"{key}={value}" for key, value in TRIM.items()]
    script = Path(__file__).resolve()
    finished = run("env", *settings, sys.executable, script, "--job", "memory", size, name)
    return {t: float(b) for t, b in re.findall(r"^MEMORY (.*)=(\d+)$", finished.output, re.M)}


def ratio(times: dict[str, list[float]], other: str, own: str = OURS) -> float:
    """Median over the rounds of the other tool's time by ours."""
    pairs = zip(times[other], times[own], strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def table(size: str, names: list[str], rounds: int, with_memory: bool) -> Iterator[str]:
    """Lines: name, ours in ms, the others by ours, PEFT by the floor, MB kept and taken, target."""
    others = (HAND, PEFT, LYCORIS)
    columns = "".join(f"{name + '/ours':>13}" for name in others) + f"{'PEFT/floor':>12}"
    columns += "".join(f"{name + ' kept':>14}" for name in (OURS, *others))
    if with_memory:
        columns += "".join(f"{name + ' MB':>11}" for name in (OURS, *others))
    yield f"{size + ', ' + str(rounds) + ' rounds':20}{'ours ms':>9}{columns}  target"
    for name in names:
        row = ROWS[name]
        try:
            found = measured(SIZES[size], row, rounds)
            taken = memory(size, name) if with_memory else {}
        except Exception as error:  # a tool that cannot do it: said, and the others go on
            yield f"{name:20} {type(error).__name__}: {error}"
            continue
        times = found.times
        line = f"{name:20}{statistics.median(times[OURS]) * 1e3:9.1f}"
        line += "".join(f"{ratio(times, t):13.2f}" if t in times else f"{'':13}" for t in others)
        line += f"{ratio(times, PEFT, FLOOR):12.2f}" if PEFT in times else f"{'':12}"
        line += _megabytes(found.kept, 14, 2)
        if with_memory:
            line += _megabytes(taken, 11, 1)
        yield line + "  " + "; ".join(_targets(row, found))


def _megabytes(found: Mapping[str, float], width: int, digits: int) -> str:
    """The cells of all tools, empty where there is no figure."""
    return "".join(
        f"{found[t] / 1e6:{width}.{digits}f}" if t in found else " " * width
        for t in (OURS, HAND, PEFT, LYCORIS)
    )


def _targets(row: Row, found: Measured) -> Iterator[str]:
    """What was asked of a row, and whether it was met."""
    if row.by_hand:
        met = ratio(found.times, HAND) >= 1 / 1.03
        yield f"by hand at least 0.97: {verdict(met)}"
    if row.peft:
        met = ratio(found.times, PEFT) >= row.target
        yield f"PEFT at least {row.target:g}: {verdict(met)}"
        met = found.kept[OURS] <= 1.02 * found.kept[PEFT]  # numbers and small tables count too
        yield f"kept at most 1.02 of PEFT's: {verdict(met)}"
    if len(set(found.counts.values())) > 1:
        values = ", ".join(f"{tool} {count}" for tool, count in found.counts.items())
        yield f"(values trained: {values})"


def verdict(met: bool) -> str:
    return "met" if met else "NOT MET"


# attaching and compiling --------------------------------------------------------------------------


def attach_seconds(rounds: int) -> tuple[float, int]:
    """Least seconds of `attach` on a 1.1-billion llama of meta tensors, and its modules."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftsurgery import runtime

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    found: list[float] = []
    modules = 0
    for _ in range(rounds):
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        begin = time.perf_counter()
        modules = len(runtime.attach(model, "lora", targets="all-linear", rank=16).modules)
        found.append(time.perf_counter() - begin)
    return min(found), modules


def recompiles(name: str) -> dict[str, int]:
    """Graphs made by each change of a compiled model that has run with adapter "one"."""
    from peftsurgery import runtime

    row = ROWS[name]
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    options: Options = {"block_size": 8} if "block_size" in row.ours else dict(row.ours)
    for adapter in ("one", "two"):
        runtime.attach(model, row.algorithm, targets=["0", "2"], name=adapter, **options)  # type: ignore[arg-type]
    runtime.activate(model, "one")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count)
    x = torch.randn(4, 16)
    compiled(x)
    found: dict[str, int] = {}

    def after(change: str) -> None:
        before = len(graphs)
        compiled(x)
        found[change] = found.get(change, 0) + len(graphs) - before

    for strength in (0.5, 2.0, 1.0):
        runtime.set_strength(model, strength, "one")
        after("rescale")
    swapped = {path: a.with_tensors() for path, a in runtime.adapters(model, "two").items()}
    runtime.hot_swap(model, swapped, "one")
    after("hot-swap")
    for adapter in ("two", "one"):
        runtime.activate(model, adapter)
        after("switch")
    torch._dynamo.reset()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds")
    parser.add_argument("--rounds", type=int, help="how often everything is measured")
    parser.add_argument("--only", help="rows, with commas between")
    parser.add_argument("--model", choices=list(SIZES), help="one of the two models")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # LyCORIS tells of every network it makes
    torch.set_num_threads(1)
    if arguments.job:
        memory_job(*arguments.job[1:])
        return
    from peftsurgery.algorithms import ALGORITHMS

    asked = arguments.only.split(",") if arguments.only else list(ROWS)
    names = [name for name in asked if ROWS[name].algorithm in ALGORITHMS]
    print(
        f"one thread of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
    for size, settings in SIZES.items():
        if arguments.model in (None, size):
            share = 0.2 if arguments.quick else 1.0
            rounds = arguments.rounds or math.ceil(settings.rounds * share)
            print()
            for line in table(size, names, rounds, not arguments.no_memory):
                print(line, flush=True)
    if arguments.only or arguments.model:
        return
    seconds, modules = attach_seconds(2 if arguments.quick else 5)
    print(f"\nattach to {modules} layers of a 1.1-billion meta model: {seconds:.2f} s, ", end="")
    print(f"under 1 s: {verdict(seconds < 1)}")
    for name in names:
        try:
            found = recompiles(name)
        except Exception as error:
            print(f"{name}: not compiled: {type(error).__name__}: {error}")
            continue
        shown = ", ".join(f"{change} {count}" for change, count in found.items())
        print(f"recompiles of {name}: {shown}: {verdict(not any(found.values()))}")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
