"""JSON from strangers: size-capped, UTF-8, no key twice in one object, no depth or digit bombs."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

from peftsurgery.errors import UnsafeInputError, UsageError


def shown(name: str, limit: int = 120) -> str:
    """A name for a message: quoted, escaped to ASCII, cut to `limit` characters."""
    return ascii(name if len(name) <= limit else name[:limit] + "...")


def parse(
    raw: bytes,
    *,
    where: str,
    parse_int: Callable[[str], int] = int,
    constants: bool = True,
) -> object:
    """The value of the JSON text `raw`.

    `constants`: NaN and Infinity are accepted, as Python's own writer emits them. `where` opens
    every message.
    Raises UnsafeInputError for text that is not UTF-8, not JSON, nested too deep, or repeats a key.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise UnsafeInputError(
                        f"{where}: the key {shown(key)} occurs twice in one JSON object; readers "
                        "would disagree about which one counts. Write the file again with every "
                        "key once."
                    )
                seen.add(key)
        return result

    def constant(text: str) -> float:
        if constants:
            return float(text)
        raise UnsafeInputError(f"{where}: {text} is not JSON")

    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=parse_int,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        raise UnsafeInputError(f"{where}: not valid UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise UnsafeInputError(f"{where}: the JSON is nested too deep") from error
    except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
        raise UnsafeInputError(f"{where}: not valid JSON: {error}") from error


def read(path: Path, *, limit: int) -> dict[str, object]:
    """The JSON object in `path`, a regular file of at most `limit` bytes.

    Raises UsageError for a missing or unreadable file, UnsafeInputError for what `parse` refuses,
    for a file over the limit and for JSON that is not an object.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path}: not a regular file")
        if status.st_size > limit:
            raise UnsafeInputError(
                f"{path}: {status.st_size} bytes of JSON, at most {limit} are read "
                "(Limits.json_bytes)"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    value = parse(raw, where=str(path))
    if not isinstance(value, dict):
        raise UnsafeInputError(f"{path}: a JSON object was expected, found {type(value).__name__}")
    return value
