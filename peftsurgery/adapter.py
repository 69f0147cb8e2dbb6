"""`Adapter`: the canonical form between any two layouts.

Modules are addressed as `component:dotted.path` in the family's home vocabulary. A record that
could not be split at a fused boundary stays on its group,
`component:blocks.0.attn.[to_q,to_k,to_v]`, and one whose row operator could not be undone keeps the
operator's name, `component:norm_out.linear~swap_halves`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from peftsurgery.algorithms import WeightAdapter
from peftsurgery.architectures import expand
from peftsurgery.errors import Finding


@dataclass
class Adapter:
    """One file's worth of learned change. Modules may hold different algorithms."""

    modules: dict[str, WeightAdapter]
    architecture: str
    layout: str = ""
    extras: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # carried as they are: key -> tensor
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)  # adapter_config.json it came with
    parameters: dict[str, str] = field(default_factory=dict)  # path -> name of a replaced parameter
    findings: list[Finding] = field(default_factory=list)
    magnitude_ndim: dict[str, int] = field(default_factory=dict)  # path -> of a dora_scale > 2-D

    @property
    def components(self) -> tuple[str, ...]:
        """Components that have at least one module, in order of appearance."""
        return tuple(dict.fromkeys(path.partition(":")[0] for path in self.modules))

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Algorithms in use, in order of appearance."""
        return tuple(dict.fromkeys(m.algorithm for m in self.modules.values()))

    def of(self, component: str) -> dict[str, WeightAdapter]:
        """Modules of one component: dotted path -> adapter."""
        start = component + ":"
        return {p[len(start) :]: m for p, m in self.modules.items() if p.startswith(start)}


def is_group(path: str) -> bool:
    """Whether a path names several modules at once, or keeps an operator."""
    return "[" in path or "~" in path


def members(path: str) -> tuple[str, ...]:
    """The home modules a path stands for: `("a.q", "a.k")` of `"a.[q,k]"`; an operator mark is
    dropped.
    """
    return expand(path.partition("~")[0])
