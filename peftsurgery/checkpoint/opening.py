"""open_checkpoint: a file, a shard index, a folder or a hub id, to a Checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from peftsurgery.checkpoint import folders, hub, strict_json
from peftsurgery.checkpoint.container import Checkpoint
from peftsurgery.checkpoint.folders import Part, check_basename, inside, is_index
from peftsurgery.checkpoint.gguf import is_gguf, open_gguf
from peftsurgery.checkpoint.header import DEFAULT_LIMITS, Limits, open_regular, read_header
from peftsurgery.checkpoint.pickles import is_pickle_name, open_pickle, refuse_pickle
from peftsurgery.checkpoint.strict_json import shown
from peftsurgery.checkpoint.tensors import FileMap, LazyTensor
from peftsurgery.errors import UnsafeInputError, UsageError


def open_checkpoint(
    source: str | Path, *, allow_pickle: bool = False, limits: Limits = DEFAULT_LIMITS
) -> Checkpoint:
    """Open weights without reading them: headers only.

    source: a local path first (`.safetensors`, `.sft`, `.gguf`, `*.safetensors.index.json`, or a
    folder: transformers, diffusers pipeline, PEFT, PEFT sub-folders, one .safetensors or .gguf),
    then a hub id, `owner/repo[@rev][:file]` or `hf://owner/repo[@rev][/file]`, through
    huggingface_hub and its cache. Pickles (.pt .bin .ckpt .pth) only with `allow_pickle`, and then
    by an interpreter that runs nothing.

    Raises UsageError (missing, truncated, not weights; it says what was tried), UnsafeInputError
    (a broken safety rule, see `Limits`).
    """
    opener = _Opener(str(source), allow_pickle, limits)
    local = Path(source)
    text = str(source)
    tried: list[str] = []
    if not text.startswith(hub.SCHEME):
        if os.path.lexists(local):
            return opener.path(local)
        tried.append(f"the local path {shown(str(local.absolute()), 400)}: no such file or folder")
    hub_id = hub.parse(text)
    if hub_id is None:
        tried.append("the hub: not tried, this is not of the form owner/repo[@revision][:file]")
    else:
        found = hub.fetch(hub_id, tried=tried, limits=limits, allow_pickle=allow_pickle)
        if found is not None:
            return opener.path(found)
    raise UsageError(f"{text}: not found. Tried:\n  " + "\n  ".join(tried))


class _Opener:
    def __init__(self, source: str, allow_pickle: bool, limits: Limits) -> None:
        self.source = source
        self.allow_pickle = allow_pickle
        self.limits = limits

    def path(self, path: Path) -> Checkpoint:
        if path.is_dir():
            return self.folder(path)
        return self.weights(path, None, path)

    def folder(self, root: Path) -> Checkpoint:
        plan = folders.plan(
            listing(root), where=str(root), read_json=lambda name: self.json(root, name)
        )
        config = self.json(root, plan.config) if plan.config else None
        if plan.parts[0].component == "":
            found = self.weights(inside(root, plan.parts[0].weights), plan.kind, root)
            found.config = config
            return found
        components = {part.component: self.component(root, part, plan.kind) for part in plan.parts}
        first = next(iter(components.values()))
        return Checkpoint(
            root,
            {f"{name}:{key}": part[key] for name, part in components.items() for key in part},
            source=self.source,
            kind=plan.kind,
            metadata=first.metadata,
            files=tuple(file for part in components.values() for file in part.files),
            config=config,
            components=components,
        )

    def component(self, root: Path, part: Part, kind: str) -> Checkpoint:
        kind = "transformers" if kind == "pipeline" else kind
        found = self.weights(inside(root, part.weights), kind, root / part.component)
        if part.config:
            found.config = self.json(root, part.config)
        return found

    def json(self, root: Path, name: str) -> dict[str, object]:
        return strict_json.read(inside(root, name), limit=self.limits.json_bytes)

    def weights(self, path: Path, kind: str | None, shown_path: Path) -> Checkpoint:
        """One set of weights: a file or an index; `kind` None means by what it is."""
        if not is_index(path.name) and is_gguf(path):
            return open_gguf(path, source=self.source, limits=self.limits)
        if is_index(path.name):
            tensors, metadata, files = self.index(path)
            kind = kind or "sharded"
        else:
            tensors, metadata = self.file(path)
            kind = kind or ("pickle" if is_pickle_name(path.name) else "file")
            files = (path,)
        return Checkpoint(
            shown_path, tensors, source=self.source, kind=kind, metadata=metadata, files=files
        )

    def file(self, path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
        if is_pickle_name(path.name):
            if not self.allow_pickle:
                refuse_pickle(path)
            return open_pickle(path, limits=self.limits)
        with open_regular(path) as file:
            header = read_header(file, where=str(path), limits=self.limits)
            opened = FileMap(path, os.fstat(file.fileno()))
        start = header.data_start
        tensors = {
            name: LazyTensor(
                opened, name, info.dtype, info.shape, start + info.begin, start + info.end
            )
            for name, info in header.tensors.items()
        }
        return tensors, header.metadata

    def index(self, path: Path) -> tuple[dict[str, LazyTensor], dict[str, str], tuple[Path, ...]]:
        """All shards of an index; `weight_map` and the shards must name exactly the same tensors in
        both directions.
        """
        weight_map = shard_map(path, limit=self.limits.json_bytes)
        shards = sorted(set(weight_map.values()))
        root = path.parent
        found: dict[str, LazyTensor] = {}
        metadata: dict[str, str] = {}
        files = []
        for shard in shards:
            file = inside(root, shard)
            tensors, shard_metadata = self.file(file)
            if not files:
                metadata = shard_metadata
            files.append(file)
            for name in tensors:
                if name in found:
                    raise UnsafeInputError(
                        f"{file}: {shown(name)} is in {found[name].path.name} too; a tensor "
                        "belongs to one shard"
                    )
                if weight_map.get(name) != shard:
                    place = weight_map.get(name)
                    what = f"puts it into {shown(place)}" if place else "does not name it"
                    raise UnsafeInputError(f"{file}: holds {shown(name)}, but {path.name} {what}")
            found.update(tensors)
        for name, shard in weight_map.items():
            if name not in found:
                raise UnsafeInputError(f"{path}: {shown(name)} should be in {shard}, but is not")
        return {name: found[name] for name in weight_map}, metadata, tuple(files)


def shard_map(path: Path, *, limit: int) -> Mapping[str, str]:
    """The `weight_map` of an index, shard names checked. Raises UnsafeInputError, UsageError."""
    weight_map = strict_json.read(path, limit=limit).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsafeInputError(
            f"{path}: weight_map is missing or empty; tensor -> shard was expected"
        )
    result: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise UnsafeInputError(
                f"{path}: the shard of {shown(name)} is {type(shard).__name__}, a file name was "
                "expected"
            )
        check_basename(shard, where=str(path))
        if not (shard.endswith(folders.SUFFIXES) or is_pickle_name(shard)):
            raise UnsafeInputError(f"{path}: {shown(shard)} is not the name of a weights file")
        result[name] = shard
    return result


def listing(root: Path) -> frozenset[str]:
    """The files of a folder and of its sub-folders, by name below it, with `/`."""
    names = set()
    try:
        for entry in os.scandir(root):
            if entry.is_dir():
                names.update(f"{entry.name}/{file.name}" for file in os.scandir(entry.path))
            else:
                names.add(entry.name)
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return frozenset(names)
