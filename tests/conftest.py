"""What all tests share: one thread, ranks that are forked once, and reproducible hypothesis runs."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

from tests import ranks  # noqa: E402  (threads come first)

hypothesis.settings.register_profile("dhf", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("dhf")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        skip = pytest.mark.skip(reason="takes minutes; run with --all")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def forked_ranks() -> Iterator[None]:
    """Ranks for the whole session, forked before any test has run."""
    ranks.start()
    yield
    ranks.stop()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)
