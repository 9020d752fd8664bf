"""What every test relies on: the same random numbers each time, one torch thread, and which tests run by default."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

REPO = Path(__file__).resolve().parents[1]

# Unlike the small seeds that tests give to their own generators, whose numbers would otherwise come a second time.
SEED = 20240410

# Same examples in each run; no deadline, because a busy machine is not a failure.
settings.register_profile("fledge", derandomize=True, deadline=None)
settings.load_profile("fledge")

# A shell gives what it starts in the background an ear for SIGINT that is closed.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Test models are tiny: a second thread costs more in waiting than it saves, and sums depend on the number of threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start each test from the same random state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data beside the repository; a test that asks for it is skipped where it is absent."""
    folder = REPO.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared beside the repository")
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out `slow` unless -m chooses for itself; skip `gpu` where there is none."""
    if not config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
