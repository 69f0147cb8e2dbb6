"""Small adapter modules by algorithm: the keys a file would hold, filled from a seed."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]


class Maker:
    """Draws the tensors of one file. `style` is the spelling of a LoRA: "kohya" or "peft"."""

    def __init__(self, seed: int = 0, *, style: str = "kohya", dtype: torch.dtype = torch.float32):
        self.generator = torch.Generator().manual_seed(seed)
        self.down, self.up = {
            "kohya": ("lora_down.weight", "lora_up.weight"),
            "peft": ("lora_A.weight", "lora_B.weight"),
        }[style]
        self.dtype = dtype

    def draw(self, *shape: int) -> torch.Tensor:
        """Normal numbers of this shape."""
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def lora(
        self,
        name: str,
        out: int,
        into: int,
        rank: int = 2,
        *,
        alpha: float | None = None,
        kernel: tuple[int, ...] = (),
    ) -> Tensors:
        """A LoRA of a matrix or convolution."""
        found = {
            f"{name}.{self.down}": self.draw(rank, into, *kernel),
            f"{name}.{self.up}": self.draw(out, rank, *[1] * len(kernel)),
        }
        return found | self.alpha(name, alpha)

    def loha(
        self, name: str, out: int, into: int, rank: int = 2, *, alpha: float | None = None
    ) -> Tensors:
        """A LoHa of a matrix."""
        found = {}
        for n in (1, 2):
            found[f"{name}.hada_w{n}_a"] = self.draw(out, rank)
            found[f"{name}.hada_w{n}_b"] = self.draw(rank, into)
        return found | self.alpha(name, alpha)

    def lokr(
        self,
        name: str,
        first: tuple[int, int],
        second: tuple[int, int],
        rank: int | None = 2,
        *,
        alpha: float | None = None,
    ) -> Tensors:
        """A LoKr w1 (a, c) ⊗ w2 (b, d); w2 low-rank unless rank is None."""
        found = {f"{name}.lokr_w1": self.draw(*first)}
        if rank is None:
            found[f"{name}.lokr_w2"] = self.draw(*second)
        else:
            found[f"{name}.lokr_w2_a"] = self.draw(second[0], rank)
            found[f"{name}.lokr_w2_b"] = self.draw(rank, second[1])
        return found | self.alpha(name, alpha)

    def dora(self, name: str, out: int, into: int, axis: str, rank: int = 2) -> Tensors:
        """A LoRA with a DoRA magnitude `[out, 1]` or `[1, in]`."""
        shape = (out, 1) if axis == "out" else (1, into)
        return self.lora(name, out, into, rank) | {
            f"{name}.dora_scale": self.draw(*shape).abs() + 1
        }

    @staticmethod
    def alpha(name: str, alpha: float | None) -> Tensors:
        """The alpha tensor, or nothing."""
        return {} if alpha is None else {f"{name}.alpha": torch.tensor(float(alpha))}
