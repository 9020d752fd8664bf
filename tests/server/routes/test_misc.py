"""The routes for tokenization."""

from __future__ import annotations

from live_server import random_llm, serving


def test_tokenize_and_detokenize() -> None:
    with serving(random_llm()) as server:
        tokens = server.post("/tokenize", {"content": "hello \u597d"}).json()["tokens"]
        assert server.post("/detokenize", {"tokens": tokens}).json() == {"content": "hello \u597d"}
        assert server.post("/detokenize", {"tokens": [-1]}).json()["error"]["param"] == "tokens"
