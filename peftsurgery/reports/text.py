"""Text of untrusted names and of numbers, the same on the terminal and in HTML."""

from __future__ import annotations

import math
import unicodedata

from peftsurgery.reports.base import Value

_BYTES = ("bytes", "size")  # a column so named, or ending in "_" or " " and this word, holds bytes
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def clean(text: str) -> str:
    r"""`text` with everything that could steer a terminal written as a visible escape.

    Control characters (C0, DEL, C1: ANSI sequences start with one), format characters (among
    them the bidirectional overrides), line and paragraph separators and lone surrogates become
    `\x1b`, `\u202e`, …; printable text in any script is left alone.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(char) if _hidden(char) else char for char in text)


def _hidden(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _visible(char: str) -> str:
    code = ord(char)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def number(value: float) -> str:
    """A float to four significant digits: 0.9983, 12.5, 1.2e-7, nan, inf."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def size(count: float) -> str:
    """A number of bytes in decimal units: 512 B, 3.4 MB, 24 GB."""
    for unit in _UNITS:
        if abs(count) < 999.5 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.5 else f"{count:.2g} {unit}"


def value(content: Value, column: str = "") -> str:
    """One cell. `column` tells bytes from plain integers ("bytes", "size", "peak_bytes", …)."""
    if content is None:
        return "-"
    if isinstance(content, bool):
        return "yes" if content else "no"
    if isinstance(content, str):
        return clean(content)
    if is_bytes(column):
        return size(content)
    return str(content) if isinstance(content, int) else number(content)


def is_bytes(column: str) -> bool:
    """Whether a column of this name holds numbers of bytes."""
    words = column.lower().replace("_", " ").split()
    return bool(words) and words[-1] in (*_BYTES, "nbytes")


def heading(name: str) -> str:
    """A column, table or summary name for people: underscores become spaces."""
    return clean(name).replace("_", " ")
