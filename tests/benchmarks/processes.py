"""A command run to its end, with its time and its memory."""

from __future__ import annotations

import compileall
import functools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 0.005  # s between two looks at the memory


@dataclass(frozen=True)
class Run:
    """What one process took.

    rss counts resident pages of mapped files, which the system may drop at any time; anonymous is
    the largest RssAnon seen in /proc/PID/status, the memory that is really taken.
    """

    wall: float  # s
    cpu: float  # s, user and system
    rss: float  # bytes, ru_maxrss
    anonymous: float  # bytes
    output: str


@functools.cache
def _compile() -> None:
    """Have the package as pip installs it, in bytecode, also where the environment writes none."""
    compileall.compile_dir(ROOT / "peftsurgery", quiet=1)


def run(*command: str | Path) -> Run:
    """Run a command in the project's folder. Raises CalledProcessError when it fails."""
    _compile()
    with tempfile.TemporaryFile("w+") as output:
        begin = time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
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
            time.sleep(SAMPLE)
        wall = time.perf_counter() - begin
        child.returncode = os.waitstatus_to_exitcode(code)
        output.seek(0)
        text = output.read()
    if child.returncode:
        print(text, file=sys.stderr)
        raise subprocess.CalledProcessError(child.returncode, child.args)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, anonymous, text)
