"""The server's benchmark: its arithmetic, what it refuses, and one small real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fledge.bench.serve import Spec, run
from fledge.bench.serve_figures import load_figures, percentile, targets
from fledge.core.errors import UsageError


def test_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert percentile(list(range(1, 101)), 0.95) == 95


def test_targets_by_hand() -> None:
    def load(clients: int, seconds: float, gap: float) -> dict[str, Any]:
        served = {"seconds": seconds, "first_s": [0.1], "gaps_s": [gap], "client_cores": 0.1}
        return load_figures(clients, 100 * clients, {"server": [served], "engine": [{"seconds": seconds * 0.9}]})

    found = targets([load(1, 1.0, 0.01), load(16, 2.0, 0.04)], [], {})
    assert [(round(target["value"], 3), target["met"]) for target in found] == [
        (8.0, True), (4.0, False), (0.1, False), (0.1, False)
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"clients": ()}, {"states": -1}, {"model": "a", "shape": "L1-D64"}])
def test_mistakes(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Spec(**wrong)


def test_small_run(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    folder = str(tmp_path)
    outcome = run(
        Spec(clients=(2,), tokens=5, documents=(300,), states=20, resumed=3, repeats=1, peer=False, folder=folder)
    )
    (load,) = outcome.loads
    assert load["clients"] == 2 and load["tokens_per_s"]["median"] > 0
    assert load["cached_tokens_per_s"]["median"] > 0 and load["cached_gaps_s"]
    names = ("cold_s", "warm_s", "handle_s", "question_s")
    assert [len(outcome.documents[0][name]) for name in names] == [1, 3, 3, 3]
    assert len(outcome.shelf["resume_s"]) == 3 and outcome.shelf["disk_bytes"] > 20 * outcome.shelf["state_bytes"]
    assert not list(tmp_path.iterdir())


@pytest.mark.peer
def test_the_peer_is_asked_the_same(tmp_path: Path) -> None:
    for module in ("uvicorn", "llama_cpp", "starlette_context", "sse_starlette", "pydantic_settings"):
        pytest.importorskip(module)
    spec = Spec(shape="L1-D64", clients=(2,), tokens=5, documents=(300,), states=0, repeats=1, folder=str(tmp_path))
    outcome = run(spec)
    (load,), (document,) = outcome.loads, outcome.documents
    assert load["peer_tokens_per_s"]["median"] > 0 and load["peer_first_s"] and outcome.peer
    assert len(document["peer_cold_s"]) == len(document["peer_again_s"]) == 1
