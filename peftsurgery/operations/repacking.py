"""Packed weights of a merge, packed again on several threads ahead of the writer."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.operations.apply import Scratch, Settings
from peftsurgery.operations.plan import Target
from peftsurgery.operations.requantizing import Order, Repacked, Repacker
from peftsurgery.operations.rounding import Survival
from peftsurgery.operations.staging import workers


class Repacking:
    """Results by target name; asked for in any order, made in the order given."""

    def __init__(
        self,
        targets: Sequence[Target],
        settings: Settings,
        orders: Mapping[str, Order],
        progress: Callable[[Target], None] | None = None,
        lost: Callable[[Target, Tensor, Tensor], None] | None = None,
    ) -> None:
        self.targets = {target.name: target for target in targets}
        self.settings, self.orders = settings, orders
        self.progress, self.lost = progress, lost
        self.survival: dict[str, Survival] = {}
        self.digests: dict[tuple[str, str], bytes] = {}  # (target, role) -> of what was made
        self._ahead = torch.get_num_threads()
        self._order = list(self.targets)
        self._jobs: dict[str, Future[Repacked]] = {}
        self._exit = contextlib.ExitStack()
        self._scratch = Scratch()

    def __enter__(self) -> Repacking:
        self._pool = self._exit.enter_context(workers())
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def parts(self, name: str) -> dict[str, Tensor]:
        """Role -> tensor of one target; each can be had once."""
        if name not in self._jobs:
            self._submit(name)
        job = self._jobs[name]
        self._fill()
        result = job.result()
        del self._jobs[name]
        self._fill()
        self.survival[name] = result.survival
        target = self.targets[name]
        if result.lost is not None and result.change is not None and self.lost is not None:
            self.lost(target, result.lost, result.change)
        if self.progress is not None:
            self.progress(target)
        return result.parts

    def _fill(self) -> None:
        """Keep one target under way for every thread, and one made."""
        while self._order and len(self._jobs) <= self._ahead:
            self._submit(self._order[0])

    def _submit(self, name: str) -> None:
        self._order.remove(name)
        self._jobs[name] = self._pool.submit(self._make, self.targets[name])

    def _make(self, target: Target) -> Repacked:
        repacker = Repacker(target, self.settings, self.orders[target.name], self._scratch)
        result = repacker.whole(keep_lost=self.lost is not None)
        for role, tensor in result.parts.items():
            self.digests[target.name, role] = hashlib.sha256(as_bytes(tensor)).digest()
        return result
