"""Writing a merged checkpoint: every file of the base again, touched tensors made on the way."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery import __version__
from peftsurgery.checkpoint import (
    Checkpoint,
    Deferred,
    LazyTensor,
    open_checkpoint,
    save,
    serialized_header,
)
from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.checkpoint.gguf import GGUFCheckpoint
from peftsurgery.checkpoint.gguf_saving import save_gguf
from peftsurgery.checkpoint.writing import Joint
from peftsurgery.errors import CheckFailed, UsageError
from peftsurgery.operations.apply import TILE, Settings, Survival, is_repacked, output_dtype
from peftsurgery.operations.merge_proof import written_dtype
from peftsurgery.operations.pipeline import Pipeline
from peftsurgery.operations.plan import Target
from peftsurgery.operations.repacking import Repacking
from peftsurgery.operations.requantizing import Order
from peftsurgery.operations.side_files import copy_side_files
from peftsurgery.quantizers import PackedCheckpoint, PackedTensor, is_marker
from peftsurgery.quantizers.rounded import RoundedTensor
from peftsurgery.reports import Progress

PACKING_KEYS = ("_quantization_metadata",)  # of the file, on its packed weights (ComfyUI)


@dataclass(frozen=True)
class Source:
    """What is written again: a checkpoint as it is seen, and what of it changes."""

    checkpoint: Checkpoint
    targets: Mapping[str, Target]
    metadata: Mapping[str, str]  # of the operation
    config: dict[str, object] | None = None  # config.json as it becomes; None: as it is
    restructured: bool = False  # it is seen with other tensors than its files hold


@dataclass(frozen=True)
class Place:
    """One tensor of a written file: what of the base it is, and how it will be described."""

    name: str  # in the base
    tensor: LazyTensor  # of the base; of a part of a packed weight, the stored part
    outline: Deferred
    target: Target | None
    role: str | None = None  # of a part that is made


@dataclass(frozen=True)
class Written:
    """What became of the touched tensors."""

    survival: dict[str, Survival]
    digests: dict[tuple[str, str], bytes]  # (packed target, role) -> SHA-256 of the part


def write_merged(
    source: Source,
    settings: Settings,
    staged: Path,
    orders: Mapping[str, Order],
    *,
    lost: Callable[[Target, Tensor, Tensor], None] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write every file of the base to `staged`. orders: how packed targets are rounded; lost: gets
    what rounding took from each, and its change.
    """
    base = source.checkpoint
    files = {path: _sorted(places) for path, places in _places(source, settings).items()}
    made = [place for places in files.values() for place in places if place.target is not None]
    dense = [place.target for place in made if place.role is None and place.target]
    packed = {place.name: place.target for place in made if place.role and place.target}
    total = sum(t.tensor.nbytes for t in (*dense, *packed.values()))
    done = 0

    def advance(target: Target) -> None:
        nonlocal done
        done += target.tensor.nbytes
        if progress is not None:
            progress(done, total, target.name)

    root = base.path if base.path.is_dir() else base.path.parent
    with contextlib.ExitStack() as stack:
        pipeline = stack.enter_context(Pipeline(dense, settings, advance))
        repacking = stack.enter_context(
            Repacking(list(packed.values()), settings, orders, advance, lost)
        )
        joints: dict[str, Joint] = {}
        for path, places in files.items():
            file = staged if not staged.is_dir() else staged / path.relative_to(root)
            file.parent.mkdir(parents=True, exist_ok=True)
            if not places or _as_it_is(source, places, settings):
                shutil.copyfile(path, file)
                continue
            tensors = {
                place.tensor.name: _value(place, pipeline, repacking, joints) for place in places
            }
            if (stored := stored_gguf(base, settings)) is not None:
                save_gguf(file, stored, tensors)
            else:
                save(file, tensors, _metadata(source, path, settings))
        written = Written({**pipeline.survival, **repacking.survival}, repacking.digests)
    if staged.is_dir():
        plain = settings.requant == "dequant"
        copy_side_files(base, staged, config=source.config, dtype=settings.dtype, dequantized=plain)
    return written


def stored_gguf(base: Checkpoint, settings: Settings) -> GGUFCheckpoint | None:
    """The GGUF file of the base, when it is to be written again as one."""
    stored = base.stored if isinstance(base, PackedCheckpoint) else base
    keeps = isinstance(stored, GGUFCheckpoint) and settings.requant == "same"
    return stored if keeps else None  # pyright: ignore[reportReturnType]


def check_container(base: Checkpoint, dst: Path, settings: Settings) -> None:
    """Refuse a name that says another container than will be written: a GGUF file stays one unless
    it is unpacked, and nothing else becomes one.
    """
    if (stored_gguf(base, settings) is not None) == (dst.suffix.lower() == ".gguf"):
        return
    if base.kind != "gguf":
        raise UsageError(f"{dst}: GGUF files are only made of GGUF files; name it .safetensors.")
    raise UsageError(
        f"{dst}: a GGUF base is written as .gguf, with --requant dequant as .safetensors."
    )


def _places(source: Source, settings: Settings) -> dict[Path, list[Place]]:
    """Weight files of the base with what they will hold, by offset in the base."""
    base, targets = source.checkpoint, source.targets
    files: dict[Path, list[tuple[int, Place]]] = {path: [] for path in base.files}
    for name, tensor in base.items():
        if settings.requant == "dequant" and is_marker(name):
            continue
        target = targets.get(name)
        if is_repacked(tensor, settings):
            assert isinstance(tensor, PackedTensor)
            for role, part in tensor.packed.parts.items():
                outline = Deferred(part.dtype, tuple(part.shape), lambda: iter(()))
                made = role if target is not None else None
                place = Place(name, part, outline, target, made)
                files[part.path].append((_offset(part), place))
            continue
        shape = target.shape if target is not None else tuple(tensor.shape)
        dtype = output_dtype(target, settings) if target else written_dtype(tensor, settings)
        place = Place(name, tensor, Deferred(dtype, shape, lambda: iter(())), target)
        files[tensor.path].append((_offset(tensor), place))
    return {
        path: [place for _, place in sorted(places, key=lambda item: item[0])]
        for path, places in files.items()
    }


def _offset(tensor: LazyTensor) -> int:
    if isinstance(tensor, PackedTensor):
        tensor = next(iter(tensor.packed.parts.values()))
    if isinstance(tensor, RoundedTensor):
        tensor = tensor.source
    return (tensor.file_range() or (0, 0))[0]


def _sorted(places: list[Place]) -> list[Place]:
    """In the order in which `save` will ask for them."""
    outlines = {place.tensor.name: place.outline for place in places}
    by_stored = {place.tensor.name: place for place in places}
    _, order = serialized_header(outlines)
    return [by_stored[stored] for stored in order]


def _as_it_is(source: Source, places: list[Place], settings: Settings) -> bool:
    """Whether a file of the base is to be copied byte for byte."""
    if source.restructured or settings.dtype:
        return False
    return not any(
        place.target is not None or isinstance(place.tensor, PackedTensor | RoundedTensor)
        for place in places
    )


def _value(
    place: Place, pipeline: Pipeline, repacking: Repacking, joints: dict[str, Joint]
) -> LazyTensor | Deferred:
    tensor, outline = place.tensor, place.outline
    name, role = place.name, place.role
    if role is not None:
        return _part(place, repacking, joints)
    if place.target is not None:
        return Deferred(outline.dtype, outline.shape, lambda: pipeline.chunks(name), (tensor.path,))
    if outline.dtype == tensor.dtype and not isinstance(tensor, PackedTensor | RoundedTensor):
        return tensor
    return Deferred(
        outline.dtype, outline.shape, lambda: cast(tensor, outline.dtype), (tensor.path,)
    )


def _part(place: Place, repacking: Repacking, joints: dict[str, Joint]) -> Deferred:
    """One part of a packed weight; the others of the same weight are made with it."""
    assert place.target is not None
    assert isinstance(place.target.tensor, PackedTensor)
    packed, name, stored = place.target.tensor.packed, place.name, place.tensor.name
    if name not in joints:
        joints[name] = Joint(
            lambda: {
                packed.parts[role].name: tensor for role, tensor in repacking.parts(name).items()
            }
        )
    joint, outline = joints[name], place.outline
    return Deferred(
        outline.dtype,
        outline.shape,
        lambda: iter((joint.take(stored),)),
        (place.tensor.path,),
        joint,
    )


def cast(tensor: LazyTensor, dtype: str) -> Iterator[torch.Tensor]:
    """A tensor that no adapter touches in another dtype, in pieces. Raises CheckFailed when a value
    does not fit.
    """
    flat = tensor.torch().reshape(-1)
    for start in range(0, flat.numel(), TILE):
        piece = flat[start : start + TILE]
        result = piece.to(torch_dtype(dtype))
        if not torch.equal(torch.isfinite(result), torch.isfinite(piece)):
            raise CheckFailed(
                f"{tensor.name!r}: a value of {float(piece.abs().max()):g} does not fit {dtype}; "
                "nothing was kept. Write "
                "--dtype bf16 or fp32."
            )
        yield result


def _metadata(source: Source, path: Path, settings: Settings) -> dict[str, str]:
    base = source.checkpoint
    known = dict(base.metadata) if len(base.files) == 1 else {"format": "pt"}
    if isinstance(base, PackedCheckpoint) and len(base.files) > 1:  # it may say how to unpack
        known |= open_checkpoint(path).metadata
    if settings.requant == "dequant":
        known = {key: text for key, text in known.items() if key not in PACKING_KEYS}
    return {**known, "peftsurgery.version": __version__, **source.metadata}
