"""Which files of a folder are its weights: decided on the list of names, so a hub listing works as
well.

Conventions: transformers (`model.safetensors`, its index), diffusers (`model_index.json`, one
sub-folder for each component, `diffusion_pytorch_model.safetensors`; a variant is
`<stem>.<variant>.safetensors`, its index `<stem>.safetensors.index.<variant>.json`), PEFT
(`adapter_config.json`, `adapter_model.safetensors`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from peftsurgery.checkpoint.strict_json import shown
from peftsurgery.errors import UnsafeInputError, UsageError

SUFFIXES = (".safetensors", ".sft")
MODEL_STEMS = ("model", "diffusion_pytorch_model")
INDEX = re.compile(r"\.(safetensors|bin)\.index(\.\w+)?\.json$")
_TRAINER_STEP = re.compile(r"checkpoint-\d+")
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class Part:
    """One set of weights: names below the folder, with `/`."""

    component: str  # "" for the folder itself
    weights: str  # a weights file or an index
    config: str | None


@dataclass(frozen=True)
class Plan:
    kind: str
    parts: tuple[Part, ...]
    config: str | None  # of the folder itself


def is_index(name: str) -> bool:
    return INDEX.search(name) is not None


def plan(names: Set[str], *, where: str, read_json: Callable[[str], dict[str, object]]) -> Plan:
    """What to open of a folder holding the files `names` (two levels deep).

    `read_json` reads one of them. Raises UsageError when there is nothing to open, or more than
    one thing.
    """
    top = {name for name in names if "/" not in name}
    if "model_index.json" in top:
        return _pipeline(names, where, read_json)
    adapter = _choose(top, ("adapter_model",), where)
    if "adapter_config.json" in top:
        if adapter is None:
            raise UsageError(f"{where}: adapter_config.json without adapter_model.safetensors")
        model = _choose(top, MODEL_STEMS, where)
        if model is not None:
            raise UsageError(
                f"{where}: holds both an adapter and {model}; give the path of one of them"
            )
        return _single("peft", adapter, "adapter_config.json")
    config = "config.json" if "config.json" in top else None
    weights = _choose(top, MODEL_STEMS, where)
    if weights is not None:
        return _single("transformers", weights, config)
    adapters = _peft_folders(names, where)
    if adapters:
        return Plan("peft", adapters, None)
    weights = _choose(top, ("pytorch_lora_weights",), where) or _only(top, where)
    return _single("sharded" if is_index(weights) else "file", weights, config)


def _single(kind: str, weights: str, config: str | None) -> Plan:
    return Plan(kind, (Part("", weights, config),), config)


def _pipeline(names: Set[str], where: str, read_json: Callable[[str], dict[str, object]]) -> Plan:
    parts = []
    for component, value in read_json("model_index.json").items():
        if component.startswith("_") or not isinstance(value, list) or value[:1] == [None]:
            continue
        check_basename(component, where=f"{where}: model_index.json")
        inside = _below(names, component)
        weights = _choose(inside, MODEL_STEMS, f"{where}/{component}")
        if weights is not None:
            config = f"{component}/config.json" if "config.json" in inside else None
            parts.append(Part(component, f"{component}/{weights}", config))
    if not parts:
        raise UsageError(
            f"{where}: no component named in model_index.json has weights in its sub-folder"
        )
    return Plan("pipeline", tuple(parts), "model_index.json")


def _peft_folders(names: Set[str], where: str) -> tuple[Part, ...]:
    folders = sorted(name[: -len("/adapter_config.json")] for name in names if _is_adapter(name))
    steps = [folder for folder in folders if _TRAINER_STEP.fullmatch(folder)]
    if steps:
        raise UsageError(
            f"{where}: holds training checkpoints ({', '.join(steps)}); give the path of one"
        )
    parts = []
    for folder in folders:
        weights = _choose(_below(names, folder), ("adapter_model",), f"{where}/{folder}")
        if weights is None:
            raise UsageError(
                f"{where}/{folder}: adapter_config.json without adapter_model.safetensors"
            )
        parts.append(Part(folder, f"{folder}/{weights}", f"{folder}/adapter_config.json"))
    return tuple(parts)


def _is_adapter(name: str) -> bool:
    return name.count("/") == 1 and name.endswith("/adapter_config.json")


def _below(names: Set[str], folder: str) -> set[str]:
    start = f"{folder}/"
    return {name[len(start) :] for name in names if name.startswith(start)}


def _choose(names: Set[str], stems: tuple[str, ...], where: str) -> str | None:
    """The weights named by convention after one of `stems`: plain before variant before pickle;
    None when absent.
    """
    plain = [
        name for stem in stems for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    ]
    variant = re.compile(
        rf"({'|'.join(stems)})\.((?!safetensors)\w+\.safetensors|safetensors\.index\.\w+\.json)"
    )
    pickled = [
        name
        for stem in (*stems, "pytorch_model")
        for name in (f"{stem}.bin", f"{stem}.bin.index.json")
        if stem != "pytorch_model" or "model" in stems
    ]
    for found in (
        [name for name in plain if name in names],
        sorted(name for name in names if variant.fullmatch(name)),
        [name for name in pickled if name in names],
    ):
        if len(found) > 1:
            raise UsageError(f"{where}: holds {' and '.join(found)}; give the path of one of them")
        if found:
            return found[0]
    return None


def _only(top: Set[str], where: str) -> str:
    """The only index, or the only weights file, or the only pickle of a folder that follows no
    convention.
    """
    from peftsurgery.checkpoint.pickles import is_pickle_name

    groups = (
        sorted(name for name in top if is_index(name)),
        sorted(name for name in top if name.endswith(SUFFIXES)),
        sorted(name for name in top if name.endswith(".gguf")),
        sorted(name for name in top if is_pickle_name(name)),
    )
    for found in groups:
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
            raise UsageError(
                f"{where}: holds {len(found)} weight files and no index ({listed}); give the path "
                "of one"
            )
    raise UsageError(
        f"{where}: no weights in this folder (looked for model_index.json, adapter_config.json, "
        "model.safetensors, diffusion_pytorch_model.safetensors and their indexes, PEFT "
        "sub-folders, pytorch_lora_weights.safetensors, a single .safetensors, .sft or .gguf file)"
    )


def check_basename(name: str, *, where: str) -> None:
    """UnsafeInputError unless `name` is a plain file name: no separator, `..`, drive letter or
    control character.
    """
    if (
        not name
        or name in (".", "..")
        or "/" in name
        or "\\" in name
        or _DRIVE.match(name)
        or not name.isprintable()
        or len(name) > 255
    ):
        raise UnsafeInputError(f"{where}: {shown(name)} is not a plain file name inside the folder")


def inside(root: Path, relative: str) -> Path:
    """`root/relative`, after checking that no symlink leads out of `root`.

    In a Hugging Face cache, `<cache>/models--*/snapshots/<revision>`, links into
    `<cache>/models--*/blobs` of the same repository and into the cache's shared `<cache>/blobs`
    are its normal form and allowed.
    Raises UnsafeInputError.
    """
    path = root / relative
    real_root, real = root.resolve(), path.resolve()
    allowed = [real_root]
    parents = real_root.parents
    for snapshots, repository in zip((real_root, *parents), parents, strict=False):
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            allowed += [repository / "blobs", repository.parent / "blobs"]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise UnsafeInputError(
            f"{path}: a symbolic link out of the folder, to {real}. Give the path of that file "
            "itself."
        )
    return path
