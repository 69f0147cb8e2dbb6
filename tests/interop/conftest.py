"""Shared by the interoperability tests: quiet peers and untouched bases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.interop import models

NOISY = ("diffusers", "transformers", "LyCORIS", "peft")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that threads only wait for each other: fifty times slower on a busy
    machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The peers say a lot while loading; what matters is asserted."""
    before = {name: logging.getLogger(name).level for name in NOISY}
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def untouched() -> Callable[[str], dict[str, nn.Module]]:
    """Base name -> component -> model that no test changes; built once."""
    built: dict[str, dict[str, nn.Module]] = {}

    def get(base: str) -> dict[str, nn.Module]:
        if base not in built:
            built[base] = models.base_parts(base)
        return built[base]

    return get


@pytest.fixture(scope="session")
def plain_output(untouched: Callable[[str], dict[str, nn.Module]]) -> Callable[[str, str], Tensor]:
    """(base, component) -> the untouched model's output."""
    seen: dict[tuple[str, str], Tensor] = {}

    def get(base: str, component: str = "model") -> Tensor:
        if (base, component) not in seen:
            seen[base, component] = models.run(untouched(base)[component])
        return seen[base, component]

    return get


@pytest.fixture
def random() -> torch.Generator:
    """A fresh generator for one test."""
    return models.generator(11)
