"""The packed side of a merge: what is asked for, predicted, and kept beside the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from peftsurgery import architectures
from peftsurgery.checkpoint import open_checkpoint
from peftsurgery.codec import BaseWeights
from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.operations.apply import Settings, Survival, is_repacked
from peftsurgery.operations.foreseeing import (
    check_predicted,
    explain,
    forecast,
    forecast_rows,
)
from peftsurgery.operations.grams import Grams
from peftsurgery.operations.inputs import OPEN, Inputs
from peftsurgery.operations.merge_report import MergeReport
from peftsurgery.operations.plan import Target, plan_merge
from peftsurgery.operations.requant import Requant
from peftsurgery.operations.requantizing import Order
from peftsurgery.operations.residual import Residual
from peftsurgery.quantizers import PackedTensor
from peftsurgery.quantizers.rounded import RoundedTensor
from peftsurgery.quantizers.surviving import MIN_SURVIVAL


class Repack:
    """What a merge does with the packed weights it touches; nothing, when there are none.

    Raises UsageError for options that have no meaning for this base.
    """

    def __init__(
        self,
        inputs: Inputs,
        settings: Settings,
        requant: Requant,
        gram: str | Path | None,
        min_survival: float | None,
    ) -> None:
        self.inputs, self.settings, self.requant, self.gram = inputs, settings, requant, gram
        targets = inputs.plan.targets.values()
        self.packed = [t for t in targets if is_repacked(t.tensor, settings)]
        self.dense = [t for t in targets if not is_repacked(t.tensor, settings)]
        self.orders: dict[str, Order] = {}
        self.minimum = MIN_SURVIVAL if min_survival is None and self.packed else min_survival
        self.residual: Residual | None = None
        self._check()

    def _check(self) -> None:
        packs = any(isinstance(t, PackedTensor) for t in self.inputs.base.checkpoint.values())
        source = self.inputs.base.checkpoint.source
        if not packs:
            if self.requant.mode not in ("auto", "same"):
                raise UsageError(
                    f"{source}: no weight is packed; --requant {self.requant.mode} has no meaning."
                )
            if self.settings.rounding in ("subspace", "gptq"):
                raise UsageError(
                    f"{source}: no weight is packed; --rounding {self.settings.rounding} has no "
                    "meaning. Use nearest or stochastic."
                )
        if packs and self.settings.dtype and self.settings.requant == "same":
            raise UsageError(
                f"{source}: the weights stay packed; --dtype is for --requant dequant."
            )
        if self.gram is not None and self.settings.rounding != "gptq":
            raise UsageError("--gram is for --rounding gptq.")
        for target in self.packed:
            if target.resized:
                raise UnsupportedError(
                    f"{target.name!r}: an adapter changes its shape from "
                    f"{list(target.tensor.shape)} to {list(target.shape)}, and it is packed. Use "
                    "--requant dequant."
                )

    def check_trained_on(self, qlora_base: str | None) -> None:
        """UsageError where W16 + ΔW is wanted of a packed base and W16 is not given."""
        if qlora_base == "original" and self.packed and self.requant.mode != "from-original":
            raise UsageError(
                f"{self.inputs.base.checkpoint.source}: --qlora-base original: the adapter belongs "
                "to the unquantized weights, so those are what it has to be added to. Give them: "
                "--requant from-original:BASE16."
            )

    def refuse_in_place(self) -> None:
        """UnsupportedError for a merge in place of packed or rounded weights."""
        tensors = self.inputs.base.checkpoint.values()
        if any(isinstance(t, PackedTensor | RoundedTensor) for t in tensors):
            raise UnsupportedError(
                f"{self.inputs.base.checkpoint.source}: packed weights, and plain ones seen as "
                "packed, are merged into a new output only. Give -o DST instead of --in-place."
            )

    def predict(self, report: MergeReport, dst: Path, *, overwrite: bool) -> None:
        """Choose the rounding of every packed weight, and say why. Raises CheckFailed when too
        little is to be expected, UsageError for a residual adapter that exists.
        """
        if not self.packed:
            return
        if self.requant.mode == "residual":
            self.residual = Residual(self.inputs.base, self.requant.rank)
            self.residual.check(self.packed)
            place = self._residual_path(dst)
            if place.exists() and not overwrite:
                raise UsageError(f"{place}: exists. Pass --overwrite to replace it.")
        grams = Grams(self.gram) if self.gram is not None else None
        originals = self._originals() if self.requant.mode == "from-original" else {}
        found, self.orders = forecast(
            self.inputs.plan, self.settings, self.requant, originals, grams
        )
        formats = dict.fromkeys(item.format for item in found)
        report.summary["packed weights"] = f"{len(found)} touched ({', '.join(formats)})"
        report.summary["rounding of packed weights"] = explain(found)
        report.tables["packed weights"] = forecast_rows(found)
        assert self.minimum is not None
        check_predicted(found, self.minimum, self.requant)

    def _originals(self) -> dict[str, Target]:
        """The packed targets as they lie on the unquantized base."""
        assert self.requant.original is not None
        architecture = architectures.get(self.inputs.base.architecture.name)
        base = BaseWeights(open_checkpoint(self.requant.original), architecture)
        found = plan_merge(base, self.inputs.adapters, self.inputs.names).targets
        for target in self.packed:
            other = found.get(target.name)
            if other is None or other.shape != target.shape:
                what = "is missing there" if other is None else f"has shape {list(other.shape)}"
                raise UsageError(
                    f"{self.requant.original}: {target.name!r} of {list(target.shape)} {what}. "
                    "Give the checkpoint that the packed base was made from."
                )
        return found

    @property
    def lost(self) -> Callable[[Target, Tensor, Tensor], None] | None:
        """What takes the loss of each packed weight, if anything does."""
        return self.residual.add if self.residual is not None else None

    def kept(self, survival: Mapping[str, Survival]) -> dict[str, Survival]:
        """The survival of every target, with what the residual adapter keeps."""
        if self.residual is None:
            return dict(survival)
        return {name: self.residual.restored(name, item) for name, item in survival.items()}

    def write_residual(self, dst: Path, *, overwrite: bool) -> list[str]:
        """Write the residual adapter beside `dst`; returns the files."""
        if self.residual is None:
            return []
        path = self._residual_path(dst)
        base = str(dst)
        return self.residual.write(path, self._layout, base, overwrite=overwrite)

    @property
    def _layout(self) -> str:
        return "peft" if self.inputs.base.architecture.name in OPEN else "diffusers"

    def _residual_path(self, dst: Path) -> Path:
        stem = dst.name.removesuffix(".safetensors").removesuffix(".sft")
        name = f"{stem}-residual" + ("" if self._layout == "peft" else ".safetensors")
        return dst.with_name(name)
