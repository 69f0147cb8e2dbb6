"""`Report`: the plain record every operation returns; its renderers are the files beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeAlias

from peftsurgery.errors import Finding, Level

SCHEMA_VERSION = 1

Value: TypeAlias = str | int | float | bool | None
Row: TypeAlias = dict[str, Value]


class Progress(Protocol):
    """What an operation calls while it works; `done` and `total` share one unit."""

    def __call__(self, done: int, total: int, label: str = "") -> None:
        """`done` of `total` are finished; `label` is a short word such as "tensors" or a key."""
        ...


@dataclass(frozen=True)
class Report:
    """The outcome of one operation, made of plain values only.

    The fields cannot be rebound, but the lists and dicts may be filled while the operation runs.
    Subclasses (one per operation) may add fields; what is to be shown goes into the fields here.
    """

    operation: str
    ok: bool = True
    summary: dict[str, Value] = field(default_factory=dict)  # header: label -> value
    findings: list[Finding] = field(default_factory=list)
    modules: list[Row] = field(default_factory=list)  # columns = keys of the first row
    tables: dict[str, list[Row]] = field(default_factory=dict)  # "blocks", "files", "plan", …
    inputs: dict[str, str] = field(default_factory=dict)  # path -> sha256
    outputs: list[str] = field(default_factory=list)  # paths written

    @property
    def exit_code(self) -> int:
        """0 when `ok`, else 1 (a check failed); the other codes belong to errors."""
        return 0 if self.ok else 1

    def count(self, level: Level) -> int:
        """Number of findings of one level."""
        return sum(finding.level == level for finding in self.findings)

    def to_dict(self) -> dict[str, object]:
        """Plain dicts and lists, ready for JSON, with `schema_version` 1 and the exit code."""
        return {
            "schema_version": SCHEMA_VERSION,
            "operation": self.operation,
            "ok": self.ok,
            "exit_code": self.exit_code,
            "summary": dict(self.summary),
            "findings": [asdict(finding) for finding in self.findings],
            "modules": [dict(row) for row in self.modules],
            "tables": {name: [dict(row) for row in rows] for name, rows in self.tables.items()},
            "inputs": dict(self.inputs),
            "outputs": list(self.outputs),
        }

    def __str__(self) -> str:
        """The plain table, as a pipe would get it."""
        from peftsurgery.reports.table import render

        return render(self)


def columns_of(rows: Iterable[Mapping[str, Value]]) -> list[str]:
    """Column names of a table: the keys of its first row, in order."""
    return list(next(iter(rows), {}))
