"""Tiles of many targets, computed on several threads ahead of whoever writes them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from peftsurgery.operations.apply import SAMPLED, Renderer, Scratch, Settings, spans
from peftsurgery.operations.plan import Target
from peftsurgery.operations.rounding import Survival
from peftsurgery.operations.staging import thread_count, workers

SAMPLE = 16  # of larger merges survival is estimated from one in so many rows
AHEAD = 4  # tiles per thread that are under way or wait for the disk


class Pipeline:
    """Renders tiles on several threads, ahead of the writer and in its order."""

    def __init__(
        self,
        targets: Sequence[Target],
        settings: Settings,
        progress: Callable[[Target], None] | None = None,
    ) -> None:
        self.settings = settings
        self.survival: dict[str, Survival] = {}
        self.progress = progress
        self._threads = thread_count()
        self._exit = contextlib.ExitStack()
        self._sample = 1 if sum(t.numel for t in targets) <= SAMPLED else SAMPLE
        self._tiles = self._all(targets)
        self._ahead: deque[tuple[Target, Future[tuple[Tensor, Survival]], Tensor]] = deque()
        self._scratch = Scratch()
        self._free: list[Tensor] = []  # outputs the writer is done with

    def __enter__(self) -> Pipeline:
        self._pool = self._exit.enter_context(workers())
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tiles of one target; targets have to be asked for in the order given."""
        total = Survival()
        self._fill()
        target = self._ahead[0][0] if self._ahead else None
        if target is None or target.name != name:
            raise RuntimeError(f"tiles of {target and target.name!r} where {name!r} was expected")
        while self._ahead and self._ahead[0][0] is target:
            _, tile, memory = self._ahead.popleft()
            self._fill()
            written, survival = tile.result()
            total.add(survival)
            yield written
            self._free.append(memory)
        self.survival[name] = total
        if self.progress is not None:
            self.progress(target)

    def _fill(self) -> None:
        """Keep enough tiles under way, or waiting, for every thread and the writer."""
        while len(self._ahead) < AHEAD * self._threads:
            following = next(self._tiles, None)
            if following is None:
                return
            target, renderer, (start, stop) = following
            memory, out = self._output(renderer, start, stop)
            tile = self._pool.submit(renderer.tile, start, stop, out, sample=self._sample)
            self._ahead.append((target, tile, memory))

    def _output(self, renderer: Renderer, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Memory for a tile, used before where there is some, and the tile in it."""
        columns = renderer.target.columns
        nbytes = (stop - start) * columns * renderer.dtype.itemsize
        memory = self._free.pop() if self._free else torch.empty(0, dtype=torch.uint8)
        if memory.numel() < nbytes:
            memory = torch.empty(nbytes, dtype=torch.uint8)
        return memory, memory[:nbytes].view(renderer.dtype).view(stop - start, columns)

    def _all(self, targets: Sequence[Target]) -> Iterator[tuple[Target, Renderer, tuple[int, int]]]:
        for target in targets:
            renderer = Renderer(target, self.settings, self._scratch)
            for span in spans(target):
                yield target, renderer, span
