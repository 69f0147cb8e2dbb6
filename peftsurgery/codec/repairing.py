"""Names that a wrapper or a converter spoiled, put right by name: compile, DDP, FSDP, doubled
prefixes.
"""

from __future__ import annotations

import re
from dataclasses import replace

from peftsurgery.codec.keys import Parsed, Record
from peftsurgery.errors import UsageError

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# "module" (DDP) and "base_layer" (an adapter on an adapted layer) are ordinary words elsewhere in a
# name
_DDP = re.compile(
    r"^((?:base_model\.model|diffusion_model|(?:unet|transformer|text_encoder|controlnet)\w*)\.)?module\."
)
DOUBLED = (
    ("lora_unet__", "lora_unet_"),
    ("lora_unet_unet_", "lora_unet_"),
    ("transformer.diffusion_model.", "diffusion_model."),
    ("base_model.model.base_model.model.", "base_model.model."),
    ("base_model.model.unet.", "base_model.model."),
    ("base_model.model.transformer.transformer_blocks.", "base_model.model.transformer_blocks."),
    ("base_model.model.transformer.single_", "base_model.model.single_"),
    ("unet.base_model.model.", "unet."),
    ("transformer.base_model.model.", "transformer."),
    ("unet.unet.", "unet."),
    ("transformer.transformer.", "transformer."),
)


def strip_wrappers(module: str) -> tuple[str, str | None]:
    """Remove torch.compile, DDP, FSDP, checkpoint and PEFT wrapper segments; returns (name, what
    was removed).
    """
    if "." not in module:  # flattened names carry the wrapper as a prefix of the body
        for wrapper in WRAPPERS:
            if f"_{wrapper}_" in module:
                return module.replace(f"{wrapper}_", ""), f"{wrapper}."
        return module, None
    removed = [s for s in module.split(".") if s in WRAPPERS]
    name = ".".join(s for s in module.split(".") if s not in WRAPPERS)
    if _DDP.match(name):
        removed.append("module")
        name = _DDP.sub(lambda match: match[1] or "", name)
    if name.endswith(".base_layer"):
        removed.append("base_layer")
        name = name.removesuffix(".base_layer")
    return name, f"{removed[0]}." if removed else None


def strip_doubled(module: str) -> tuple[str, str | None]:
    """Undo a doubled prefix, or a trailing underscore some converters leave; returns (name, what
    was wrong).
    """
    for wrong, right in DOUBLED:
        if module.startswith(wrong):
            return right + module[len(wrong) :], wrong
    if "." not in module and module.endswith("_"):
        return module.rstrip("_"), "trailing underscore"
    return module, None


def repaired(parsed: Parsed, stage: str) -> Parsed:
    """`parsed` with every module name put through one repair; counts by what was removed in
    `repairs`.
    """
    strip = {"wrappers": strip_wrappers, "doubled": strip_doubled}[stage]
    records: dict[str, Record] = {}
    repairs = dict(parsed.repairs)
    for module, record in parsed.records.items():
        name, what = strip(module)
        if what == "base_layer." and name in parsed.records:
            name, what = module, None  # nested on purpose: PEFT's target_parameters
        if what is not None:
            repairs[what] = repairs.get(what, 0) + len(record.keys)
        target = records.setdefault(name, Record(name, record.algorithm, {}, record.parameter))
        if clash := set(target.keys) & set(record.keys):
            first = next(iter(clash))
            raise UsageError(
                f"{record.keys[first]!r}: after removing {what!r} the module {name!r} has its "
                f"{first} twice "
                f"(also {target.keys[first]!r}). Remove one of the two."
            )
        target.keys.update(record.keys)
        target.suffixes |= record.suffixes
        target.algorithm = target.algorithm or record.algorithm
    return replace(parsed, records=records, repairs=repairs)
