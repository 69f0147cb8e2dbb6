"""Results made on several threads, a few ahead of whoever takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from peftsurgery.operations.staging import thread_count, workers

Result = TypeVar("Result")
WAITING = 4


class Ahead(Generic[Result]):
    """`make(name)` for every name, in the order given and before it is asked for, by every thread
    there is. Taken in any order. waiting: results that may be finished and not taken, so that no
    thread rests while another one makes what is asked for.
    """

    def __init__(
        self, names: Sequence[str], make: Callable[[str], Result], *, waiting: int = WAITING
    ) -> None:
        self._make = make
        self._names = dict.fromkeys(names)
        self._count = thread_count() + waiting
        self._jobs: dict[str, Future[Result]] = {}
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Ahead[Result]:
        self._pool = self._exit.enter_context(workers())
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def take(self, name: str) -> Result:
        """One result; each can be had once."""
        if name not in self._jobs:
            self._submit(name)
        self._fill()
        result = self._jobs.pop(name).result()
        self._fill()
        return result

    def _fill(self) -> None:
        while self._names and len(self._jobs) < self._count:
            self._submit(next(iter(self._names)))

    def _submit(self, name: str) -> None:
        del self._names[name]
        self._jobs[name] = self._pool.submit(self._make, name)
