"""Exact linear algebra on factors; nothing here knows of adapters or files."""

from .budget import Budget, allocate
from .factorizations import factorization
from .norms import low_rank_difference_norm, low_rank_norm, low_rank_sum_norm, truncation_gap
from .rank_rules import Chooser, RankRule, Seen, kohya_rank, noise_floor
from .rotations import (
    butterfly,
    cayley,
    cayley_neumann,
    gram_schmidt,
    half_cayley,
    householder,
    householder_linear,
    normalized_columns,
    skew_from_vector,
    skew_part,
    turn,
    turned_linear,
    within_norm,
)
from .svd import Triplet, core_svd, dense_svd, khatri_rao, kron_svd, weighted_core

__all__ = [
    "Budget",
    "Chooser",
    "RankRule",
    "Seen",
    "Triplet",
    "allocate",
    "butterfly",
    "cayley",
    "cayley_neumann",
    "core_svd",
    "dense_svd",
    "factorization",
    "gram_schmidt",
    "half_cayley",
    "householder",
    "householder_linear",
    "khatri_rao",
    "kohya_rank",
    "kron_svd",
    "low_rank_difference_norm",
    "low_rank_norm",
    "low_rank_sum_norm",
    "noise_floor",
    "normalized_columns",
    "skew_from_vector",
    "skew_part",
    "truncation_gap",
    "turn",
    "turned_linear",
    "weighted_core",
    "within_norm",
]
