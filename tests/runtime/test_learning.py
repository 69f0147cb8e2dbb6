"""Every algorithm learns, on three models; what a new process loads and merges answers the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftsurgery import runtime
from peftsurgery.algorithms import ALGORITHMS
from peftsurgery.errors import PeftSurgeryError
from tests.algorithms.cases import close
from tests.runtime.learning import TASKS, Task

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, dict[str, object]] = {  # where a plain rank of 4 is not what it takes
    "oft": {"rank": None, "block_size": 4},
    "boft": {"rank": None, "block_size": 4},
    "full": {"rank": None},
    "ia3": {"rank": None},
    "road": {"rank": None, "group": 8},
    "c3a": {"rank": None, "block_size": 8},
    "vera": {"rank": 4, "widest": (384, 384)},
}
RATES = {"full": 1e-3, "set": 1e-3, "vera": 5e-2, "tokens": 5e-2}  # of Adam; 1e-2 otherwise
STEPS = 2
TOLERANCE = 1e-5  # relative, of answers
LAYOUTS = ("peft", "lycoris")  # the first that holds the algorithm
CASES = [
    f"{algorithm}.{name}"
    for algorithm in ALGORITHMS
    for name, task in TASKS.items()
    if algorithm != "tokens" or task.rows is not None
]


@dataclass(repr=False)
class Trained:
    """What training left, case by case."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    loaded: dict[str, Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def fresh(model: nn.Module, task: Task, algorithm: str) -> None:
    """On convolutions too, where the algorithm has them; whole values beside a LoRA, because a PEFT
    folder has no other place for them.
    """
    options = {"rank": 4, **OPTIONS.get(algorithm, {})}
    rng = torch.Generator().manual_seed(3)
    first, *others = targets = (*task.targets, *task.more)
    if algorithm == "tokens":
        assert task.rows is not None
        runtime.attach(model, algorithm, targets=task.rows[0], indices=task.rows[1])
        return
    if algorithm == "set":
        plan = {first: ("lora", {"rank": 4}), **dict.fromkeys(others, "set")}
        runtime.attach(model, plan, generator=rng)  # type: ignore[arg-type]
        return
    try:
        runtime.attach(model, algorithm, targets=targets, generator=rng, **options)  # type: ignore[arg-type]
    except PeftSurgeryError:
        if not task.more:
            raise
        runtime.attach(model, algorithm, targets=task.targets, generator=rng, **options)  # type: ignore[arg-type]


def learn(case: str, folder: Path, result: Trained) -> None:
    algorithm, _, name = case.partition(".")
    task = TASKS[name]
    model = task.build().eval()
    with torch.no_grad():
        result.before[case] = task.answer(model)
    fresh(model, task, algorithm)
    optimizer = torch.optim.Adam(
        runtime.trainable_parameters(model).values(), RATES.get(algorithm, 1e-2)
    )
    losses = result.losses[case] = []
    for _ in range(STEPS):
        loss = task.loss(model)
        loss.backward()
        runtime.check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        losses.append(float(task.loss(model)))
        result.after[case] = task.answer(model)
    for layout in LAYOUTS:
        path = folder / (case if layout == "peft" else f"{case}.safetensors")
        try:
            runtime.save(model, path, layout, architecture=task.architecture)
            break
        except PeftSurgeryError:
            if layout == LAYOUTS[-1]:
                raise
    runtime.detach(model)
    with torch.no_grad():
        assert torch.equal(task.answer(model), result.before[case])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All cases, and one new process for all of them."""
    folder = tmp_path_factory.mktemp("learning") / "adapters"
    folder.mkdir()
    result = Trained()
    for case in CASES:
        try:
            learn(case, folder, result)
        except Exception as error:  # told in the test of this case
            result.failures[case] = f"{type(error).__name__}: {error}"
            if runtime.adapter_names(model := TASKS[case.partition(".")[2]].build()):
                runtime.detach(model)
    subprocess.run(
        [sys.executable, "-m", "tests.runtime.learning", str(folder)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=300,
    )
    result.loaded = load_file(f"{folder}.answers.safetensors")
    result.failures |= json.loads(Path(f"{folder}.failures.json").read_text())
    return result


@pytest.mark.parametrize("case", CASES)
def test_learns_and_is_the_same_in_a_new_process(case: str, trained: Trained) -> None:
    assert case not in trained.failures, trained.failures[case]
    losses = trained.losses[case]
    assert losses[-1] < losses[0]
    before = trained.before[case]
    assert float((trained.after[case] - before).norm() / before.norm()) > 50 * TOLERANCE
    close(trained.loaded[f"{case}/loaded"], trained.after[case], TOLERANCE)
    close(trained.loaded[f"{case}/merged"], trained.after[case], TOLERANCE)
