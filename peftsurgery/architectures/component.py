"""One component of a model family: its rows, read in every direction.

A row pairs a home module (or a group of them, stacked along the output axis) with one module of
every other vocabulary. From the rows alone follow both directions, for module names (adapters) and
for tensor names (base checkpoints), dotted or flattened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from ..errors import UnsupportedError, UsageError, nearest
from .template import Trie, expand, flatten, group

OPERATORS = ("swap_halves", "transpose")
_MAIN_PARAMETERS = ("weight", "scale", "gamma")  # what the weight of a norm is called


@dataclass(frozen=True)
class Site:
    """A module as one vocabulary names it, and the home modules it consists of.

        weight(name) = operator(concat(weight(part) for part in parts, axis 0))

    Each operator is its own inverse.
    """

    column: str
    name: str  # dotted, as it stands in the file
    parts: tuple[str, ...]  # home module paths, in row order
    proportions: tuple[int, ...] = (1,)  # relative row counts of the parts
    operator: str | None = None  # "swap_halves" (of the rows) | "transpose"

    @property
    def home(self) -> str:
        """The home path; of a fused module the group, `attn.[to_q,to_k,to_v]`."""
        return group(self.parts)

    def row_ranges(self, rows: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each part within a fused tensor of that many rows.

        Raises `UsageError` when the proportions do not divide the rows.
        """
        unit, rest = divmod(rows, sum(self.proportions))
        if rest:
            shares = ":".join(map(str, self.proportions))
            raise UsageError(
                f"{self.name}: {rows} rows cannot be cut {shares} into {', '.join(self.parts)}."
                " Check --architecture and the shape of the tensor."
            )
        ends = [unit * share for share in accumulate(self.proportions)]
        return tuple(zip([0, *ends[:-1]], ends, strict=True))


@dataclass(frozen=True)
class TensorSite(Site):
    """A tensor of a base checkpoint; `parts` are home tensor names."""

    parameter: str = "weight"  # last part of the home names: "weight", "bias", …


@dataclass(frozen=True)
class Row:
    """One row, brackets expanded: templates of the home side and of the other vocabularies."""

    home: tuple[str, ...]
    columns: Mapping[str, str]  # only the vocabularies that have this module
    proportions: tuple[int, ...]
    operator: str | None = None
    is_parameter: bool = False  # the templates name one parameter, not a module


@dataclass(frozen=True)
class _Entry:
    """A row as one vocabulary sees it. A parameter row has no joint, a bias row no module."""

    module: str | None
    parts: tuple[str, ...]  # home modules
    tensor: str | None
    tensor_parts: tuple[str, ...]
    joint: str | None  # between module and parameter: "." or "_"
    proportions: tuple[int, ...]
    operator: str | None

    @classmethod
    def of(cls, row: Row, column: str) -> _Entry:
        return cls._of(row.columns[column], row.home, row, row.proportions, row.operator)

    @classmethod
    def of_home(cls, row: Row, template: str) -> _Entry:
        return cls._of(template, (template,), row, (1,), None)

    @classmethod
    def _of(
        cls,
        template: str,
        home: tuple[str, ...],
        row: Row,
        proportions: tuple[int, ...],
        operator: str | None,
    ) -> _Entry:
        if row.is_parameter:
            module = None if home[0].endswith(".bias") else _module_of(template)
            modules = tuple(map(_module_of, home))
            return cls(module, modules, template, home, None, proportions, operator)
        joint = "_" if template.endswith("_") else "."
        return cls(template.removesuffix("_"), home, None, (), joint, proportions, operator)


def _module_of(parameter: str) -> str:
    """The module of a parameter template; a parameter outside any module is its own."""
    module, _, last = parameter.rpartition(".")
    return module if module and last in _MAIN_PARAMETERS else parameter


def _spelling(entry: _Entry, numbers: tuple[str, ...]) -> str:
    return (entry.module or entry.tensor or "").format(*numbers)


def _fill(templates: tuple[str, ...], numbers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple([template.format(*numbers) for template in templates])


@dataclass(frozen=True)
class Component:
    """A part of a pipeline with weights of its own, and the vocabularies that name its modules.

    Every look-up returns None for a name the table does not know, and raises `UnsupportedError`
    naming both candidates for a name that stands for two different modules.
    """

    name: str  # "unet", "transformer", "text_encoder", …
    home: str  # the home vocabulary; the first of `columns`
    columns: tuple[str, ...]
    prefixes: Mapping[str, tuple[str, ...]]  # layout family -> prefixes: first written, all read
    vocabularies: Mapping[str, tuple[str, ...]]  # layout family -> columns: first written, all read
    rows: tuple[Row, ...] = field(repr=False)
    aliases: Mapping[str, Mapping[str, str]] = field(
        default_factory=dict
    )  # column -> prefix -> other
    identity: bool = False  # any dotted name is a home name
    _built: dict[tuple[str, str], Trie[_Entry]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def site(self, column: str, dotted_name: str) -> Site | None:
        """The site of a module name of the vocabulary `column`."""
        if self._is_open(column):
            return (
                Site(column, dotted_name, (dotted_name,)) if all(dotted_name.split(".")) else None
            )
        found = self._find(column, "module", dotted_name)
        if found is None:
            return None
        entry, numbers = found
        return self._site(column, dotted_name, entry, numbers)

    def site_flat(self, column: str, flat_name: str) -> Site | None:
        """The site of a module name whose dots were written as underscores."""
        found = self._find(column, "flat", flat_name)
        if found is None:
            return None
        entry, numbers = found
        return self._site(column, _spelling(entry, numbers), entry, numbers)

    def site_of(self, column: str, home_path: str) -> Site | None:
        """The site of the vocabulary `column` that contains a home module.

        `home_path` may be a group, `attn.[to_q,to_k,to_v]`; then the site must be exactly these.
        """
        paths = expand(home_path)
        if self._is_open(column):
            return self.site(column, home_path) if len(paths) == 1 else None
        found = self._find(column, "module_of", paths[0])
        if found is None:
            return None
        entry, numbers = found
        site = self._site(column, _spelling(entry, numbers), entry, numbers)
        return site if len(paths) == 1 or site.parts == paths else None

    def tensor(self, column: str, tensor_name: str) -> TensorSite | None:
        """The site of a tensor name of a base checkpoint in the vocabulary `column`."""
        if self._is_open(column):
            if not all(tensor_name.split(".")):
                return None
            parameter = tensor_name.rpartition(".")[2]
            return TensorSite(column, tensor_name, (tensor_name,), parameter=parameter)
        found = self._find(column, "tensor", tensor_name)
        if found is not None:
            entry, numbers = found
            parts = _fill(entry.tensor_parts, numbers)
            return _tensor_site(column, tensor_name, parts, entry)
        for joint in ".", "_":
            module, _, parameter = tensor_name.rpartition(joint)
            if not module or "." in parameter:
                continue
            found = self._find(column, "module", module)
            if found is not None and found[0].joint == joint:
                entry, numbers = found
                parts = tuple(f"{part}.{parameter}" for part in _fill(entry.parts, numbers))
                return _tensor_site(column, tensor_name, parts, entry)
        return None

    def tensor_of(self, column: str, home_tensor: str) -> TensorSite | None:
        """The site of the vocabulary `column` with a home tensor in it; inverse of `tensor`."""
        if self._is_open(column):
            return self.tensor(column, home_tensor)
        found = self._find(column, "tensor_of", home_tensor)
        if found is not None:
            entry, numbers = found
            parts = _fill(entry.tensor_parts, numbers)
            return _tensor_site(column, (entry.tensor or "").format(*numbers), parts, entry)
        module, _, parameter = home_tensor.rpartition(".")
        found = self._find(column, "module_of", module)
        if found is not None and found[0].joint is not None:
            entry, numbers = found
            name = f"{_spelling(entry, numbers)}{entry.joint}{parameter}"
            parts = tuple(f"{part}.{parameter}" for part in _fill(entry.parts, numbers))
            return _tensor_site(column, name, parts, entry)
        return None

    def templates(self, column: str) -> tuple[str, ...]:
        """The module templates of a vocabulary, in table order."""
        return tuple(e.module for e in self._entries(column) if e.module is not None)

    def closest(self, column: str, name: str, *, flat: bool = False, n: int = 3) -> list[str]:
        """The module names most like `name`, with 0 for every free number; for error messages."""
        names = (template.replace("{}", "0") for template in self.templates(column))
        return nearest(name, map(flatten, names) if flat else names, n)

    def _find(self, column: str, kind: str, name: str) -> tuple[_Entry, tuple[str, ...]] | None:
        trie = self._built.get((column, kind))
        if trie is None:
            trie = self._built[column, kind] = self._build(column, kind)
        matches = trie.find(name)
        if len(matches) > 1:
            first, second = (_spelling(entry, numbers) for entry, numbers in matches[:2])
            raise UnsupportedError(
                f"{name}: in {self.name} it stands for both {first!r} and {second!r}. Pass --base"
                " so that the module list of the base decides, or use a layout with dotted names."
            )
        return matches[0] if matches else None

    def _is_open(self, column: str) -> bool:
        return self.identity and column == self.home

    def _build(self, column: str, kind: str) -> Trie[_Entry]:
        trie: Trie[_Entry] = Trie("_" if kind == "flat" else ".")
        seen: set[str] = set()
        for entry in self._entries(column):
            if kind == "module_of":
                keys = entry.parts if entry.module is not None else ()
            elif kind == "tensor_of":
                keys = entry.tensor_parts
            else:
                keys = tuple(
                    self._read_as(column, entry.tensor if kind == "tensor" else entry.module)
                )
            for key in keys:
                if key in seen:
                    raise UsageError(
                        f"{self.name}: {key!r} stands in two rows of {column!r}; remove one."
                    )
                seen.add(key)
                trie.add(key, entry)
        return trie

    def _entries(self, column: str) -> Iterator[_Entry]:
        if column not in self.columns:
            raise UsageError(
                f"{self.name} has no vocabulary {column!r}; it has {', '.join(self.columns)}."
            )
        seen: set[str] = set()
        for row in self.rows:
            if column != self.home:
                if column in row.columns:
                    yield _Entry.of(row, column)
                continue
            for template in row.home:
                if template not in seen:
                    seen.add(template)
                    yield _Entry.of_home(row, template)

    def _read_as(self, column: str, template: str | None) -> Iterator[str]:
        if template is None:
            return
        yield template
        for prefix, other in self.aliases.get(column, {}).items():
            if template.startswith(prefix):
                yield other + template.removeprefix(prefix)

    def _site(self, column: str, name: str, entry: _Entry, numbers: tuple[str, ...]) -> Site:
        parts = _fill(entry.parts, numbers)
        return Site(column, name, parts, entry.proportions, entry.operator)


def _tensor_site(column: str, name: str, parts: tuple[str, ...], entry: _Entry) -> TensorSite:
    parameter = parts[0].rpartition(".")[2]
    return TensorSite(column, name, parts, entry.proportions, entry.operator, parameter)
