"""What a written adapter says of itself: training metadata, adapter_config.json,
lora_adapter_metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from peftsurgery.adapter import Adapter
from peftsurgery.algorithms import LoRA, WeightAdapter
from peftsurgery.codec import peft_config
from peftsurgery.codec.scales import alpha_of
from peftsurgery.errors import Finding, UnsupportedError
from peftsurgery.layouts import Layout

KOHYA_MODULES = {"flux": "networks.lora_flux"}  # of plain LoRAs, where it is not networks.lora
Written = Mapping[str, Mapping[str, WeightAdapter]]  # component -> module name -> adapter


def metadata_of(
    adapter: Adapter, layout: Layout, written: Written
) -> tuple[dict[str, str], list[Finding]]:
    """The header metadata of the file, and what is to be known about it."""
    metadata = dict(adapter.metadata)
    metadata.pop("lora_adapter_metadata", None)
    metadata["format"] = "pt"
    findings: list[Finding] = []
    if layout.alpha == "config":
        metadata = {k: v for k, v in metadata.items() if not k.startswith(("ss_", "sshs_"))}
    elif layout.alpha == "metadata":
        packed = peft_config.diffusers_metadata(written)
        if packed is not None:
            metadata["lora_adapter_metadata"] = json.dumps(packed, indent=2, sort_keys=True)
            findings.append(
                Finding(
                    "info",
                    "alpha-in-metadata",
                    "alpha differs from rank and lies in lora_adapter_metadata, which diffusers "
                    "reads; programs that ignore it apply another strength",
                    None,
                    "--alpha fold stores the scale in the factors",
                )
            )
    flat = layout.dialect.alpha and layout.container == "flat"
    if flat or "ss_network_dim" in metadata:
        metadata.update(_network(metadata, adapter.architecture, written))
        if metadata["ss_network_module"] != adapter.metadata.get("ss_network_module"):
            metadata.pop("ss_network_args", None)  # of another algorithm
    return metadata, findings


def config_of(
    adapter: Adapter, layout: Layout, component: str, modules: Mapping[str, WeightAdapter]
) -> dict[str, object]:
    """adapter_config.json of one component; UnsupportedError as `peft_config.build` says."""
    try:
        return peft_config.build(modules, adapter, component)
    except UnsupportedError as error:
        first = next(p for p in adapter.modules if p.startswith(f"{component}:"))
        raise UnsupportedError(f"{first}: cannot be written as {layout.name}: {error}") from error


def _network(metadata: Mapping[str, str], architecture: str, written: Written) -> dict[str, str]:
    """sd-scripts' ss_network_* fields for what is in the file."""
    modules = [m for found in written.values() for m in found.values() if m.rank is not None]
    ranks = {m.rank for m in modules}
    alphas = {alpha_of(float(m.scale), m.rank) for m in modules if m.rank}
    plain = all(isinstance(m, LoRA) and m.magnitude is None for m in modules)
    kind = KOHYA_MODULES.get(architecture, "networks.lora") if plain else "lycoris.kohya"
    known = metadata.get("ss_network_module")
    return {
        "ss_network_module": known if known and plain == known.startswith("networks.") else kind,
        "ss_network_dim": f"{ranks.pop()}" if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
