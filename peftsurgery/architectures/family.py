"""A model family: its components, and the facts that tell it from another with the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .component import Component
from .template import Trie, is_integer


class Pin(NamedTuple):
    """What the shape of a home module must be in this family; None leaves a dimension open."""

    component: str
    template: str
    out: int | None
    in_: int | None
    widens: bool = False  # an adapter may ask for more inputs: the weight is zero-padded to them


@dataclass(frozen=True)
class Architecture:
    """One model family."""

    name: str
    title: str
    components: Mapping[str, Component]
    pins: tuple[Pin, ...] = ()
    blocks: Mapping[str, Mapping[str, int]] = field(
        default_factory=dict
    )  # component -> list -> len
    embeddings: frozenset[str] = frozenset()  # last path segments of modules that are embeddings
    conv1d: frozenset[str] = frozenset()  # last path segments of weights stored as [in, out]
    _built: dict[str, Trie[Pin]] = field(default_factory=dict, repr=False, compare=False)

    def pin(self, component: str, home_path: str) -> Pin | None:
        """The pinned shape of a home module, if the table gives one."""
        trie = self._built.get(component)
        if trie is None:
            trie = self._built[component] = Trie(".")
            for pin in self.pins:
                if pin.component == component:
                    trie.add(pin.template, pin)
        found = trie.find(home_path)
        return found[0][0] if found else None

    def misfit(
        self, component: str, home_path: str, out: int | None = None, in_: int | None = None
    ) -> str | None:
        """Why a home module of that shape cannot be of this family; None when it may be.

        `out` and `in_` are the first two dimensions of the weight, None where they are not known.
        """
        pin = self.pin(component, home_path)
        if pin is not None:
            for what, found, wanted in ("out", out, pin.out), ("in", in_, pin.in_):
                if found is None or wanted is None or found == wanted:
                    continue
                if not (what == "in" and pin.widens and found > wanted):
                    return f"{home_path}: {what} {found}, but {wanted} in {self.title}"
        path = home_path.split(".")
        for template, count in self.blocks.get(component, {}).items():
            head = template.split(".")
            if len(path) <= len(head) or not is_integer(path[len(head)]):
                continue
            if int(path[len(head)]) < count:
                continue
            same = all(
                t == p or (t == "{}" and is_integer(p)) for t, p in zip(head, path, strict=False)
            )
            if same:
                return f"{home_path}: {self.title} has {count} {template}"
        return None
