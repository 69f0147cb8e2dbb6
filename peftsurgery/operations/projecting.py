"""From what a fine-tune changed to the modules of an adapter, as the layout to be written allows.

Weights are projected onto the algorithm; vectors, grown tensors and biases become differences or
new values, whichever the layout has keys for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.adapter import members
from peftsurgery.algorithms import Common, Full, LoKr, LoRA, Replace, WeightAdapter
from peftsurgery.architectures import Architecture
from peftsurgery.codec import BaseWeights
from peftsurgery.codec.labelling import vocabulary
from peftsurgery.errors import CannotSplit, CheckFailed, UnsupportedError, UsageError
from peftsurgery.layouts import Dialect, Layout, dialect_of
from peftsurgery.linalg import RankRule, factorization
from peftsurgery.linalg.kronecker import Kronecker, kronecker_choices, nearest_kronecker
from peftsurgery.linalg.randomized import randomized_svd
from peftsurgery.operations.changes import Change
from peftsurgery.operations.differences import Difference, Stack

ALGORITHMS = ("lora", "lokr", "full")
CUTS = 12  # of a LoKr, tried where the most exact one is asked for
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Wanted:
    """What to project onto."""

    layout: Layout
    algorithm: str
    rule: RankRule | None
    factor: int | None = -1  # None: the most exact cut of each weight
    dtype: torch.dtype | None = None  # None: that of TUNED's tensor
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """Changes that become one record: of one module, or of those that a layout stores as one."""

    path: str  # `component:path`, a group for several
    changes: tuple[Change | int, ...]  # in row order; an int is that many rows without a change
    also: str | None = None  # a tied head that gets the same record

    @property
    def source(self) -> Difference | Stack:
        """TUNED - BASE of the weight."""
        if len(self.changes) == 1:
            assert isinstance(self.changes[0], Change)
            return self.changes[0].differing["weight"]
        parts = (c if isinstance(c, int) else c.differing["weight"] for c in self.changes)
        return Stack(tuple(parts))

    @property
    def only(self) -> Change:
        """The one change of a job that is not a group."""
        assert isinstance(self.changes[0], Change)
        return self.changes[0]


@dataclass(frozen=True)
class Projected:
    """The modules of one job and, for a projected weight, the squared norm and what is kept."""

    modules: dict[str, WeightAdapter]
    total: float | None = None
    kept: float | None = None


def jobs(
    changes: Mapping[str, Change], tied: Mapping[str, str], base: BaseWeights, layout: Layout
) -> list[Job]:
    """One job per weight as the layout stores it: projections it fuses are projected together."""
    done: set[str] = set()
    found: list[Job] = []
    for path, change in changes.items():
        if path in done:
            continue
        job = Job(path, (change,), tied.get(path))
        if _projectable(change):
            job = _fused(path, changes, base, layout) or job
        done.update(c.path for c in job.changes if isinstance(c, Change))
        found.append(job)
    return found


def _projectable(change: Change) -> bool:
    weight = change.differing.get("weight")
    return weight is not None and len(weight.shape) > 1 and not weight.grown


def _fused(
    path: str, changes: Mapping[str, Change], base: BaseWeights, layout: Layout
) -> Job | None:
    component_name, _, inner = path.partition(":")
    component = base.architecture.components[component_name]
    site = component.site_of(vocabulary(layout, component), inner)
    if site is None or len(site.parts) == 1 or site.operator is not None:
        return None
    parts: list[Change | int] = []
    for part in site.parts:
        full = f"{component_name}:{part}"
        change, stored = changes.get(full), base.find(full)
        if change is not None and _projectable(change):
            parts.append(change)
        elif change is None and stored is not None:
            parts.append(stored.shape[0])
        else:
            return None
    return Job(f"{component_name}:{site.home}", tuple(parts))


class Projection:
    """Makes the modules of a job; see `Wanted`."""

    def __init__(self, wanted: Wanted, base: BaseWeights, changes: Iterable[Change]) -> None:
        self.wanted = wanted
        self.biased = any("bias" in c.differing and _projectable(c) for c in changes)
        self.architecture: Architecture = base.architecture
        self.conv1d = _has_conv1d(base)

    def planned(self, job: Job) -> Projected:
        """The modules with shapes only, of the largest rank the rule allows."""
        return self._make(job, meta=True)

    def computed(self, job: Job) -> Projected:
        """The modules. CheckFailed naming the tensor that holds NaN or Inf."""
        return self._make(job, meta=False)

    def _make(self, job: Job, *, meta: bool) -> Projected:
        if len(job.changes) > 1:
            return self._projected(job, self._joint_bias(job, meta), meta)
        change = job.only
        weight, bias = change.known.get("weight"), change.known.get("bias")
        dialect = dialect_of(self.wanted.layout, job.path.partition(":")[0])
        moved, moved_bias = "weight" in change.differing, "bias" in change.differing
        resized = any(d.grown for d in change.differing.values())
        if not resized and _projectable(change) and self._takes(job.path):
            common = Common(stored=self._stored(job.path))
            if moved_bias:
                common["bias"] = self._value(bias, meta)
            return self._projected(job, common, meta)
        vector = weight is not None and len(weight.shape) < 2
        module: WeightAdapter
        if not resized and "full" in dialect.algorithms and (vector or not moved):
            module = Full(
                self._value(weight, meta) if moved else None,
                bias=self._value(bias, meta) if moved_bias else None,
            )
        elif not resized and not vector and weight and not moved and self._holds_bias(dialect):
            module = self._bias_alone(weight, self._value(bias, meta), job.path)
        else:
            module = Replace(
                None if weight is None else self._new(weight, meta),
                bias=None if bias is None else self._new(bias, meta),
                stored=self._stored(job.path),
            )
        return Projected({path: module for path in (job.path, job.also) if path})

    def _takes(self, path: str) -> bool:
        """Whether the layout's programs have the algorithm on that kind of layer; if not, the
        weight becomes a new value. PEFT has LoKr on linear layers and convolutions only, and no
        LoRA on an
        embedding beside LoRAs with biases (lora_bias is one switch)."""
        stored = self._stored(path)
        if self.wanted.layout.alpha != "config" or stored == "linear":
            return True
        return self.wanted.algorithm == "lora" and not (stored == "embedding" and self.biased)

    def _joint_bias(self, job: Job, meta: bool) -> Common:
        """The change of a fused weight's bias; zeros where a part's does not change."""
        if not any(isinstance(c, Change) and "bias" in c.differing for c in job.changes):
            return Common()
        kind = self._dtype(job.source)
        parts: list[Tensor] = []
        for change in job.changes:
            if isinstance(change, Change) and "bias" in change.differing:
                parts.append(self._value(change.differing["bias"], meta))
            else:
                rows = change if isinstance(change, int) else change.known["weight"].shape[0]
                parts.append(torch.zeros(rows, dtype=kind, device="meta" if meta else "cpu"))
        return Common(bias=torch.cat(parts))

    def _holds_bias(self, dialect: Dialect) -> bool:
        return dialect.bias_is_scaled and self.wanted.algorithm == "lora"

    def _bias_alone(self, weight: Difference, bias: Tensor, path: str) -> LoRA:
        """A LoRA of zeros that carries the change of a bias where only LoRAs can (PEFT)."""
        kind = bias.dtype
        up = torch.zeros(weight.shape[0], 1, *[1] * (len(weight.shape) - 2), dtype=kind)
        down = torch.zeros(1, *weight.shape[1:], dtype=kind)
        where = bias.device
        return LoRA(up.to(where), down.to(where), bias=bias, stored=self._stored(path))

    def _stored(self, path: str) -> str:
        last = members(path.partition(":")[2])[0].rpartition(".")[2]
        if last in self.architecture.embeddings:
            return "embedding"
        return "conv1d" if self.conv1d and last in self.architecture.conv1d else "linear"

    def _dtype(self, source: Difference | Stack) -> torch.dtype:
        kind = self.wanted.dtype or source.dtype
        return torch.float32 if kind == torch.float64 else kind

    def _value(self, difference: Difference | None, meta: bool) -> Tensor:
        """TUNED - BASE of one tensor in its own shape."""
        assert difference is not None
        if meta:
            shape = difference.shape or (1,)
            return torch.empty(shape, dtype=self._dtype(difference), device="meta")
        _require_finite(difference)
        return difference.dense().reshape(difference.shape or (1,)).to(self._dtype(difference))

    def _new(self, difference: Difference, meta: bool) -> Tensor:
        """TUNED's own value."""
        kind = self._dtype(difference)
        if meta:
            return torch.empty(difference.tuned.shape, dtype=kind, device="meta")
        value = difference.tuned.load()
        if not bool(torch.isfinite(value).all()):
            raise CheckFailed(f"TUNED: {difference.tuned.name!r} holds NaN or Inf.")
        return value.to(kind).clone(memory_format=torch.contiguous_format)

    # weights --------------------------------------------------------------------------------------

    def _projected(self, job: Job, common: Common, meta: bool) -> Projected:
        source = job.source
        try:
            module, total, kept = self._fitted(source, common, meta)
        except UsageError as error:
            for part in job.changes:
                if isinstance(part, Change):
                    _require_finite(part.differing["weight"])
            raise UsageError(f"{job.path}: {error}") from error
        if job.also is not None:
            other = module.with_tensors(stored="linear")
            return Projected({job.path: module, job.also: other}, total, kept)
        return Projected(_split(job, module), total, kept)

    def _fitted(
        self, source: Difference | Stack, common: Common, meta: bool
    ) -> tuple[WeightAdapter, float, float]:
        kind, rule, shape = self._dtype(source), self.wanted.rule, source.shape
        if meta:
            return _outline(self.wanted, kind, shape, common), 0.0, 0.0
        if self.wanted.algorithm == "full":
            whole = source.dense()
            total = float(torch.linalg.vector_norm(whole, dtype=torch.float64)) ** 2
            if not math.isfinite(total):
                raise UsageError("NaN or Inf")
            return Full(whole.to(kind), **common), total, total
        if self.wanted.algorithm == "lokr":
            product = self._product(source)
            module = LoKr.of_product(product, shape, rule, dtype=kind, **common)
            kept = product.kept
            if module.rank is not None:
                second = module.tensors()
                low = second["w2_a"].double() @ second["w2_b"].double()
                norm = float(torch.linalg.vector_norm(product.second, dtype=torch.float64))
                kept *= float(torch.linalg.vector_norm(low)) ** 2 / norm**2 if norm else 1.0
            return module, product.total, kept
        assert rule is not None
        found = randomized_svd(source, rule, seed=self.wanted.seed)
        root = found.s.sqrt()
        up = (found.u * root).to(kind).reshape(shape[0], -1, *[1] * (len(shape) - 2))
        down = (root[:, None] * found.vh).to(kind).reshape(-1, *shape[1:])
        return LoRA(up, down, **common), found.total, found.kept

    def _product(self, source: Difference | Stack) -> Kronecker:
        """The nearest Kronecker product, cut by the factor or, where there is none, by the most
        exact of the largest cuts with no more numbers than that of factor -1 (as `LoKr.fit`)."""
        shape = source.shape
        a, c = _cut(shape, self.wanted.factor or -1)
        if self.wanted.factor is None:
            rows, columns = source.matrix_shape
            limit = a * c + (rows // a) * (columns // c)
            kernel = math.prod(shape[2:])
            found = kronecker_choices(source, unit=kernel, parameters=limit, most=CUTS)
            a, c = found[0].a, found[0].c
        return nearest_kronecker(source, a, c, seed=self.wanted.seed)


def _split(job: Job, module: WeightAdapter) -> dict[str, WeightAdapter]:
    """A record of several modules, cut into theirs; on the group where the algorithm cannot be."""
    if len(job.changes) == 1:
        return {job.path: module}
    component, _, inner = job.path.partition(":")
    result: dict[str, WeightAdapter] = {}
    row = 0
    try:
        for part, name in zip(job.changes, members(inner), strict=True):
            height = part if isinstance(part, int) else part.differing["weight"].matrix_shape[0]
            if not isinstance(part, int):
                result[f"{component}:{name}"] = module.rows(row, row + height)
            row += height
    except CannotSplit:
        return {job.path: module}
    return result


def _cut(shape: Sequence[int], factor: int) -> tuple[int, int]:
    return factorization(shape[0], factor)[0], factorization(shape[1], factor)[0]


def _outline(
    wanted: Wanted, kind: torch.dtype, shape: tuple[int, ...], common: Common
) -> WeightAdapter:
    """The module on the meta device."""

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=kind, device="meta")

    if wanted.algorithm == "full":
        return Full(empty(*shape), **common)
    if wanted.algorithm == "lokr":
        a, c = _cut(shape, wanted.factor or -1)  # the largest of what may be chosen
        b, d = shape[0] // a, shape[1] // c
        rank = most(wanted.rule, b, d * math.prod(shape[2:])) if wanted.rule else max(b, d)
        if rank < max(b, d) / 2:
            right = empty(rank, d * math.prod(shape[2:]))
            return LoKr(
                w1=empty(a, c), w2_a=empty(b, rank), w2_b=right, kernel=shape[2:] or None, **common
            )
        return LoKr(w1=empty(a, c), w2=empty(b, d, *shape[2:]), **common)
    rank = most(wanted.rule, shape[0], math.prod(shape[1:]))
    return LoRA(empty(shape[0], rank, *[1] * (len(shape) - 2)), empty(rank, *shape[1:]), **common)


def most(rule: RankRule | None, rows: int, columns: int) -> int:
    """The largest rank a rule can ask for of a matrix."""
    shorter = min(rows, columns)
    limit = None if rule is None else rule.fixed or rule.cap
    return shorter if limit is None else min(shorter, limit)


def _has_conv1d(base: BaseWeights) -> bool:
    """Whether the model keeps its projections as transformers' Conv1D, [in, out]."""
    if base.model_type is not None:
        return base.model_type in CONV1D_MODELS
    return base.architecture.name == "llm" and any(
        name.endswith(".c_attn.weight") and s.shape[1:] == (3 * s.shape[0],)
        for name, s in base.stored.items()
    )


def _require_finite(difference: Difference) -> None:
    for side, stored, count in zip(
        ("TUNED", "BASE"),
        (difference.tuned, difference.base),
        difference.nonfinite(),
        strict=True,
    ):
        if count:
            raise CheckFailed(
                f"{side}: {stored.name!r} holds {count} values that are NaN or Inf; there is no "
                "change to extract from it. --exclude PATTERN leaves it out on request."
            )


def check_algorithm(wanted: Wanted) -> None:
    """UnsupportedError when the layout has no keys for the algorithm."""
    dialect = wanted.layout.dialect
    if wanted.algorithm not in dialect.algorithms:
        held = ", ".join(a for a in ALGORITHMS if a in dialect.algorithms)
        raise UnsupportedError(
            f"--to {wanted.layout.name} has no keys for {wanted.algorithm}; it holds {held}."
        )
    if wanted.algorithm == "lokr" and wanted.factor is None and wanted.layout.alpha == "config":
        raise UnsupportedError(
            f"--to {wanted.layout.name} cuts every weight by one factor that its config states; "
            "--factor auto cuts each its own way. Give a number, or --to lycoris."
        )
