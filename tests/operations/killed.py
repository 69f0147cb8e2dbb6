"""Runs one operation in forked children, each of which is killed (SIGKILL) at another moment.

    python killed.py CALL TEMPLATE CASES [RANDOM]

TEMPLATE is copied to CASES/<n> for n = 1, 2, …; child n runs the call of that name there and dies
at its n-th change of the disk: half of a write is carried out, all other calls are not. The first
child that lives to its end is the last one. With RANDOM, that many further children are killed from
outside, at random moments. Prints one line per case.

Forking before any arithmetic keeps the children cheap: the imports are done once.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peftsurgery.operations import in_place, unmerge
from peftsurgery.operations.merge import merge

CHANGES = ("fsync", "replace", "rename", "unlink", "link", "ftruncate", "copy_file_range")
WRITES = {"pwrite": 1, "write": 1}  # position of the data among the arguments


def arm(moment: int) -> list[str]:
    """Make this process die at its n-th change of the disk; returns the list that the calls are
    noted in.
    """
    calls: list[str] = []

    def wrap(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            calls.append(name)
            if len(calls) == moment:
                if name in WRITES:
                    data = bytes(args[1])  # type: ignore[call-overload]
                    call(args[0], data[: len(data) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    for name in (*CHANGES, *WRITES):
        if hasattr(os, name):
            setattr(os, name, wrap(name, getattr(os, name)))
    return calls


def run(call: str, case: Path) -> None:
    """The operation under test, on the files of one case."""
    if call == "merge":
        merge(case / "base", [(case / "adapter", 0.7)], in_place=True)
    elif call == "merge-undo":
        merge(case / "base", [(case / "adapter", 0.7)], in_place=True, undo=case / "undo")
    elif call == "unmerge":
        unmerge.unmerge(case / "base", case / "undo", in_place=True)
    else:
        raise SystemExit(f"{call}: no such call; {in_place.__name__}")


def main(call: str, template: Path, cases: Path, times: int = 0) -> None:
    """See the head of the file."""
    torch.set_num_threads(1)
    moment, seconds = 0, 0.0
    while True:
        moment += 1
        case = cases / f"{moment:03}"
        shutil.copytree(template, case)
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            calls = arm(moment)
            run(call, case)
            (case / "calls").write_text("\n".join(calls))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            seconds = time.monotonic() - begun
            print(case.name, "lived", os.WEXITSTATUS(status))
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        print(case.name, "killed")
    for number in range(times):
        case = cases / f"random-{number}"
        shutil.copytree(template, case)
        child = os.fork()
        if child == 0:
            run(call, case)
            os._exit(0)
        time.sleep(random.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(case.name, "killed")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
