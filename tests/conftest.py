"""Randomness of the suite: other numbers in every test, the same ones in every run of a seed.

`pytest --seed 7` draws other numbers everywhere; what fails there fails again with that seed.
"""

import zlib

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="draw other random inputs in every test")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('seed')}"


@pytest.fixture
def test_seed(request: pytest.FixtureRequest) -> int:
    return zlib.crc32(request.node.nodeid.encode(), request.config.getoption("seed"))


@pytest.fixture(autouse=True)
def _seeded(test_seed: int) -> None:
    torch.manual_seed(test_seed)


@pytest.fixture
def rng(test_seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(test_seed)
