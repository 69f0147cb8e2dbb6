"""What would survive of a change in a packed weight, tried out on some of its rows before anything
is written; and which rounding is taken for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from peftsurgery.checkpoint.dtypes import torch_dtype
from peftsurgery.errors import CheckFailed, UsageError
from peftsurgery.operations.apply import SAMPLED, Scratch, Settings, output_dtype
from peftsurgery.operations.grams import Grams
from peftsurgery.operations.pipeline import SAMPLE
from peftsurgery.operations.plan import MergePlan, Target
from peftsurgery.operations.requant import Requant
from peftsurgery.operations.requantizing import Order, Repacker
from peftsurgery.operations.staging import workers
from peftsurgery.quantizers import PackedTensor
from peftsurgery.quantizers.rounding import Subspace
from peftsurgery.quantizers.surviving import ENOUGH, Survival, survival
from peftsurgery.reports.base import Row

ROWS, VALUES = 16, 1 << 15  # of each weight at least so many are tried
OUTSIDE = 4e-3  # of the values: more cannot be written with the scales there are
TRIED = ("nearest", "subspace", "stochastic")


@dataclass(frozen=True)
class Forecast:
    """Rounding -> what would survive of the change of one weight, and "dequant" beside them."""

    name: str
    format: str
    shares: Mapping[str, Survival]
    chosen: str


def foresee(
    target: Target, settings: Settings, order: Order, scratch: Scratch | None = None
) -> tuple[dict[str, Survival], Subspace | None]:
    """Every rounding of TRIED, that of `order` and "dequant" on the middle rows of one target, as
    sums over the whole weight; with the error feedback that was set up for it.
    """
    repacker = Repacker(target, settings, order, scratch)
    packed, count = repacker.packed, repacker.packed.rows
    per = count // repacker.slabs
    some = max(ROWS, VALUES // max(1, packed.columns))
    start = repacker.slabs // 2 * per + max(0, (per - some) // 2)
    stop = min(start + some, (repacker.slabs // 2 + 1) * per)
    exact = repacker.part(start, stop, tiled=False)
    grid, codes = packed.format.grid(packed, start, stop)
    before, rows = grid.values(codes), slice(start, stop)
    if grid.outside(exact.wanted[rows]) > OUTSIDE:  # other scales will be needed
        exact = repacker.exact()
        grid = packed.format.fit(packed, exact.wanted)[0].rows(start, stop)
    assert exact.change is not None
    wanted, change = exact.wanted[rows], exact.change[rows]
    found: dict[str, Survival] = {}
    for rounding in dict.fromkeys((*TRIED, order.rounding)):
        repacker.order = replace(order, rounding=rounding)
        chosen = repacker.codes(start, stop, grid, exact, codes)
        found[rounding] = survival(wanted, change, before, grid.values(chosen))
    plain = wanted.to(torch_dtype(output_dtype(target, settings))).float()
    found["dequant"] = survival(wanted, change, wanted - change, plain)
    for item in found.values():
        item.scale(count / (stop - start))
    return found, repacker.known_feedback


def choose(shares: Mapping[str, Survival], rounding: str) -> str:
    """The rounding of one weight: the one asked for, or of "auto" the nearest value where that
    keeps enough, else error feedback in the directions of the change.
    """
    if rounding != "auto":
        return rounding
    return "nearest" if shares["nearest"].share >= ENOUGH else "subspace"


def forecast(
    plan: MergePlan,
    settings: Settings,
    requant: Requant,
    originals: Mapping[str, Target],
    grams: Grams | None,
) -> tuple[list[Forecast], dict[str, Order]]:
    """What to expect of every packed target, and how it is to be rounded.

    originals: packed target -> the target on the unquantized base. Raises UsageError when gptq
    rounding has no Gram matrix for a module.
    """
    scratch = Scratch()
    targets = [t for t in plan.targets.values() if isinstance(t.tensor, PackedTensor)]
    orders = {
        target.name: _order(target, settings, requant, originals, grams) for target in targets
    }

    def one(target: Target) -> tuple[Forecast, Subspace | None]:
        assert isinstance(target.tensor, PackedTensor)
        shares, fed = foresee(target, settings, orders[target.name], scratch)
        rounding = settings.rounding
        if rounding == "auto" and requant.mode in ("from-original", "residual"):
            rounding = "nearest"  # a fresh rounding carries the change; the residual, what is lost
        chosen = choose(shares, rounding)
        return Forecast(target.name, target.tensor.packed.format.name, shares, chosen), fed

    sample = SAMPLE if sum(target.numel for target in targets) > SAMPLED else 1
    with workers() as pool:
        both = list(pool.map(one, targets))
    found = [item for item, _ in both]
    return found, {
        item.name: replace(orders[item.name], rounding=item.chosen, feedback=fed, sample=sample)
        for item, fed in both
    }


def _order(
    target: Target,
    settings: Settings,
    requant: Requant,
    originals: Mapping[str, Target],
    grams: Grams | None,
) -> Order:
    original = originals[target.name].tensor if requant.mode == "from-original" else None
    if settings.rounding != "gptq":
        return Order(
            "nearest" if settings.rounding == "auto" else settings.rounding, None, original
        )
    return Order("gptq", _gram(target, grams), original)


def _gram(target: Target, grams: Grams | None) -> Callable[[], Tensor]:
    for edit in target.edits:
        found = grams.of(edit.path) if grams is not None else None
        if found is not None:

            def square(read: Callable[[], Tensor] = found) -> Tensor:
                gram = read()
                return gram if gram.ndim == 2 else gram.diag()

            return square
    raise UsageError(
        f"--rounding gptq: there is no Gram matrix for {target.edits[0].path}. Pass --gram FILE "
        "with one for every packed module, or use --rounding subspace, which needs none."
    )


def forecast_rows(found: list[Forecast]) -> list[Row]:
    """A row for every packed weight: what each rounding would keep, and the one taken."""
    rows: list[Row] = []
    for item in found:
        row: Row = {"tensor": item.name, "format": item.format, "rounding": item.chosen}
        row |= {f"{name} keeps": s.share for name, s in item.shares.items()}
        rows.append(row)
    return rows


def overall(found: list[Forecast], rounding: str | None = None) -> Survival:
    """Sums over all packed weights, of one rounding or of those chosen."""
    total = Survival()
    for item in found:
        total.add(item.shares[rounding or item.chosen])
    return total


def explain(found: list[Forecast]) -> str:
    """The choice and the reason for it, in a line."""
    counts = {r: sum(item.chosen == r for item in found) for r in (*TRIED, "gptq")}
    named = ", ".join(f"{r} for {n} weights" for r, n in counts.items() if n)
    return f"{named}; predicted: {overall(found).share:.1%} survives ({alternatives(found)})"


def alternatives(found: list[Forecast]) -> str:
    """What each way would keep, with its error relative to ΔW."""
    words = {"dequant": "--requant dequant"}
    listed: list[str] = []
    for way in (*TRIED, "dequant"):
        total = overall(found, way)
        noise = (total.error / total.total) ** 0.5 if total.total > 0 else 0.0
        name = words.get(way, f"--rounding {way}")
        listed.append(f"{name} keeps {total.share:.1%} with an error of {noise:.2g} ‖ΔW‖")
    return "; ".join(listed)


def check_predicted(found: list[Forecast], minimum: float, requant: Requant) -> None:
    """CheckFailed when less than `minimum` of ΔW is to be expected in the packed weights."""
    total = overall(found)
    if not found or requant.mode == "residual" or total.share >= minimum:
        return
    raise CheckFailed(
        f"only {total.share:.1%} of ΔW is expected to survive in the packed weights, less than "
        f"--min-survival {minimum:g}; nothing was written. Predicted: {alternatives(found)}. With "
        "the unquantized base at hand, --requant from-original:BASE16 packs W16 + ΔW; --requant "
        "residual:RANK keeps what is lost as an adapter."
    )
