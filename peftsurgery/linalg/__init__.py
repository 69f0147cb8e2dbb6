"""Exact linear algebra on factors; nothing here knows of adapters or files."""

from .factorizations import factorization
from .norms import low_rank_difference_norm, low_rank_norm
from .rank_rules import RankRule
from .svd import Triplet, core_svd, dense_svd, khatri_rao, kron_svd

__all__ = [
    "RankRule",
    "Triplet",
    "core_svd",
    "dense_svd",
    "factorization",
    "khatri_rao",
    "kron_svd",
    "low_rank_difference_norm",
    "low_rank_norm",
]
