"""GPTQ (Frantar et al. 2022, arXiv:2210.17323) as AutoGPTQ, GPTQModel and auto-round store it.

`X.qweight` int32 (inputs · bits / 32, outputs): the codes of 32 / bits inputs to the word, lowest
bits first (3 bits: 32 codes run on through 3 words). `X.qzeros` (groups, outputs · bits / 32) the
same along the outputs.

Zeros: `checkpoint_format` gptq_v2 stores them as they are, gptq less one. There, 2, 4 and 8 bits
are subtracted word by word, so that a zero of 0 borrows from its neighbour, 3 bits modulo 8
(GPTQModel 7.7, utils/model.py convert_gptq_v1_to_v2_format_module). auto-round calls them
`auto_round:gptqmodel` (or `auto_round`) and `auto_round:auto_gptq`.

Made afresh, scales are plain min/max ones: there is no calibration, and `feedback` of rounding.py
with a Gram matrix is GPTQ's rounding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import bits
from peftsurgery.quantizers.input_groups import InputGroups, width
from peftsurgery.quantizers.packed import Packed

MINUS_ONE = {  # format of a config -> zeros are stored less one
    "gptq": True,
    "gptq_v2": False,
    "auto_round:auto_gptq": True,
    "auto_round:gptq": True,
    "auto_round:gptqmodel": False,
    "auto_round": False,
}


class GPTQ(InputGroups):
    name = "gptq"
    title = "GPTQ"
    packs_inputs = True

    def settings(self, where: str, config: Mapping[str, object]) -> dict[str, object]:
        method = str(config.get("quant_method", "gptq"))
        if "round" in method:
            said = config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq"
        else:
            said = config.get("checkpoint_format") or config.get("format") or "gptq"
        if said not in MINUS_ONE:
            raise UnsupportedError(
                f"{where}: the format {said!r} of GPTQ is not known; expected one of "
                f"{sorted(MINUS_ONE)}. Take the checkpoint it was made from."
            )
        return {"minus_one": MINUS_ONE[str(said)]}

    def codes(self, packed: Packed, start: int, stop: int) -> Tensor:
        words = packed.whole("weight")[:, start:stop].T
        return bits.unpack_words(words, width(packed), packed.columns)

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        words = bits.pack_words(codes, width(packed))
        return {"weight": words.T.contiguous()}

    def zeros(self, packed: Packed, words: Tensor) -> Tensor:
        size, outputs = width(packed), packed.shape[0]
        if not packed.fields["minus_one"]:
            return bits.unpack_words(words, size, outputs)
        if size == 3:
            return (bits.unpack_words(words, size, outputs) + 1) & 7
        return bits.unpack_words(words + _ones(size), size, outputs)

    def pack_zeros(self, packed: Packed, zeros: Tensor) -> Tensor:
        size = width(packed)
        if not packed.fields["minus_one"]:
            return bits.pack_words(zeros, size)
        if size == 3:
            return bits.pack_words((zeros + 7) & 7, size)
        return bits.pack_words(zeros, size) - _ones(size)

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """options: bits (4 or 8), group (128; -1: whole rows), symmetric (True)."""
        settings = _options(options)
        return self.outlines_of(name, shape, native, **settings)

    def config(self, **options: object) -> dict[str, object]:
        settings = _options(options)
        skip = cast("list[str] | None", options.get("skip"))
        found: dict[str, object] = {
            "quant_method": "gptq",
            "bits": settings["bits"],
            "group_size": settings["group"],
            "sym": settings["symmetric"],
            "desc_act": False,
            "true_sequential": True,
            "lm_head": False,
            "checkpoint_format": "gptq" if settings["symmetric"] else "gptq_v2",
            "pack_dtype": "int32",
            "meta": {"quantizer": ["peftsurgery"]},
        }
        if skip:  # GPTQModel leaves modules alone whose name matches a pattern behind "-:"
            found["dynamic"] = {rf"-:(.*\.)?{re.escape(part)}$": {} for part in skip}
        return found


def _options(options: Mapping[str, object]) -> dict[str, object]:
    size = options.get("bits", 4)
    if size not in (4, 8):
        raise UsageError(f"GPTQ: {size} bits; 4 or 8 were expected.")
    group, symmetric = options.get("group", 128), options.get("symmetric", True)
    return {"bits": size, "group": group, "symmetric": bool(symmetric)}


def _ones(size: int) -> Tensor:
    """A word with 1 in each of its codes."""
    return bits.pack_words(torch.ones(32 // size, dtype=torch.uint8), size)
