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
        self._plain: dict[str, list[tuple[int, str, float]]] = {}  # text behind the last dot -> …
        self._regular: list[tuple[int, re.Pattern[str], float]] = []
        for order, (pattern, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(pattern):
                end = pattern.removeprefix("^").rpartition(".")[2]
                self._plain.setdefault(end, []).append((order, pattern, value))
                continue
            try:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise UsageError(
                    f"{source}: {pattern!r} in the adapter config is no regular expression: {error}"
                ) from error
            self._regular.append((order, compiled, value))
        self._lengths = sorted({len(end) for end in self._plain})

    def find(self, path: str, default: float | None) -> float | None:
        """The number of the first pattern that matches `path`, or `default`."""
        best, found = -1, default
        for length in self._lengths:
            for order, pattern, value in self._plain.get(path[-length:], ()):
                if best >= 0 and order > best:
                    break
                if _matches(pattern, path):
                    best, found = order, value
                    break
        for order, compiled, value in self._regular:
            if best >= 0 and order > best:
                break
            if compiled.match(path):
                return value
        return found


def _matches(pattern: str, path: str) -> bool:
    text = pattern.removeprefix("^")
    start = len(path) - len(text)
    if start < 0 or (start and (text is not pattern or path[start - 1] != ".")):
        return False
    tail = path[start:]
    return tail == text or all(a in (".", b) for a, b in zip(text, tail, strict=True))
