"""Merge methods in the space of changes; nothing here knows of files or adapters.

Factors are never combined separately: ΣwB · ΣwA is not Σ w·BA.
"""

from .base import Chosen, Coefficients, Elementwise, Method, Option, Pair, Spectral, Stack
from .base import method_named as _named
from .coefficients import KARCHER, LINEAR, SLERP
from .elementwise import (
    BREADCRUMBS,
    BREADCRUMBS_TIES,
    DARE_LINEAR,
    DARE_TIES,
    DELLA,
    DELLA_LINEAR,
    MAGNITUDE_PRUNE,
    TIES,
)
from .sce import SCE
from .spectral import CORE_TIES, ISO_C, ISO_CTS, KNOTS, SVD, TSV

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LINEAR,
        SVD,
        TIES,
        DARE_LINEAR,
        DARE_TIES,
        DELLA,
        DELLA_LINEAR,
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        MAGNITUDE_PRUNE,
        SCE,
        SLERP,
        KARCHER,
        KNOTS,
        TSV,
        ISO_C,
        ISO_CTS,
        CORE_TIES,
    )
}


def method_named(name: str) -> Method:
    """The method of that name; UsageError lists the closest."""
    return _named(name, METHODS)


__all__ = [
    "METHODS",
    "Chosen",
    "Coefficients",
    "Elementwise",
    "Method",
    "Option",
    "Pair",
    "Spectral",
    "Stack",
    "method_named",
]
