"""Tiny models with every kind of layer, and adapters with arbitrary values on them."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from peftsurgery.algorithms import WeightAdapter
from peftsurgery.runtime import Attached


class Layers(nn.Module):
    """Embedding, Linear, convolutions of many kinds, a norm and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.lin = nn.Linear(6, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv1d(6, 12, 3, groups=3, padding="same", dilation=2)
        self.flat = nn.Conv2d(4, 4, (3, 1), stride=(2, 1), padding=(1, 0), padding_mode="reflect")
        self.point = nn.Conv2d(4, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.lin(self.embed(ids)).transpose(1, 2)
        h = self.grouped(self.conv(h))  # (B, 12, T)
        h = self.point(self.flat(h.unflatten(1, (4, 3))))  # (B, 6, 2, T)
        return self.head(self.norm(h.mean(2).transpose(1, 2)))


WEIGHTS = ("embed", "lin", "conv", "grouped", "flat", "point", "head")


def layers(rng: Generator) -> Layers:
    model = Layers()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
        model.norm.weight.add_(1.0)
    return model.eval()


def ids(rng: Generator, rows: int = 3) -> Tensor:
    return torch.randint(0, 11, (rows, 7), generator=rng)


def scramble(attached: Attached, rng: Generator, std: float = 0.4) -> None:
    """Every trainable tensor moved by noise, as training would."""
    for adapter in attached.modules.values():
        disturb(adapter, rng, std)


def disturb(adapter: WeightAdapter, rng: Generator, std: float = 0.4) -> None:
    with torch.no_grad():
        for tensor in adapter.parameters():
            noise = torch.randn(tensor.shape, generator=rng) * std
            tensor.add_(noise.to(tensor.dtype))
