"""Which programs will load a file, and why not: rules per program, in the words of their own
loaders.

Sources: diffusers `loaders/lora_conversion_utils.py` and `lora_pipeline.py`, ComfyUI
`comfy/lora.py` and `comfy/weight_adapter/`, sd-scripts `networks/`, InvokeAI `lora_conversions/`,
PEFT `utils/save_and_load.py`, LyCORIS `wrapper.py`, vLLM's LoRA loader; stated for the versions of
late 2025 to mid 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftsurgery.codec.detect import Explanation
from peftsurgery.layouts import Layout
from peftsurgery.reports import Row


@dataclass(frozen=True)
class Facts:
    """What the rules look at."""

    layout: str
    container: str
    family: str
    algorithms: frozenset[str]
    dora: frozenset[str]  # stored as: "dora_scale", "magnitude"
    tucker: bool
    scaled: bool  # some scale differs from 1
    top_level: bool  # FLUX modules outside the blocks
    values: bool
    ab: bool  # factors are called lora_A and lora_B
    uneven: bool  # a component's modules have different alphas
    dotted_alpha: bool  # alpha tensors in a file with dotted component names


Verdict = tuple[str, str]  # ("yes" | "partly" | "no", why)


def programs(layout: Layout, explanation: Explanation, rows: list[Row]) -> list[Row]:
    """One row per program: whether it loads the file, and the reason when it does not or not all of
    it.
    """
    if explanation.architecture.name == "generic":
        return []  # the names of families without a table are not known to be the program's own
    facts = _facts(layout, explanation, rows)
    result: list[Row] = []
    for name, rule in PROGRAMS.items():
        verdict = rule(facts)
        if verdict is not None:
            result.append({"program": name, "loads": verdict[0], "why": verdict[1]})
    return result


def _facts(layout: Layout, explanation: Explanation, rows: list[Row]) -> Facts:
    records = explanation.parsed.records.values()
    suffixes = {s for r in records for s in r.suffixes}
    dora = {
        kind
        for kind, names in (
            ("dora_scale", {"dora_scale"}),
            ("magnitude", {"lora_magnitude_vector", "lora_magnitude_vector.weight", "magnitude"}),
        )
        if suffixes & names
    }
    return Facts(
        layout.name,
        layout.container,
        explanation.architecture.name,
        frozenset(r.algorithm or "full" for r in records),
        frozenset(dora),
        bool(suffixes & {"lora_mid.weight", "hada_t1", "lokr_t2"}),
        any(row["scale"] not in (1.0, None) for row in rows),
        explanation.architecture.name == "flux"
        and any("blocks." not in p.site.parts[0] for p in explanation.placements.values()),
        any(r.algorithm == "set" or "bias_value" in r.keys for r in records),
        bool(suffixes & {"lora_A.weight", "lora_A"}),
        _uneven(rows),
        layout.container == "component" and "alpha" in suffixes,
    )


def _uneven(rows: list[Row]) -> bool:
    alphas: dict[str, set[float]] = {}
    for row in rows:
        if isinstance(alpha := row["alpha"], int | float):
            alphas.setdefault(str(row["module"]).partition(":")[0], set()).add(float(alpha))
    return any(len(found) > 1 for found in alphas.values())


def _diffusers(f: Facts) -> Verdict | None:
    if f.family == "llm":
        return None
    if f.algorithms - {"lora", "set"}:
        return "no", "reads LoRA only; convert with --algorithm lora"
    if f.dora & {"dora_scale"}:
        return "partly", "drops dora_scale and applies a plain LoRA"
    if f.layout == "kohya-hf" and f.family == "flux":
        return "no", "knows FLUX by its native names only under lora_unet_; --to kohya"
    if f.layout == "kohya-ldm" and f.family in ("sd1", "sd2"):
        return "no", "renames input_blocks for SDXL only; --to kohya"
    if f.container == "flat" and f.family != "flux" and f.uneven:
        return "partly", "applies one alpha to modules whose alphas differ; --alpha fold"
    if f.dotted_alpha and f.family != "flux":
        return "no", "refuses alpha tensors under dotted names; --to diffusers or --alpha fold"
    if f.container in ("flat", "comfy") and f.family == "flux" and f.top_level and not f.ab:
        return (
            "partly",
            "loses FLUX layers outside the blocks of Kohya files; --to diffusers keeps them",
        )
    if f.layout == "onetrainer" and f.family == "flux":
        return "partly", "folds several layers of each block onto one key"
    if f.container == "comfy" and (f.family != "flux" or f.ab):
        return "no", "does not know these names under diffusion_model.; --to diffusers"
    if f.container == "bare" and f.layout not in ("xlabs", "bfl", "sai-control-lora"):
        return "no", "the names carry no component prefix; --to diffusers"
    if f.layout == "lycoris":
        return "no", "does not know the lycoris_ prefix; --to diffusers"
    return "yes", ""


def _comfy(f: Facts) -> Verdict | None:
    if f.family == "llm":
        return None
    if f.container == "peft":
        return "no", "does not read base_model.model. names; --to comfy"
    if f.layout == "xlabs":
        return "no", "reads XLabs names only when every block is there; --to comfy"
    if f.dora & {"magnitude"}:
        return "partly", "ignores lora_magnitude_vector; --to comfy writes dora_scale"
    if f.layout == "diffusers" and f.scaled:
        return (
            "partly",
            "ignores lora_adapter_metadata, so the strength differs; --alpha fold or --to comfy",
        )
    if f.layout == "kohya-hf" and f.family == "flux":
        return "no", "does not know flattened diffusers names under lora_unet_ for FLUX; --to kohya"
    return "yes", ""


def _webui(f: Facts) -> Verdict | None:
    if f.family == "llm":
        return None
    if f.container != "flat":
        return "no", "reads flattened Kohya names; --to kohya"
    if f.layout in ("lycoris", "onetrainer") and f.family == "flux":
        return "no", "expects native FLUX names under lora_unet_; --to kohya"
    return "yes", ""


def _scripts(f: Facts) -> Verdict | None:
    if f.family == "llm":
        return None
    if f.container != "flat" or f.layout == "lycoris":
        return "no", "reads its own flattened names; --to kohya"
    if f.algorithms - {"lora"} or f.dora:
        return "partly", "plain LoRA only; LyCORIS algorithms need lycoris.kohya as network module"
    return "yes", ""


def _invoke(f: Facts) -> Verdict | None:
    if f.family == "llm":
        return None
    if f.container == "peft" and f.layout == "peft" and f.family != "flux":
        return "no", "does not read PEFT folders; --to kohya"
    if f.layout == "lycoris":
        return "no", "does not know the lycoris_ prefix; --to kohya"
    if f.dora:
        return "partly", "norms DoRA per input only: a per-output magnitude comes out wrong"
    return "yes", ""


def _peft(f: Facts) -> Verdict:
    if f.layout == "peft":
        return "yes", ""
    return "no", "needs a folder with adapter_config.json; --to peft"


def _lycoris(f: Facts) -> Verdict:
    if f.layout == "lycoris":
        return "yes", ""
    if f.layout.startswith("kohya"):
        return (
            "partly",
            "through lycoris.kohya in sd-scripts; create_lycoris_from_weights wants lycoris_ names",
        )
    return "no", "wants lycoris_ names; --to lycoris"


def _vllm(f: Facts) -> Verdict | None:
    if f.family != "llm":
        return None
    if f.layout != "peft":
        return "no", "needs a PEFT folder; --to peft"
    if f.algorithms - {"lora"} or f.dora or f.values:
        return "no", "serves plain LoRA only: no DoRA, no modules_to_save, no other algorithm"
    return "yes", ""


PROGRAMS: dict[str, Callable[[Facts], Verdict | None]] = {
    "diffusers": _diffusers,
    "ComfyUI": _comfy,
    "A1111, Forge": _webui,
    "sd-scripts": _scripts,
    "InvokeAI": _invoke,
    "PEFT": _peft,
    "LyCORIS": _lycoris,
    "vLLM": _vllm,
}
