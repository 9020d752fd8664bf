"""Settings of all tests: fixed random seeds, one torch thread, and the selection of tests that run by default."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

REPO = Path(__file__).resolve().parents[1]

# Different from the small seeds of the tests' own generators, so that their numbers do not repeat.
SEED = 20240410

# The same examples in each run. No deadline, because a busy machine must not make a test fail.
settings.register_profile("fledge", derandomize=True, deadline=None)
settings.load_profile("fledge")

# A shell starts background processes with SIGINT ignored; some tests need the default handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Test models are tiny: a second thread costs more than it saves, and torch's sums depend on the number of threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start each test from the same random state, independent of earlier tests."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data beside the repository. If it is absent, tests that need it are skipped."""
    folder = REPO.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared beside the repository")
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `slow` tests unless -m is given; skip `gpu` tests if there is no GPU."""
    if not config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
