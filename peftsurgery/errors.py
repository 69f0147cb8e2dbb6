"""One family of exceptions; each class carries the exit code the command line ends with.

Exit codes: 1 a check failed, 2 usage or unreadable input, 3 unsupported, 4 unsafe input refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["info", "warning", "error"]


class PeftSurgeryError(Exception):
    """Base of every error this package raises on purpose; the message says what, where and what to
    do.
    """

    exit_code = 1


class CheckFailed(PeftSurgeryError):
    """The result did not pass its own check: keys uncovered, ΔW moved, strength lost."""

    exit_code = 1


class UsageError(PeftSurgeryError):
    """A wrong option, a missing file, a file that cannot be read as what it claims to be."""

    exit_code = 2


class UnsupportedError(PeftSurgeryError):
    """Recognised, but it cannot be done exactly, or not by this version."""

    exit_code = 3


class CannotSplit(UnsupportedError):
    """The adapter cannot be restricted to a range of output rows and stay in its own algorithm."""


class CannotFuse(UnsupportedError):
    """The adapters cannot be joined along the output axis and stay in their own algorithm."""


class CannotFit(UnsupportedError):
    """The algorithm has no projection from a general ΔW."""


class UnsafeInputError(PeftSurgeryError):
    """The file breaks a safety rule; nothing of it was used."""

    exit_code = 4


@dataclass(frozen=True)
class Finding:
    """One thing an operation noticed. `code` is a stable kebab-case word for machines."""

    level: Level
    code: str
    message: str
    key: str | None = None  # the key or module it is about
    remedy: str | None = None  # what the user can do


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """The `n` candidates most similar to `name` (difflib ratio, best first), for error messages."""
    return difflib.get_close_matches(name, list(candidates), n=n, cutoff=0.3)
