"""Randomness of the suite: other numbers in every test, the same ones in every run of a seed.

`pytest --seed 7` draws other numbers everywhere; what fails there fails again with that seed.
"""

import zlib

import hypothesis
import numpy as np
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="draw other random inputs in every test")


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis repeats itself too, unless a seed is asked for."""
    hypothesis.settings.register_profile("seeded", derandomize=_seed(config) == 0)
    hypothesis.settings.load_profile("seeded")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {_seed(config)}"


def _seed(config: pytest.Config) -> int:
    seed = config.getoption("seed")
    assert isinstance(seed, int)
    return seed


@pytest.fixture
def test_seed(request: pytest.FixtureRequest) -> int:
    return zlib.crc32(request.node.nodeid.encode(), _seed(request.config))


@pytest.fixture(autouse=True)
def _seeded(test_seed: int) -> None:
    torch.manual_seed(test_seed)


@pytest.fixture
def rng(test_seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(test_seed)


@pytest.fixture
def np_rng(test_seed: int) -> np.random.Generator:
    return np.random.default_rng(test_seed)
