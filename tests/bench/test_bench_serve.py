"""The server's benchmark: its arithmetic, what it refuses, and one small real run."""

from __future__ import annotations

import json
import socketserver
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fledge.bench.serve import Measuring, Outcome, Spec, Texts, run
from fledge.bench.serve_figures import load_figures, percentile, targets
from fledge.bench.serve_process import ends_of, prepared
from fledge.bench.serve_worker import load
from fledge.core.errors import FledgeError, UsageError
from fledge.tokenizer import load_world


def test_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert percentile(list(range(1, 101)), 0.95) == 95


def test_targets_by_hand() -> None:
    def figures(clients: int, seconds: float, gap: float) -> dict[str, Any]:
        served = {"seconds": seconds, "first_s": [0.1], "gaps_s": [gap], "client_cores": 0.1}
        return load_figures(clients, 100 * clients, {"server": [served], "engine": [{"seconds": seconds * 0.9}]})

    found = targets([figures(1, 1.0, 0.01), figures(16, 2.0, 0.04)], [], {})
    assert [(round(target["value"], 3), target["met"]) for target in found] == [
        (8.0, True), (4.0, False), (4.0, False), (0.1, False), (0.1, False)
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"clients": ()}, {"states": -1}, {"model": "a", "shape": "L1-D64"}])
def test_mistakes(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Spec(**wrong)


def test_whatever_ends_an_answer_is_forbidden_to_all(tmp_path: Path) -> None:
    model = prepared(None, "L1-D64", tmp_path, peer=True)
    assert model.gguf is not None
    tokenizer = load_world()
    texts = Texts(tokenizer, ends_of(model.gguf))
    assert texts.ends == [tokenizer.eos_id, *tokenizer.encode("\n\n")]
    measuring = Measuring(Outcome(Spec(), {}), lambda *_: None, model, texts, tmp_path)
    assert measuring._body([1], 0, 5)["fledge"]["ban"] == texts.ends
    assert list(measuring._peer_body([1], 0, 5)["logit_bias"]) == [str(end) for end in texts.ends]


@pytest.mark.parametrize(("reason", "fails"), [("length", False), ("stop", True)])
def test_a_short_answer_has_no_rate(reason: str, fails: bool) -> None:
    pieces = [{"choices": [{"text": "a", "finish_reason": each}]} for each in (None, reason)]
    answer = "HTTP/1.1 200 OK\r\n\r\n" + "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces)

    class Server(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(f"{answer}data: [DONE]\n\n".encode())

    with socketserver.TCPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        job = {"port": server.server_address[1], "clients": 1, "bodies": [{"max_tokens": 9, "stream": True}]}
        with pytest.raises(FledgeError, match=r"ended \(stop\) before it had its 9 tokens") if fails else nullcontext():
            assert len(load(job)["first_s"]) == 1
        thread.join(timeout=20)


def test_small_run(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    folder = str(tmp_path)
    outcome = run(
        Spec(clients=(2,), tokens=5, documents=(300,), states=20, resumed=3, repeats=1, peer=False, folder=folder)
    )
    (found,) = outcome.loads
    assert found["clients"] == 2 and found["tokens_per_s"]["median"] > 0
    assert found["cached_tokens_per_s"]["median"] > 0 and found["cached_gaps_s"]
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
    (found,), (document,) = outcome.loads, outcome.documents
    assert found["peer_tokens_per_s"]["median"] > 0 and found["peer_first_s"] and outcome.peer
    assert len(document["peer_cold_s"]) == len(document["peer_again_s"]) == 1
