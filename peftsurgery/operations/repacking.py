"""Packed weights of a merge, packed again ahead of the writer."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from peftsurgery.checkpoint.writing import as_bytes
from peftsurgery.operations.ahead import WAITING, Ahead
from peftsurgery.operations.apply import Scratch, Settings
from peftsurgery.operations.plan import Target
from peftsurgery.operations.requantizing import Order, Repacked, Repacker
from peftsurgery.operations.rounding import Survival

Digests = dict[tuple[str, str], bytes]  # (weight, role) -> SHA-256 of the part as it was made


class Repacking:
    """The parts of every target; progress and lost are told of each as it is taken."""

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
        self.digests: Digests = {}
        self._scratch = Scratch()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Repacking:
        # with `lost` a result holds its weight twice in fp32, without it the packed parts alone
        waiting = WAITING if self.lost is None else 0
        ahead = Ahead(list(self.targets), self._make, waiting=waiting)
        self._ahead = self._exit.enter_context(ahead)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def parts(self, name: str) -> dict[str, Tensor]:
        """Role -> tensor of one target; each can be had once."""
        result = self._ahead.take(name)
        self.survival[name] = result.survival
        target = self.targets[name]
        if result.lost is not None and result.change is not None and self.lost is not None:
            self.lost(target, result.lost, result.change)
        if self.progress is not None:
            self.progress(target)
        return result.parts

    def _make(self, name: str) -> Repacked:
        repacker = Repacker(self.targets[name], self.settings, self.orders[name], self._scratch)
        result = repacker.whole(keep_lost=self.lost is not None)
        self.digests |= digests(name, result.parts)
        return result


def digests(name: str, parts: Mapping[str, Tensor]) -> Digests:
    """SHA-256 of every part of one weight."""
    return {(name, role): hashlib.sha256(as_bytes(part)).digest() for role, part in parts.items()}
