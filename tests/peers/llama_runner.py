"""Runs GGUF files through llama.cpp (the PyPI package `llama-cpp-python`) and writes what it answers.

A program of its own: llama.cpp aborts the process where something is wrong, prints as it loads, and keeps threads. It
takes one argument, a JSON file:

    [{"file": "a.gguf", "pieces": [[1, 2], [3]], "results": "a.npz", "quantize": 7, "from": "b.gguf"}, ...]

With `quantize`, a number of llama.cpp's enum of file types, `file` is first made by llama.cpp's quantizer. The pieces
are fed one after another as token ids, the state carried on: a long piece is llama.cpp's prefill, a short one its
decode. A results file holds `logits` (all tokens, vocab) and what the vocabulary says: `ids` of the text TEXT,
`prompt`, the chat of CHAT as bytes, and `end`, the id that ends a turn. This file imports nothing of fledge.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TEXT = "Hello 'world'!\n\n\"x\\y\"\t2024 - 你好 é\r\n"
CHAT = (("system", "Be brief."), ("user", " How are you? "), ("assistant", "Well."), ("user", "And now?"))


def answers(file: str, pieces: list[list[int]]) -> dict[str, Any]:
    """What a results file holds."""
    import llama_cpp.llama_cpp as api

    model = api.llama_model_load_from_file(file.encode(), api.llama_model_default_params())
    assert model, f"llama.cpp does not load {file}"
    vocabulary: Any = api.llama_model_get_vocab(model)
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
    settings.n_threads = settings.n_threads_batch = 1
    context: Any = api.llama_init_from_model(model, settings)
    rows = api.llama_vocab_n_tokens(vocabulary)
    logits, position = [], 0
    for piece in pieces:
        batch = api.llama_batch_init(len(piece), 0, 1)
        batch.n_tokens = len(piece)
        for at, token in enumerate(piece):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position + at, 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        position += len(piece)
        assert api.llama_decode(context, batch) == 0
        for at in range(len(piece)):
            logits.append(np.ctypeslib.as_array(api.llama_get_logits_ith(context, at), (rows,)).copy())
        api.llama_batch_free(batch)
    return {"logits": np.stack(logits), **vocabulary_answers(api, model, vocabulary)}


def quantize(source: str, target: str, kind: int) -> None:
    """Have llama.cpp make a file of another type."""
    import llama_cpp.llama_cpp as api

    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = kind, 1
    assert api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)) == 0


def vocabulary_answers(api: Any, model: Any, vocabulary: Any) -> dict[str, Any]:
    """Ids of TEXT, the prompt of CHAT and the id that ends a turn; nothing where the file has no chat template."""
    template = api.llama_model_chat_template(model, None)
    if not template:
        return {}
    text = TEXT.encode()
    ids = (api.llama_token * 1000)()
    count = api.llama_tokenize(vocabulary, text, len(text), ids, 1000, False, False)
    messages = (api.llama_chat_message * len(CHAT))(
        *(api.llama_chat_message(role.encode(), content.encode()) for role, content in CHAT)
    )
    prompt = ctypes.create_string_buffer(1000)
    size = api.llama_chat_apply_template(template, messages, len(CHAT), True, prompt, 1000)
    end = api.llama_vocab_eot(vocabulary)
    assert api.llama_vocab_is_eog(vocabulary, 0) and (end < 0 or api.llama_vocab_is_eog(vocabulary, end))
    return {"ids": ids[:count], "prompt": np.frombuffer(prompt.raw[:size], dtype=np.uint8), "end": end}


def main(jobs_file: str) -> None:
    """Do the jobs of a file."""
    for job in json.loads(Path(jobs_file).read_text(encoding="utf-8")):
        if "quantize" in job:
            quantize(job["from"], job["file"], job["quantize"])
        np.savez(job["results"], **answers(job["file"], job["pieces"]))


if __name__ == "__main__":
    main(sys.argv[1])
