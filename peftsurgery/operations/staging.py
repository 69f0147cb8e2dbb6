"""Where operations work before their result appears: a place beside the target, and threads."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch


@contextlib.contextmanager
def staged_beside(dst: Path, *, folder: bool = False) -> Iterator[Path]:
    """A path beside `dst` to write to and check, made as a folder when asked; whatever is left
    there when the block ends is removed.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    staged = dst.with_name(f".{dst.stem}.{secrets.token_hex(6)}{dst.suffix}")
    try:
        if folder:
            staged.mkdir()
        yield staged
    finally:
        if staged.is_dir():
            shutil.rmtree(staged)
        else:
            staged.unlink(missing_ok=True)


@contextlib.contextmanager
def workers(most: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use in one operation (at most `most`), each running whole
    operations.

    Modules and tiles are many and independent; threads that meet inside every operation lose much
    of their time waiting, most of all where other programs run.
    """
    global _outer
    count, before = thread_count(), _outer
    _outer = count
    torch.set_num_threads(1)  # threads that start from now on use one each
    threads = ThreadPoolExecutor(count if most is None else min(count, most))
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
        _outer = before
        if before is None:
            torch.set_num_threads(count)


_outer: int | None = None  # threads of the outermost `workers`


def thread_count() -> int:
    """How many threads `workers` starts, inside other `workers` too."""
    return torch.get_num_threads() if _outer is None else _outer
