"""PEFT's rank_pattern and alpha_pattern, looked up without trying every pattern on every module."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peftsurgery.errors import UsageError

_PLAIN = re.compile(r"\^?[\w.-]*[\w-]")  # no operator but the dot, which stands for any character


class Patterns:
    """pattern -> number, matched on module paths as PEFT does: `(.*\\.)?(pattern)$`, first match
    wins.

    A dynamically resized adapter has a pattern for each of a thousand modules, and compiling and
    trying a regular expression for every pair takes minutes. Patterns without operators are
    therefore compared as text, and only those that end like the path. Raises UsageError for a
    pattern that is no regular expression.
    """

    def __init__(self, values: Mapping[str, float], source: str) -> None:
        # (length, text behind the last dot) -> patterns without operators
        self._plain: dict[tuple[int, str], list[tuple[int, str, float]]] = {}
        self._regular: list[tuple[int, re.Pattern[str], float]] = []
        for order, (pattern, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(pattern):
                text = pattern.removeprefix("^")
                place = (len(text), text.rpartition(".")[2])
                self._plain.setdefault(place, []).append((order, pattern, value))
                continue
            try:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise UsageError(
                    f"{source}: {pattern!r} in the adapter config is no regular expression: {error}"
                ) from error
            self._regular.append((order, compiled, value))
        self._ends = sorted({len(end) for _, end in self._plain})

    def find(self, path: str, default: float | None) -> float | None:
        """The number of the first pattern that matches `path`, or `default`."""
        best, found = -1, default
        for start in [0, *(index + 1 for index, char in enumerate(path) if char == ".")]:
            tail = path[start:]
            for length in self._ends:
                for order, pattern, value in self._plain.get((len(tail), tail[-length:]), ()):
                    if best >= 0 and order > best:
                        break
                    if _matches(pattern, tail, whole=start == 0):
                        best, found = order, value
                        break
        for order, compiled, value in self._regular:
            if best >= 0 and order > best:
                break
            if compiled.match(path):
                return value
        return found


def _matches(pattern: str, tail: str, *, whole: bool) -> bool:
    text = pattern.removeprefix("^")
    if text is not pattern and not whole:
        return False
    return tail == text or all(a in (".", b) for a, b in zip(text, tail, strict=True))
