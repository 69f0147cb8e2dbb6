"""The formats in the order they are looked for, and the view of a checkpoint through them."""

from __future__ import annotations

from collections.abc import Mapping

from peftsurgery.checkpoint import Checkpoint, LazyTensor
from peftsurgery.checkpoint.gguf import GGUFCheckpoint
from peftsurgery.errors import UnsupportedError, UsageError, nearest
from peftsurgery.quantizers.awq import AWQ
from peftsurgery.quantizers.bitsandbytes4 import FP4, NF4
from peftsurgery.quantizers.bitsandbytes8 import Int8
from peftsurgery.quantizers.block_float8 import BlockFloat8
from peftsurgery.quantizers.comfy_nvfp4 import ComfyNvfp4
from peftsurgery.quantizers.compressed_float8 import CompressedFloat8, FbgemmFloat8
from peftsurgery.quantizers.configs import quantization_config
from peftsurgery.quantizers.gguf_view import gguf_tensors
from peftsurgery.quantizers.gptq import GPTQ
from peftsurgery.quantizers.hqq import HQQ
from peftsurgery.quantizers.int_quantized import IntQuantized
from peftsurgery.quantizers.mxfp4 import CompressedMxfp4, DeepSeekMxfp4, GptOss
from peftsurgery.quantizers.nvfp4 import CompressedNvfp4, ModelOptNvfp4
from peftsurgery.quantizers.pack_quantized import PackQuantized
from peftsurgery.quantizers.packed import Format, Packed, PackedTensor
from peftsurgery.quantizers.plain_float8 import PlainFloat8
from peftsurgery.quantizers.quanto import Quanto, QuantoFloat8
from peftsurgery.quantizers.scaled_float8 import ComfyFloat8
from peftsurgery.quantizers.torchao import TorchAO, TorchAOFloat8
from peftsurgery.quantizers.torchao_int4 import TorchAOInt4

FORMATS: tuple[Format, ...] = (
    NF4(),
    FP4(),
    Int8(),
    GPTQ(),
    AWQ(),
    HQQ(),
    Quanto(),
    QuantoFloat8(),
    TorchAO(),
    TorchAOInt4(),
    TorchAOFloat8(),
    ComfyFloat8(),
    ComfyNvfp4(),
    CompressedNvfp4(),
    ModelOptNvfp4(),
    GptOss(),
    CompressedMxfp4(),
    PackQuantized(),
    IntQuantized(),
    DeepSeekMxfp4(),
    BlockFloat8(),
    FbgemmFloat8(),
    CompressedFloat8(),
    PlainFloat8(),
)


def by_name(name: str) -> Format:
    """A format by its name. Raises UsageError with the nearest ones."""
    known = {format.name: format for format in FORMATS}
    if name not in known:
        close = ", ".join(nearest(name, known)) or ", ".join(known)
        raise UsageError(f"format {name!r} is not known. Closest: {close}.")
    return known[name]


def is_marker(name: str) -> bool:
    """Whether a tensor only says that a file holds packed weights."""
    return any(format.marks(name) for format in FORMATS)


class PackedCheckpoint(Checkpoint):
    """A checkpoint whose packed weights appear as what they stand for: fp32 tensors named
    `….weight`; their parts are not seen. `stored` is the checkpoint as it lies in its files.
    """

    stored: Checkpoint
    packed: Mapping[str, Packed]

    def with_tensors(self, tensors: Mapping[str, LazyTensor]) -> PackedCheckpoint:
        return _view(self.stored, tensors, self.packed)


def logical(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its packed weights dequantized on demand; itself when it has none.

    Raises UnsupportedError when its config names a quantization of which nothing was recognised.
    """
    if isinstance(checkpoint, GGUFCheckpoint):
        return _view(checkpoint, *gguf_tensors(checkpoint))
    packed: dict[str, Packed] = {}
    owner: dict[str, str] = {}  # stored name -> the weight it is part of
    for format in FORMATS:
        for item in format.find(checkpoint):
            names = [outline.name for outline in item.outlines.values()]
            if item.name in packed or any(name in owner for name in names):
                continue
            packed[item.name] = item
            owner.update((name, item.name) for name in names)
    if not packed:
        _check_recognised(checkpoint)
        return checkpoint
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.items():
        weight = owner.get(name)
        if weight is None:
            tensors[name] = tensor
        elif weight not in tensors:
            tensors[weight] = PackedTensor(packed[weight])
    return _view(checkpoint, tensors, packed)


def _view(
    checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], packed: Mapping[str, Packed]
) -> PackedCheckpoint:
    view = PackedCheckpoint(
        checkpoint.path,
        tensors,
        source=checkpoint.source,
        kind=checkpoint.kind,
        metadata=checkpoint.metadata,
        files=checkpoint.files,
        config=checkpoint.config,
        components=checkpoint.components,
    )
    view.stored = checkpoint
    view.packed = packed
    return view


def _check_recognised(checkpoint: Checkpoint) -> None:
    configs = [quantization_config(checkpoint)]
    configs += [quantization_config(checkpoint, f"{name}:") for name in checkpoint.configs]
    for config in configs:
        method = config.get("quant_method") or config.get("quant_type")
        if method:
            known = ", ".join(format.name for format in FORMATS)
            raise UnsupportedError(
                f"{checkpoint.source}: config.json says the weights are quantized ({method}), but "
                f"no packed weight was recognised. Known formats: {known}. Merge into the original "
                "and quantize the result."
            )
