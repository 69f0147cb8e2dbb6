"""What rounding took from a merge into packed weights, as an adapter beside the output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import LoRA
from peftsurgery.codec import BaseWeights
from peftsurgery.codec.bases import Stored
from peftsurgery.errors import UnsupportedError
from peftsurgery.linalg.randomized import DenseTiles, randomized_svd
from peftsurgery.operations.plan import Target
from peftsurgery.operations.rounding import Survival
from peftsurgery.operations.writing_adapter import Origin, encode_as, write_proved
from peftsurgery.reports import Report


class Residual:
    """Collects exact - written of every packed target as LoRAs of at most a rank, by home path."""

    def __init__(self, base: BaseWeights, rank: int) -> None:
        self.base, self.rank = base, rank
        self.modules: dict[str, LoRA] = {}
        self._restored: dict[str, Survival] = {}  # target -> <R, Δ> and ‖lost - R‖²
        self._homes: dict[str, list[tuple[str, Stored]]] = {}
        for home, stored in base.stored.items():
            self._homes.setdefault(stored.name, []).append((home, stored))

    def check(self, targets: Sequence[Target]) -> None:
        """UnsupportedError for a target whose loss no LoRA can hold."""
        for target in targets:
            if target.lead > 1 or len(target.shape) != 2:
                raise UnsupportedError(
                    f"{target.name!r}: --requant residual keeps what matrices lose; this weight "
                    f"has shape {list(target.shape)}. Use --requant same or dequant."
                )

    def add(self, target: Target, lost: Tensor, change: Tensor) -> None:
        """Take what rounding took from a target, beside its change, in the shape of the weight."""
        restored = Survival()
        for home, stored in self._homes[target.name]:
            part, delta = (_home(tensor, stored) for tensor in (lost, change))
            found = randomized_svd(DenseTiles(part), min(self.rank, *part.shape))
            root = found.s.sqrt()
            module = LoRA(found.u * root, root[:, None] * found.vh, scale=1.0)
            kept = float(torch.sum((module.up.T @ delta) * module.down))
            restored.add(Survival(kept, 0.0, max(0.0, found.total - found.kept)))
            self.modules[home.removesuffix(".weight")] = module
        self._restored[target.name] = restored

    def restored(self, name: str, survival: Survival) -> Survival:
        """The survival of a target together with its residual: kept + <R, Δ>, and ‖lost - R‖²."""
        found = self._restored.get(name)
        if found is None:
            return survival
        return Survival(survival.kept + found.kept, survival.total, found.error)

    def write(self, path: Path, to: str, base: str, *, overwrite: bool) -> list[str]:
        """Write the adapter, proved by reading it back; returns the files."""
        config: dict[str, object] = {"base_model_name_or_path": base}
        adapter = Adapter(
            dict(sorted(self.modules.items())), self.base.architecture.name, config=config
        )
        report = Report("merge")
        write_proved(
            encode_as(adapter, to, dtype="fp32"),
            adapter,
            path,
            to=to,
            report=report,
            origin=Origin("merge", {"requant": f"residual:{self.rank}"}),
            overwrite=overwrite,
        )
        return list(report.outputs)


def _home(tensor: Tensor, stored: Stored) -> Tensor:
    """The rows of a stored tensor that are one home tensor, its operator undone."""
    if stored.site.operator == "transpose":
        return tensor.T
    start, stop = stored.rows
    part = tensor[start:stop]
    if stored.site.operator != "swap_halves":
        return part
    half = len(part) // 2
    return torch.cat([part[half:], part[:half]])
