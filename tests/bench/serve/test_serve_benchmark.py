"""The server benchmark: its metrics, usage errors, failures of the baseline, and one small real run."""

from __future__ import annotations

import json
import socketserver
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fledge.bench.serve.benchmark import PromptTexts, ServeBenchmark
from fledge.bench.serve.client import measure_load
from fledge.bench.serve.metrics import compute_targets, load_metrics, percentile
from fledge.bench.serve.servers import BASELINE, end_token_ids, prepare_model
from fledge.bench.suite import CaseRuns, run_benchmark
from fledge.core.errors import FledgeError, UsageError
from fledge.tokenizer import load_world


def test_a_percentile_is_a_measured_value() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert percentile(list(range(1, 101)), 0.95) == 95


def fake_load(clients: int, seconds: float, gap: float, **more: CaseRuns) -> dict[str, Any]:
    served = {"seconds": seconds, "first_s": [0.1], "gaps_s": [gap], "client_cores": 0.1}
    engine = {"seconds": seconds * 0.9}
    return load_metrics(clients, 100 * clients, {"server": CaseRuns([served]), "engine": CaseRuns([engine]), **more})


def test_a_baseline_that_crashes_is_recorded() -> None:
    load = fake_load(1, 1.0, 0.01, **{BASELINE: CaseRuns([], "it crashed")})
    assert load["peer_error"] == "it crashed" and "peer_tokens_per_s" not in load
    assert load["tokens_per_s"]["median"] == 100


def test_targets_by_hand() -> None:
    loads = [fake_load(1, 1.0, 0.01), fake_load(16, 2.0, 0.04)]
    targets = compute_targets({"loads": loads, "documents": [], "state_store": {}})
    assert [(round(target["value"], 3), target["met"]) for target in targets] == [
        (8.0, True), (4.0, False), (4.0, False), (0.1, False), (0.1, False)
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"clients": ()}, {"states": -1}, {"model": "a", "shape": "L1-D64"}])
def test_usage_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ServeBenchmark(**wrong)


def test_all_end_tokens_are_banned_in_all_programs(tmp_path: Path) -> None:
    model = prepare_model(None, "L1-D64", tmp_path, baseline=True)
    assert model.gguf is not None
    tokenizer = load_world()
    prompts = PromptTexts(tokenizer, end_token_ids(model.gguf))
    assert prompts.end_ids == [tokenizer.eos_id, *tokenizer.encode("\n\n")]
    assert prompts.body([1], 0, 5)["fledge"]["ban"] == prompts.end_ids
    assert list(prompts.baseline_body([1], 0, 5)["logit_bias"]) == [str(end) for end in prompts.end_ids]


@pytest.mark.parametrize(("reason", "fails"), [("length", False), ("stop", True)])
def test_a_short_response_has_no_rate(reason: str, fails: bool) -> None:
    events = [{"choices": [{"text": "a", "finish_reason": each}]} for each in (None, reason)]
    response = "HTTP/1.1 200 OK\r\n\r\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events)

    class Server(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(f"{response}data: [DONE]\n\n".encode())

    with socketserver.TCPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        job = {"port": server.server_address[1], "clients": 1, "bodies": [{"max_tokens": 9, "stream": True}]}
        with pytest.raises(FledgeError, match=r"ended \(stop\) before it had its 9 tokens") if fails else nullcontext():
            assert len(measure_load(job)["first_s"]) == 1
        thread.join(timeout=20)


def test_small_run(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    folder = str(tmp_path)
    sizes: dict[str, Any] = {"clients": (2,), "tokens": 5, "documents": (300,), "states": 20, "resumed": 3}
    progress: list[Any] = []
    settings = ServeBenchmark(**sizes, repeats=1, peer=False, folder=folder)
    record = run_benchmark(settings, "", lambda *call: progress.append(call))
    (load,) = record["loads"]
    assert load["clients"] == 2 and load["tokens_per_s"]["median"] > 0
    assert load["cached_tokens_per_s"]["median"] > 0 and load["cached_gaps_s"]
    assert progress[-1][2] - progress[-1][1] == 1 and "disabled" in record["notes"][0]
    assert record["settings"]["folder"] is None and record["settings"]["clients"] == (2,)
    names = ("cold_s", "warm_s", "handle_s", "question_s")
    assert [len(record["documents"][0][name]) for name in names] == [1, 3, 3, 3]
    store = record["state_store"]
    assert len(store["resume_s"]) == 3 and store["disk_bytes"] > 20 * store["state_bytes"]
    assert not list(tmp_path.iterdir())


@pytest.mark.peer
def test_the_baseline_gets_the_same_requests(tmp_path: Path) -> None:
    for module in ("uvicorn", "llama_cpp", "starlette_context", "sse_starlette", "pydantic_settings"):
        pytest.importorskip(module)
    sizes: dict[str, Any] = {"clients": (2,), "tokens": 5, "documents": (300,), "states": 0}
    record = run_benchmark(ServeBenchmark(shape="L1-D64", **sizes, repeats=1, folder=str(tmp_path)))
    (load,), (document,) = record["loads"], record["documents"]
    assert load["peer_tokens_per_s"]["median"] > 0 and load["peer_first_s"] and record["peers"][BASELINE]
    assert len(document["peer_cold_s"]) == len(document["peer_again_s"]) == 1
