"""PEFT's rank_pattern and alpha_pattern, looked up without trying every pattern on every module."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peftsurgery.errors import UsageError

_PLAIN = re.compile(r"\^?[\w.-]*[\w-]")  # no operator but the dot, which stands for any character


_Numbered = tuple[int, float]  # place in the config, number


class Patterns:
    """pattern -> number, matched on module paths as PEFT does: `(.*\\.)?(pattern)$`, first match
    wins.

    A dynamically resized adapter has a pattern for each of a thousand modules, and compiling and
    trying a regular expression for every pair takes minutes. Patterns without operators are looked
    up by what they say beside their dots, for each way their dots lie. Raises UsageError for a
    pattern that is no regular expression.
    """

    def __init__(self, values: Mapping[str, float], source: str) -> None:
        # length -> where the dots lie -> (text without them, whole path only) -> first pattern
        self._plain: dict[int, dict[tuple[int, ...], dict[tuple[str, bool], _Numbered]]] = {}
        self._regular: list[tuple[int, re.Pattern[str], float]] = []
        for order, (pattern, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(pattern):
                text = pattern.removeprefix("^")
                dots = tuple(index for index, char in enumerate(text) if char == ".")
                alike = self._plain.setdefault(len(text), {}).setdefault(dots, {})
                alike.setdefault((_without(text, dots), text is not pattern), (order, value))
                continue
            try:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise UsageError(
                    f"{source}: {pattern!r} in the adapter config is no regular expression: {error}"
                ) from error
            self._regular.append((order, compiled, value))

    def find(self, path: str, default: float | None) -> float | None:
        """The number of the first pattern that matches `path`, or `default`."""
        best, found = -1, default
        for start in [0, *(index + 1 for index, char in enumerate(path) if char == ".")]:
            tail = path[start:]
            for dots, alike in self._plain.get(len(tail), {}).items():
                text = _without(tail, dots)
                for whole in (False, True) if start == 0 else (False,):
                    match = alike.get((text, whole))
                    if match is not None and (best < 0 or match[0] < best):
                        best, found = match
        for order, compiled, value in self._regular:
            if best >= 0 and order > best:
                break
            if compiled.match(path):
                return value
        return found


def _without(text: str, places: tuple[int, ...]) -> str:
    """The text without the characters at these places."""
    if not places:
        return text
    starts = (0, *(place + 1 for place in places))
    return "\n".join(text[a:b] for a, b in zip(starts, (*places, len(text)), strict=True))
