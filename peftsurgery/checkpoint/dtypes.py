"""The element types of the safetensors format, and what they are in numpy and in torch.

Source: safetensors 0.8, `Dtype` (github.com/huggingface/safetensors). The narrow floats follow the
OCP Microscaling Formats specification 1.0 (2023) and, for the FNUZ pair, Noune et al. 2022,
arXiv:2206.02915.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

BITS: Mapping[str, int] = MappingProxyType(
    {
        "F64": 64,
        "I64": 64,
        "U64": 64,
        "C64": 64,
        "F32": 32,
        "I32": 32,
        "U32": 32,
        "F16": 16,
        "BF16": 16,
        "I16": 16,
        "U16": 16,
        "F8_E4M3": 8,
        "F8_E5M2": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "F8_E8M0": 8,
        "I8": 8,
        "U8": 8,
        "BOOL": 8,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "F4": 4,
    }
)

NUMPY: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype("<f8"),
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "I64": np.dtype("<i8"),
        "I32": np.dtype("<i4"),
        "I16": np.dtype("<i2"),
        "I8": np.dtype("i1"),
        "U64": np.dtype("<u8"),
        "U32": np.dtype("<u4"),
        "U16": np.dtype("<u2"),
        "U8": np.dtype("u1"),
        "BOOL": np.dtype("?"),
        "C64": np.dtype("<c8"),
    }
)

# F4 is stored by torch as two values to the element, so its last dimension is half of the file's.
TORCH_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "F4": "float4_e2m1fn_x2",
    }
)
FROM_TORCH_NAMES: Mapping[str, str] = MappingProxyType({t: n for n, t in TORCH_NAMES.items()})

# dtype: (exponent bits, mantissa bits, bias, special codes)
_NARROW = {
    "F8_E4M3": (4, 3, 7, "fn"),
    "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3FNUZ": (4, 3, 8, "fnuz"),
    "F8_E5M2FNUZ": (5, 2, 16, "fnuz"),
}
WIDENED: frozenset[str] = frozenset({"BF16", "F8_E8M0", *_NARROW})


def torch_dtype(dtype: str) -> torch.dtype | None:
    """The torch dtype of a safetensors dtype; None where this torch has none."""
    import torch

    return getattr(torch, TORCH_NAMES.get(dtype, ""), None)


@functools.cache
def float8_table(dtype: str) -> np.ndarray:
    """The 256 values of an 8-bit float, float32, indexed by the code.

    value = (-1)^s · 2^(e - bias) · (1 + m / 2^M), and (-1)^s · 2^(1 - bias) · m / 2^M for e = 0;
    E8M0 is 2^(code - 127). NaN and infinity: `ieee` keeps the whole top exponent for them, `fn`
    only the all-ones code of either sign (NaN), `fnuz` only the code of minus zero (NaN), E8M0
    only 255 (NaN).
    """
    code = np.arange(256)
    if dtype == "F8_E8M0":
        table = np.exp2(code - 127.0)
        table[255] = np.nan
        return table.astype(np.float32)
    exponent_bits, mantissa_bits, bias, special = _NARROW[dtype]
    sign = np.where(code & 0x80, -1.0, 1.0)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = np.exp2(exponent - float(bias)) * (1 + mantissa)
    table = sign * np.where(exponent > 0, normal, np.exp2(1.0 - bias) * mantissa)
    if special == "ieee":
        top = exponent == (1 << exponent_bits) - 1
        table = np.where(top, np.where(mantissa == 0, sign * np.inf, np.nan), table)
    elif special == "fn":
        table = np.where((code & 0x7F) == 0x7F, np.nan, table)
    else:
        table = np.where(code == 0x80, np.nan, table)
    return table.astype(np.float32)


def widen(raw: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values of the raw bytes `raw` (uint8, 1-D) of a dtype in WIDENED; exact."""
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return float8_table(dtype)[raw]
