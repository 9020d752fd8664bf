"""Requests to the engine, and the reference loop to compare them with."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

from fakes import EOS
from random_checkpoints import random_checkpoint
from torch import nn

from fledge.checkpoint import assemble, detect
from fledge.engine.engine import Engine
from fledge.engine.generation import ModelOutput, generate_tokens, make_initial_state, prefill
from fledge.engine.request import Request, TokenOutput
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.models.state import State

VOCAB = 77
PARAMS = SamplingParams(top_p=0.95, temperature=1.3, presence_penalty=0.3, frequency_penalty=0.2, seed=5, max_tokens=12)


def native_model(version: str) -> nn.Module:
    """A small random model that runs in the native library."""
    tensors = random_checkpoint(version, n_layer=2, n_embd=40, head_size=8, vocab_size=VOCAB, seed=3)
    return assemble(detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}), tensors, pack=True)


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    """Random token ids."""
    return tuple(random.Random(seed).choices(range(1, VOCAB), k=length))


def reference_tokens(model: nn.Module, request: Request, choice: int = 0) -> list[tuple[int, State]]:
    """The tokens of one completion from the reference loop, each with the state before it."""
    start = request.start
    output = (
        start if isinstance(start, ModelOutput) else prefill(model, request.ids, start or make_initial_state(model))
    )
    assert request.params.seed is not None
    sampler = Sampler(replace(request.params, seed=request.params.seed + choice))
    tokens = []
    for step in generate_tokens(model, *output, sampler, request.params.max_tokens):
        tokens.append((step.id, step.state_before))
        if step.id == EOS:
            break
    return tokens


def reference_ids(model: nn.Module, request: Request, choice: int = 0) -> list[int]:
    """The tokens of one completion from the reference loop."""
    return [token for token, _ in reference_tokens(model, request, choice)]


def run(engine: Engine) -> dict[tuple[int, int], list[TokenOutput]]:
    """Step until all requests have ended: the outputs by request id and completion."""
    outputs = defaultdict(list)
    while engine.busy:
        for output in engine.step():
            outputs[output.request_id, output.choice].append(output)
    return outputs


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    """The sampled tokens."""
    return [output.token for output in outputs if output.token is not None]
