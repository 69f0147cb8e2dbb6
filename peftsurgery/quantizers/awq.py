"""AWQ, the GEMM layout (Lin et al. 2023, arXiv:2306.00978; AutoAWQ, modules/linear/gemm.py).

`X.qweight` int32 (inputs, outputs / 8): 4-bit codes of eight outputs to the word, from the lowest
bits up those of outputs 0, 2, 4, 6, 1, 3, 5, 7; `X.qzeros` (groups, outputs / 8) the same;
`X.scales` (groups, outputs) fp16.

AWQ quantizes W·diag(s) and divides the operation before by s, so that

    W_awq = W · diag(s),    x_awq = x / s

and a change ΔW = B·A trained on the unquantized model is ΔW·diag(s) here: A' = A·diag(s). The
functions below estimate s from the two models.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftsurgery.errors import UnsupportedError, UsageError
from peftsurgery.quantizers import bits
from peftsurgery.quantizers.input_groups import InputGroups
from peftsurgery.quantizers.packed import Packed

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output of a word's every code, lowest bits first
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # its inverse
MISFIT = 0.5  # of ‖W‖: no rounding to 4 bits is as far off


class AWQ(InputGroups):
    name = "awq"
    title = "AWQ (GEMM)"
    packs_inputs = False

    def input_scales(self, packed: Packed, original: Tensor) -> Tensor:
        return input_scales_of_layer(original, packed.dequantize())

    def settings(self, where: str, config: Mapping[str, object]) -> dict[str, object]:
        if config.get("bits", 4) != 4 and "quant_method" in config:
            raise UnsupportedError(f"{where}: AWQ of {config['bits']} bits; 4 was expected.")
        return {"minus_one": False}

    def codes(self, packed: Packed, start: int, stop: int) -> Tensor:
        first = start // 8
        words = packed.whole("weight")[:, first : -(-stop // 8)]
        codes = _unpacked(words)
        return codes[:, start - first * 8 : stop - first * 8].T.contiguous()

    def pack(self, packed: Packed, codes: Tensor) -> dict[str, Tensor]:
        return {"weight": _packed(codes.T)}

    def zeros(self, packed: Packed, words: Tensor) -> Tensor:
        return _unpacked(words)

    def pack_zeros(self, packed: Packed, zeros: Tensor) -> Tensor:
        return _packed(zeros)

    def fresh(self, name: str, shape: tuple[int, ...], native: str, **options: object) -> Packed:
        """Plain min/max scales and zeros, s = 1. options: group (128; -1: whole rows)."""
        group = options.get("group", 128)
        return self.outlines_of(name, shape, native, bits=4, group=group, symmetric=False)

    def config(self, **options: object) -> dict[str, object]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": options.get("group", 128),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": options.get("skip"),
        }


def _unpacked(words: Tensor) -> Tensor:
    """Words (n, outputs / 8) -> codes (n, outputs)."""
    codes = bits.unpack_words(words, 4, words.shape[1] * 8)
    return codes.reshape(len(words), -1, 8)[..., list(PLACE)].flatten(1)


def _packed(codes: Tensor) -> Tensor:
    return bits.pack_words(codes.reshape(len(codes), -1, 8)[..., list(ORDER)].flatten(1), 4)


def input_scales_of_norm(original: Tensor, scaled: Tensor, *, offset: float = 0.0) -> Tensor:
    """s (channels,) fp32 of the layers that follow a norm: s = (g + c) / (g_awq + c).

    original, scaled: the norm's weight g in the unquantized model and in AWQ's, (channels,).
    offset: c, 1 for a norm that multiplies by 1 + g (Gemma). A channel that is 0 in both has s = 1.
    UsageError where the two do not belong together: other shapes, NaN, s ≤ 0; a gain that its
    dtype rounds to nothing beside c gives s ≤ 0 too, and `input_scales_of_layer` does not.
    """
    _check_shapes(original, scaled, 1)
    above, below = original.float() + offset, scaled.float() + offset
    return _positive(torch.where((above == 0) & (below == 0), 1.0, above / below))


def input_scales_of_linear(
    original: Tensor, scaled: Tensor, *, inputs: Tensor | None = None
) -> Tensor:
    """s (outputs,) fp32 of the layers that follow a linear one, whose rows AWQ divides by s.

    original: W (outputs, n) in the unquantized model; scaled: in AWQ's, dequantized; inputs: s of
    this layer's own inputs (n,), 1 by default. With R = W·diag(inputs), a row of `scaled` is
    R / s and an error of rounding; least squares give

        s_o = ‖R_o‖² / ⟨R_o, scaled_o⟩

    and 1 for a row of zeros. Where AWQ scaled the last rows only (a fused q, k, v: those of v),
    give these. UsageError where the two do not belong together: other shapes, NaN, s ≤ 0, or what
    is left over is more than half of `scaled`.
    """
    _check_shapes(original, scaled, 2)
    wanted = original.float()
    if inputs is not None:
        wanted = wanted * inputs.float()
    return _positive(_regression(wanted, scaled.float()))


def input_scales_of_layer(original: Tensor, scaled: Tensor) -> Tensor:
    """s (inputs,) fp32 from the layer itself, for when the operation before is not known:

        s_i = ⟨W_:i, W_awq:i⟩ / ‖W_:i‖²

    original: W (outputs, inputs); scaled: W_awq, dequantized. The error of rounding averages out
    over the outputs. UsageError as above.
    """
    _check_shapes(original, scaled, 2)
    return 1 / _positive(_regression(original.float().T, scaled.float().T))


def _regression(wanted: Tensor, scaled: Tensor) -> Tensor:
    norms, product = wanted.square().sum(1), (wanted * scaled).sum(1)
    empty = norms == 0
    found = torch.where(empty, 1.0, norms / torch.where(empty, 1.0, product))
    left = torch.linalg.vector_norm(scaled - wanted / found[:, None])
    if bool(left > MISFIT * torch.linalg.vector_norm(scaled)):
        raise UsageError(
            "AWQ's input scales: the two weights do not belong together, no scale of the channels "
            "makes one of the other. Give the model that was quantized."
        )
    return found


def _check_shapes(original: Tensor, scaled: Tensor, dimensions: int) -> None:
    if original.shape != scaled.shape or original.ndim != dimensions:
        raise UsageError(
            f"AWQ's input scales: shapes {list(original.shape)} and {list(scaled.shape)}; two of "
            f"one shape of {dimensions} dimensions were expected. Give the model that was "
            "quantized."
        )


def _positive(scales: Tensor) -> Tensor:
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise UsageError(
            "AWQ's input scales: some are not finite and greater than 0, so the two weights do not "
            "belong together. Give the model that was quantized."
        )
    return scales
