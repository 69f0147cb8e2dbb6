"""AdaLoRA's budget: which ranks of which layers are kept while training goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from peftsurgery.algorithms import AdaLoRA
from peftsurgery.errors import UsageError

from .controls import adapters

FACTORS = ("down", "e", "up")


@dataclass(frozen=True)
class Budget:
    """How many ranks the whole model has at a step, counted from 0 or 1 as the loop does.

    b(t) = initial                                         t <= warmup
           target + (initial - target) (1 - (t - warmup) / (total - final - warmup))³   between
           target                                          t > total - final

    (Zhang et al. 2023, arXiv 2303.10512, eq. 12, rounded down as PEFT does). Ranks are masked every
    `every` steps in between, at t = total - final, and always after.
    """

    initial: int
    target: int
    total: int
    warmup: int = 0
    final: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.target <= self.initial:
            raise UsageError(
                f"budget: got a target of {self.target} ranks and {self.initial} at the start; "
                "expected 0 < target <= start."
            )
        if min(self.warmup, self.final) < 0 or self.warmup + self.final >= self.total:
            raise UsageError(
                f"budget: warmup {self.warmup} and final {self.final} must leave some of the "
                f"{self.total} steps between them."
            )
        if self.every < 1:
            raise UsageError(f"budget: got every={self.every}, expected at least 1.")

    @property
    def settled(self) -> int:
        """The step at which the ranks are chosen for good."""
        return self.total - self.final

    def at(self, step: int) -> tuple[int, bool]:
        """(b(step), whether to mask now)."""
        if step <= self.warmup:
            return self.initial, False
        if step >= self.settled:
            return self.target, True
        left = 1 - (step - self.warmup) / (self.settled - self.warmup)
        ranks = int((self.initial - self.target) * left**3 + self.target)
        return ranks, step % self.every == 0


class RankAllocator:
    """Masks the least important ranks of all AdaLoRA layers, down to a budget.

    With the sensitivity of an element I = |w · ∂L/∂w|, its averages over steps

        Ī <- β1 Ī + (1 - β1) I,     U <- β2 U + (1 - β2) |I - Ī|,     s = Ī · U,

    the importance of rank k is s(e_k) + mean(s(down[k])) + mean(s(up[:, k])) (Zhang et al. 2023,
    arXiv 2303.10512, section 3.2). The b(t) most important of all layers keep their e, the others
    get e = 0, and gradients may bring them back until the budget is final. Of equal ones the first
    are kept (PEFT's `RankAllocator` drops all of them).

        loss = model(**batch).loss + 0.5 * adalora_orthogonality(model)
        loss.backward(); optimizer.step(); allocator.step(t); optimizer.zero_grad()

    target_rank   mean rank per layer at the end; the initial one is what the adapters have
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_rank: int,
        total: int,
        warmup: int = 0,
        final: int = 0,
        every: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        name: str = "default",
    ) -> None:
        found = adapters(model, name)
        self.layers = {p: a for p, a in sorted(found.items()) if isinstance(a, AdaLoRA)}
        if not self.layers:
            raise UsageError(f"the adapter {name!r} has no module of AdaLoRA.")
        for label, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise UsageError(f"RankAllocator: got {label}={beta}, expected 0 < {label} < 1.")
        initial = sum(layer.rank for layer in self.layers.values())
        target = target_rank * len(self.layers)
        self.budget = Budget(initial, target, total, warmup, final, every)
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity: dict[str, Tensor] = {}  # PATH/FACTOR -> Ī
        self.uncertainty: dict[str, Tensor] = {}  # PATH/FACTOR -> U
        self.kept: dict[str, Tensor] = {}  # PATH -> (r,) bool, of the last masking

    @torch.no_grad()
    def step(self, step: int) -> dict[str, Tensor] | None:
        """After the optimizer's step, before zero_grad; the ranks kept by layer (r,), or None when
        nothing was masked.

        UsageError names a factor without gradient, while gradients are still needed.
        """
        budget = self.budget
        if step < budget.settled:
            self._observe()
        ranks, now = budget.at(step)
        if step > budget.settled:
            if not self.kept:
                raise UsageError(
                    f"RankAllocator: step {step} is behind {budget.settled}, where the ranks are "
                    "chosen, but no step came before it. Load the state of the training."
                )
            self._mask()
        elif now:
            self._choose(ranks)
            self._mask()
        return dict(self.kept) if now else None

    def ranks(self) -> dict[str, int]:
        """Path -> ranks kept by the last masking; all before it."""
        return {
            p: int(self.kept[p].sum()) if p in self.kept else a.rank for p, a in self.layers.items()
        }

    def _factors(self) -> dict[str, nn.Parameter]:
        return {
            f"{path}/{factor}": getattr(layer, factor)
            for path, layer in self.layers.items()
            for factor in FACTORS
        }

    def _observe(self) -> None:
        for key, parameter in self._factors().items():
            if parameter.grad is None:
                raise UsageError(
                    f"RankAllocator: {key!r} has no gradient; call step() between backward() and "
                    "zero_grad()."
                )
            now = (parameter * parameter.grad).abs().float()
            smooth = self.sensitivity.get(key, torch.zeros_like(now))
            smooth = self.beta1 * smooth + (1 - self.beta1) * now
            spread = self.uncertainty.get(key, torch.zeros_like(now))
            spread = self.beta2 * spread + (1 - self.beta2) * (now - smooth).abs()
            self.sensitivity[key], self.uncertainty[key] = smooth, spread

    def importance(self) -> dict[str, Tensor]:
        """Path -> importance of each rank (r,), in fp32."""
        score = {key: mean * self.uncertainty[key] for key, mean in self.sensitivity.items()}
        if not score:
            raise UsageError("RankAllocator: no gradient was seen yet.")
        return {
            path: score[f"{path}/e"].reshape(-1)
            + score[f"{path}/down"].flatten(1).mean(1)
            + score[f"{path}/up"].mean(0)
            for path in self.layers
        }

    def _choose(self, ranks: int) -> None:
        scores = self.importance()
        order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
        keep = torch.zeros(self.budget.initial, dtype=torch.bool, device=order.device)
        keep[order[:ranks]] = True
        sizes = [len(score) for score in scores.values()]
        self.kept = dict(zip(scores, keep.split(sizes), strict=True))

    def _mask(self) -> None:
        for path, layer in self.layers.items():
            layer.e[~self.kept[path].to(layer.e.device)] = 0

    # --- resuming ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What a resume needs, by name; `load` puts it back."""
        named = {
            **{f"sensitivity/{key}": value for key, value in self.sensitivity.items()},
            **{f"uncertainty/{key}": value for key, value in self.uncertainty.items()},
        }
        return named | {f"kept/{path}": kept.to(torch.uint8) for path, kept in self.kept.items()}

    def settings(self) -> dict[str, object]:
        """The numbers that must be the same to go on."""
        return {**asdict(self.budget), "beta1": self.beta1, "beta2": self.beta2}

    def load(self, state: dict[str, Tensor]) -> None:
        """UsageError names the first tensor that does not belong to these layers."""
        shapes = {
            **{
                f"{kind}/{key}": tuple(p.shape)
                for kind in ("sensitivity", "uncertainty")
                for key, p in self._factors().items()
            },
            **{f"kept/{path}": (layer.rank,) for path, layer in self.layers.items()},
        }
        for key, value in state.items():
            if shapes.get(key) != tuple(value.shape):
                raise UsageError(
                    f"RankAllocator: state {key!r} has shape {tuple(value.shape)}, expected "
                    f"{shapes.get(key, 'none of that name')}."
                )
        self.sensitivity, self.uncertainty, self.kept = {}, {}, {}
        places = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        factors = self._factors()
        for key, value in state.items():
            kind, _, rest = key.partition("/")
            if kind == "kept":
                self.kept[rest] = value.bool().to(self.layers[rest].e.device, copy=True)
            else:
                places[kind][rest] = value.float().to(factors[rest].device, copy=True)
