"""What a file says of itself: configs, alphas and scales per module, from headers and the few alpha
values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from peftsurgery.checkpoint import Checkpoint
from peftsurgery.codec.detect import Explanation
from peftsurgery.codec.foreign import foreign_type
from peftsurgery.codec.keys import Record
from peftsurgery.codec.map_shapes import NEEDED, Source, version_of
from peftsurgery.codec.resolving import Placement
from peftsurgery.codec.scales import (
    PLACEHOLDER,
    ConfigScales,
    check_alpha,
    diffusers_configs,
    scale_of,
)
from peftsurgery.errors import Finding, UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch

MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
CHANGED_MEANING = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
)
PEFT_TYPES = (
    *("LORA", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "IA3"),
    *("ROAD", "DELORA", "HIRA", "LN_TUNING", "TRAINABLE_TOKENS"),
    *("ADALORA", "VERA", "FOURIERFT", "C3A", "MISS", "BONE", "SHIRA"),
)
# alpha is a constraint, or nothing
UNSCALED = {"full", "set", "", *NEEDED} - {"glora"}


class Conventions:
    """Resolves alpha, rs-LoRA, patterns and flags of one file; collects what is odd about them in
    `findings`.

    Raises UnsupportedError when a config asks for something that changes what the factors mean.
    """

    def __init__(self, checkpoint: Checkpoint, explanation: Explanation) -> None:
        self.checkpoint = checkpoint
        self.explanation = explanation
        self.findings: list[Finding] = []
        self._projections: dict[str, tuple[dict[str, torch.Tensor], int]] = {}
        self.raw = self._raw_configs()
        self.configs = {
            component: ConfigScales(config, f"{checkpoint.source} ({component})")
            for component, config in self.raw.items()
            if component in explanation.architecture.components
        }
        self._repairs()

    def alpha(self, record: Record) -> float | None:
        """The stored alpha of a record, or None."""
        key = record.keys.get("alpha")
        if key is None:
            return None
        tensor = self.checkpoint[key]
        if math.prod(tensor.shape) != 1:
            raise UsageError(
                f"{key!r}: alpha has shape {list(tensor.shape)}; expected one number. The file is "
                "damaged."
            )
        return float(np.asarray(tensor.numpy(), dtype=np.float64).reshape(-1)[0])

    def scale(self, record: Record, placement: Placement, rank: int | None) -> float:
        """The scale of one module (see `codec.scales`)."""
        config = self.configs.get(placement.component)
        full_lokr = record.algorithm == "lokr" and rank is None
        alpha = self.alpha(record)
        if alpha is not None:
            key = record.keys["alpha"]
            if record.algorithm in UNSCALED or (full_lokr and config is None):
                if full_lokr and alpha > PLACEHOLDER:
                    self.once(
                        "info",
                        "alpha-placeholder",
                        f"alpha {alpha:g} on full LoKr factors is ignored",
                        key,
                    )
                return 1.0
            self.findings += check_alpha(alpha, key)
            if config is not None and placement.container != "peft":
                self.once(
                    "warning",
                    "alpha-twice",
                    "the file has alpha tensors and lora_adapter_metadata: the tensors are used, "
                    "while diffusers applies "
                    "both",
                    key,
                    "convert the file to settle its strength",
                )
            return scale_of(alpha, rank)
        if config is None or record.algorithm in UNSCALED:
            return 1.0
        return config.scale(placement.site.name, rank)

    def map_source(self, record: Record, placement: Placement) -> Source:
        """What the file says of a record whose weight is a map of the old one."""
        config = self.raw.get(placement.component)
        key = next(iter(record.keys.values()))
        alpha = self.alpha(record)
        if alpha is not None and not math.isfinite(alpha):
            raise UsageError(f"{record.keys['alpha']!r}: alpha is {alpha}. The file is damaged.")
        if alpha and alpha > 0 and placement.container == "comfy" and "blocks" in record.keys:
            self.once(
                "warning",
                "constraint-meaning",
                "alpha is taken for the constraint per output (LyCORIS, Kohya); ComfyUI takes it "
                "for the norm itself",
                key,
            )
        if config is None and "vector" in record.keys and record.algorithm == "oft":
            self.once(
                "info",
                "oft-defaults",
                "no adapter_config.json: oft_R is read as the Neumann series of 5 terms, as "
                "OneTrainer and PEFT by default write it",
                key,
            )
        if (
            config is not None
            and record.algorithm == "oft"
            and (config.get("use_cayley_neumann", True) and version_of(config) < (0, 18))
        ):
            self.once(
                "info",
                "oft-series",
                "written by PEFT before 0.18, whose Neumann series gives the last term its full "
                "weight; PEFT 0.18 and later read the same file as a slightly different rotation",
                key,
            )
        name = placement.site.name
        if record.algorithm != "vera":
            return Source(key, name, config, alpha, self.transposed(placement))
        shared, widest = self._shared(record)
        return Source(key, name, config, alpha, self.transposed(placement), shared, widest)

    def _shared(self, record: Record) -> tuple[dict[str, torch.Tensor], int]:
        """VeRA's projections in this record's component, and its largest number of outputs."""
        head, colon, _ = record.module.partition(":")
        start = head + colon if colon else ""
        if start not in self._projections:
            parsed = self.explanation.parsed
            found = {
                name.removeprefix(start): self.checkpoint[key].torch()
                for name, key in parsed.shared.items()
                if name.startswith(start) and (start or ":" not in name)
            }
            outputs = [
                math.prod(self.checkpoint[r.keys["lambda_b"]].shape)
                for r in parsed.records.values()
                if "lambda_b" in r.keys and r.module.startswith(start)
            ]
            self._projections[start] = found, max(outputs, default=0)
        return self._projections[start]

    def transposed(self, placement: Placement) -> bool:
        """Whether PEFT's fan_in_fan_out applies: the config asks for it and the module is an HF
        Conv1D.

        PEFT ignores the flag on nn.Linear; which modules are Conv1D is known by name (`conv1d` in
        the table).
        """
        if not self.raw.get(placement.component, {}).get("fan_in_fan_out"):
            return False
        return placement.site.name.rpartition(".")[2] in self.explanation.architecture.conv1d

    def once(
        self, level: str, code: str, message: str, key: str | None = None, remedy: str | None = None
    ) -> None:
        """Add a finding unless one of its kind is there."""
        if all(f.code != code for f in self.findings):
            self.findings.append(Finding(level, code, message, key, remedy))  # type: ignore[arg-type]

    def _raw_configs(self) -> dict[str, Mapping[str, object]]:
        checkpoint, placements = self.checkpoint, self.explanation.placements.values()
        configs: dict[str, Mapping[str, object]] = dict(
            diffusers_configs(checkpoint.metadata, checkpoint.source)
        )
        if checkpoint.config is not None and "peft_type" in checkpoint.config:
            for component in {p.component for p in placements}:
                configs[component] = checkpoint.config
        configs.update(checkpoint.configs or {})
        for config in configs.values():
            self._check(config)
        if not configs and any(p.container == "peft" for p in placements):
            self.once(
                "warning",
                "no-adapter-config",
                "PEFT keys without adapter_config.json: alpha is unknown and scale 1 is assumed",
                None,
                "give the folder that holds adapter_config.json if the adapter was trained with "
                "alpha != r",
            )
        return configs

    def _check(self, config: Mapping[str, object]) -> None:
        source = self.checkpoint.source
        kind = str(config.get("peft_type") or "LORA").upper()
        if kind not in PEFT_TYPES:
            method = foreign_type(kind)
            why = "It is not known to PEFT 0.21 either." if method is None else method.reason
            raise UnsupportedError(
                f"{source}: adapter_config.json says peft_type {kind!r}, which this version does "
                f"not handle. {why}"
            )
        for name in CHANGED_MEANING:
            if config.get(name):
                raise UnsupportedError(
                    f"{source}: adapter_config.json sets {name}, which changes what the factors "
                    "mean; this version does "
                    "not handle it."
                )
        init = str(config.get("init_lora_weights", ""))
        if init.lower().startswith(MUTATING_INITS):
            self.once(
                "warning",
                "residual-base",
                f"init_lora_weights is {init!r}: the adapter belongs to a residual base, not to "
                "the pristine one",
                None,
                "convert it in PEFT with path_initial_model_for_weight_conversion before merging",
            )

    def _repairs(self) -> None:
        parsed = self.explanation.parsed
        for what, count in parsed.repairs.items():
            self.findings.append(
                Finding(
                    "warning",
                    "repaired-names",
                    f"{what!r} removed from the names of {count} keys",
                    None,
                    "most programs would not have found these modules",
                )
            )
        if parsed.skipped:
            self.once(
                "info",
                "frozen-copies",
                f"{len(parsed.skipped)} frozen copies of base weights (original_module) left out",
                parsed.skipped[0],
            )
        if parsed.adapter_name:
            self.once(
                "info", "named-adapter", f"keys carry the adapter name {parsed.adapter_name!r}"
            )
        if contradicted := self.explanation.contradicted:
            self.once(
                "warning",
                "unusual-shapes",
                f"{len(contradicted)} modules have shapes other than "
                f"{self.explanation.architecture.title}'s",
                contradicted[0],
                "expected for pruned or tiny variants; otherwise check --architecture",
            )
