"""Templates of names, and the trie that finds which of them a name is an instance of.

A template is a dotted name in which the segment `{}` stands for any integer and `[a,b,c]` for each
of the listed pieces in turn. Numbers are decimal without leading zeros, so that
name -> template + numbers -> name is the identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Generic, TypeVar

from ..errors import UnsupportedError, UsageError

T = TypeVar("T")

_BRACKET = re.compile(r"\[([^\[\]]*)\]")


def expand(template: str) -> tuple[str, ...]:
    """Every name that the brackets of `template` stand for, the leftmost bracket varying slowest.

    `a.[b,c.d]` is `("a.b", "a.c.d")`. A template without brackets is returned alone.
    """
    if "[" not in template:
        return (template,)
    pieces = _BRACKET.split(template)
    options = [[p] if i % 2 == 0 else p.split(",") for i, p in enumerate(pieces)]
    return tuple("".join(choice) for choice in product(*options))


def group(names: Iterable[str]) -> str:
    """One spelling for several names with a common dotted prefix; the inverse of `expand`.

    `("a.b", "a.c.d")` is `a.[b,c.d]`; a single name is itself.
    """
    all_names = tuple(names)
    if len(all_names) == 1:
        return all_names[0]
    split = [name.split(".") for name in all_names]
    shared = 0
    while all(len(s) > shared + 1 and s[shared] == split[0][shared] for s in split):
        shared += 1
    rest = ",".join(".".join(s[shared:]) for s in split)
    return "".join(f"{segment}." for segment in split[0][:shared]) + f"[{rest}]"


def flatten(name: str) -> str:
    """The name with its dots written as underscores, as LoRA tools do. Not invertible by rule."""
    return name.replace(".", "_")


def index_flat(names: Iterable[str]) -> dict[str, str]:
    """Flattened name -> name, for an explicit list of names (the modules of a base checkpoint).

    Raises `UnsupportedError` naming both when two different names flatten alike.
    """
    found: dict[str, str] = {}
    for name in names:
        flat = flatten(name)
        if found.setdefault(flat, name) != name:
            raise UnsupportedError(
                f"{flat}: both {found[flat]!r} and {name!r} flatten to it, so a flattened adapter"
                " key cannot tell them apart. Use a layout with dotted names."
            )
    return found


def is_integer(token: str) -> bool:
    """True for "0", "7", "12"; false for "", "07", "-1" and non-ASCII digits."""
    return token.isascii() and token.isdigit() and (token[0] != "0" or token == "0")


class _Node(Generic[T]):
    __slots__ = ("any_integer", "children", "values")

    def __init__(self) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.any_integer: _Node[T] | None = None
        self.values: list[T] = []


class Trie(Generic[T]):
    """Templates over `separator`-joined tokens; `find` returns every one a name is an instance of.

    With separator "." the tokens are path segments. With "_" the templates are entered flattened,
    so a segment such as `to_q` is two tokens: segment borders are gone from the name, hence also
    from the trie, and every template that flattens to the name is found.

    Templates wait under their first token until a name begins with it: most names that are looked
    up begin like none of a vocabulary's.
    """

    def __init__(self, separator: str) -> None:
        self._separator = separator
        self._root: _Node[T] = _Node()
        self._waiting: dict[str, list[tuple[str, T]]] = {}

    def add(self, template: str, value: T) -> None:
        """Enter a template with what it stands for."""
        text = flatten(template) if self._separator == "_" else template
        first, _, rest = text.partition(self._separator)
        if first == "{}":
            self._enter(self._root, text, value)
        elif first in self._root.children:
            self._enter(self._root.children[first], rest, value)
        else:
            self._waiting.setdefault(first, []).append((rest, value))

    def _enter(self, node: _Node[T], text: str, value: T) -> None:
        for token in text.split(self._separator) if text else ():
            if token == "{}":
                if node.any_integer is None:
                    node.any_integer = _Node()
                node = node.any_integer
            else:
                child = node.children.get(token)
                if child is None:
                    child = node.children[token] = _Node()
                node = child
        node.values.append(value)

    def _grow(self, first: str) -> None:
        """Enter what waits under a token; other threads see it complete or not at all."""
        below = _Node[T]()
        for rest, value in self._waiting.get(first, ()):
            self._enter(below, rest, value)
        if first in self._waiting:
            self._root.children[first] = below
            self._waiting.pop(first, None)

    def find(self, name: str) -> list[tuple[T, tuple[str, ...]]]:
        """(value, numbers) of every template that `name` is an instance of."""
        tokens = name.split(self._separator)
        if tokens[0] in self._waiting:
            self._grow(tokens[0])
        end = len(tokens)
        found: list[tuple[T, tuple[str, ...]]] = []
        open_nodes: list[tuple[_Node[T], int, tuple[str, ...]]] = [(self._root, 0, ())]
        while open_nodes:
            node, at, numbers = open_nodes.pop()
            while True:
                if at == end:
                    found.extend((value, numbers) for value in node.values)
                    break
                token = tokens[at]
                at += 1
                if node.any_integer is not None and is_integer(token):
                    open_nodes.append((node.any_integer, at, (*numbers, token)))
                child = node.children.get(token)
                if child is None:
                    break
                node = child
        return found


def check_same_numbers(templates: Mapping[str, str], where: str) -> None:
    """Every template of a row must hold the same number of `{}`, each a whole segment."""
    counts = {column: template.count("{}") for column, template in templates.items()}
    if len(set(counts.values())) > 1:
        raise UsageError(f"{where}: the columns hold different numbers of {{}}: {dict(templates)}")
    for template in templates.values():
        if "{" in template and any("{" in s and s != "{}" for s in template.split(".")):
            raise UsageError(f"{where}: {{}} must be a whole segment in {template!r}")
