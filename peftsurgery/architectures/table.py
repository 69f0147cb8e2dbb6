"""Reads the table of a model family from its TOML file.

    title = "…"                        what to call the family in messages
    include = ["parts/….toml"]         files whose [parts.…] may be used here
    embeddings = ["…"]                 last path segments of modules that are embeddings
    conv1d = ["…"]                     last path segments of modules with weights stored [in, out]
    pins = [{ component = "…", modules = "TEMPLATE", out = 1280, in = 768, widens = false }]

    [blocks]
    NAME = { "TEMPLATE" = 19 }         lengths of the block lists of a component

    [components.NAME]
    columns = ["HOME", "OTHER"]        vocabularies, the home one first
    rows = [...]
    identity = true                    any dotted name is a home name; rows serve flattened names
    aliases.COLUMN = { "x." = "y." }   a template that starts with x. is also read with y. instead
    prefixes = { FAMILY = ["…"] }      per layout family: the first is written, all are read
    vocabularies = { FAMILY = ["…"] }  likewise, columns

    [parts.NAME]                       rows used by name; columns that the user lacks are ignored
    columns = ["HOME", "OTHER"]
    rows = [...]

A row is one of

    "a.b"                              the same module in every column
    ["a.b", "x.y"]                     one template per column, "" where the module does not exist
    ["a.[b,c,d]", "x.y", "1:1:4"]      x.y is b, c, d stacked 1:1:4 (equal by default)
    ["a.b", "x.y", "swap_halves"]      an operator of `component.OPERATORS`
    ["a.b.weight", "x.y.scale"]        ends in weight or bias: this one parameter only
    ["a.table", "x.table", "parameter"]  a parameter that does not end so
    ["a.b", "x.y_"]                    the parameter joins with an underscore: x.y_weight
    "+NAME"                            the rows of a part
    ["a.{}", "x.{}", "+NAME"]          the same, below these paths ("" for none)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import UsageError, nearest
from .component import OPERATORS, Component, Row
from .family import Architecture, Pin
from .template import check_same_numbers, expand

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

_PROPORTIONS = re.compile(r"[1-9]\d*(:[1-9]\d*)+")


@dataclass(frozen=True)
class _Part:
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...] | str, ...]


def load(path: Path) -> Architecture:
    """The family that `path` describes; `UsageError` with file and row on a broken table."""
    data = _toml(path)
    parts: dict[str, _Part] = {}
    for source in (*(_toml(path.parent / name) for name in _strings(data, "include")), data):
        for name, table in _tables(source, "parts").items():
            parts[name] = _Part(_strings(table, "columns"), _rows(table))
    components = {
        name: _component(name, table, parts, f"{path.name}, {name}")
        for name, table in _tables(data, "components").items()
    }
    return Architecture(
        name=path.stem,
        title=str(data["title"]),
        components=components,
        pins=tuple(_pins(data)),
        blocks={
            name: {str(template): int(str(count)) for template, count in table.items()}
            for name, table in _tables(data, "blocks").items()
        },
        embeddings=frozenset(_strings(data, "embeddings")),
        conv1d=frozenset(_strings(data, "conv1d")),
    )


def _component(
    name: str, table: Mapping[str, object], parts: Mapping[str, _Part], where: str
) -> Component:
    columns = _strings(table, "columns")
    own = _Part(columns, _rows(table))
    return Component(
        name=name,
        home=columns[0],
        columns=columns,
        prefixes=_string_lists(table, "prefixes"),
        vocabularies=_string_lists(table, "vocabularies"),
        rows=tuple(_read(own, dict.fromkeys(columns, ""), parts, where, ())),
        aliases={
            column: {str(prefix): str(other) for prefix, other in alias.items()}
            for column, alias in _tables(table, "aliases").items()
        },
        identity=bool(table.get("identity", False)),
    )


def _read(
    part: _Part,
    prefixes: Mapping[str, str],
    parts: Mapping[str, _Part],
    where: str,
    above: tuple[str, ...],
) -> Iterator[Row]:
    """The rows of a part below the given path of each vocabulary, parts within it included."""
    wanted = [(i, column) for i, column in enumerate(part.columns) if column in prefixes]
    for row in part.rows:
        here = f"{where}: row {row!r}"
        if isinstance(row, str):
            templates, extras = (row,) * len(part.columns), ()
            if row.startswith("+"):
                templates, extras = ("",) * len(part.columns), (row,)
        else:
            templates, extras = row[: len(part.columns)], row[len(part.columns) :]
        if len(templates) != len(part.columns):
            raise UsageError(f"{here}: expected one template for each of {part.columns}")
        below = [extra[1:] for extra in extras if extra.startswith("+")]
        paths = {
            column: _join(prefixes[column], templates[i])
            for i, column in wanted
            if below or templates[i]
        }
        if not below:
            yield _row(paths, part.columns[0], extras, here)
        for name in below:
            if name not in parts or name in above:
                raise UsageError(
                    f"{here}: no part {name!r} to use here (closest: {nearest(name, parts)})"
                )
            yield from _read(parts[name], paths, parts, where, (*above, name))


def _row(paths: Mapping[str, str], home: str, extras: tuple[str, ...], where: str) -> Row:
    check_same_numbers(paths, where)
    columns = {column: template for column, template in paths.items() if column != home}
    parts = expand(paths[home])
    if any("[" in template for template in columns.values()):
        raise UsageError(f"{where}: only the home column may hold a group")
    proportions, operator, is_parameter = (1,) * len(parts), None, False
    for extra in extras:
        if _PROPORTIONS.fullmatch(extra):
            proportions = tuple(map(int, extra.split(":")))
        elif extra in OPERATORS:
            operator = extra
        elif extra == "parameter":
            is_parameter = True
        else:
            raise UsageError(f"{where}: {extra!r} is no proportion, operator or part")
    if len(proportions) != len(parts):
        raise UsageError(f"{where}: {len(proportions)} proportions for {len(parts)} modules")
    is_parameter = is_parameter or parts[0].endswith((".weight", ".bias"))
    return Row(parts, columns, proportions, operator, is_parameter)


def _join(prefix: str, template: str) -> str:
    return f"{prefix}.{template}" if prefix and template else prefix or template


def _pins(data: Mapping[str, object]) -> Iterator[Pin]:
    pins = data.get("pins", [])
    for pin in pins if isinstance(pins, list) else []:
        for template in expand(pin["modules"]):
            widens = bool(pin.get("widens", False))
            yield Pin(pin["component"], template, pin.get("out"), pin.get("in"), widens)


@cache
def _toml(path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error


def _tables(table: Mapping[str, object], key: str) -> Mapping[str, Mapping[str, object]]:
    value = table.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
        raise UsageError(f"{key} must hold tables, not {value!r}")
    return value


def _strings(table: Mapping[str, object], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UsageError(f"{key} must be a list of strings, not {value!r}")
    return tuple(value)


def _string_lists(table: Mapping[str, object], key: str) -> Mapping[str, tuple[str, ...]]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise UsageError(f"{key} must be a table of lists of strings, not {value!r}")
    return {name: _strings(value, name) for name in value}


def _rows(table: Mapping[str, object]) -> tuple[tuple[str, ...] | str, ...]:
    value = table.get("rows", [])
    if not isinstance(value, list):
        raise UsageError(f"rows must be a list, not {value!r}")
    return tuple(tuple(row) if isinstance(row, list) else row for row in value)
