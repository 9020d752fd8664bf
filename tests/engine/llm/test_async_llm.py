"""`AsyncLLM`: the texts of `LLM`, for many coroutines that share one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fakes import ByteTokenizer, FakeModel, random_finch

from fledge.core.errors import FledgeError, TokenizerError, UsageError
from fledge.engine import LLM, AsyncLLM

TOKENIZER = ByteTokenizer("\n\n", "lo")


def fake_llm(reply: str = "hello") -> LLM:
    return LLM(FakeModel([TOKENIZER.encode(reply)], TOKENIZER.get_id(":"), TOKENIZER.vocab_size), TOKENIZER)


def run(llm: LLM, program: Callable[[AsyncLLM], Awaitable[Any]], **options: Any) -> Any:
    """Run a coroutine with an `AsyncLLM`, for at most a minute."""

    async def main() -> Any:
        async with AsyncLLM(llm, **options) as async_llm:
            return await asyncio.wait_for(program(async_llm), 60)

    return asyncio.run(main())


def test_completions_are_those_of_the_llm() -> None:
    llm = LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER, "random")
    settings = {"seed": 3, "max_tokens": 10}
    prompts = ["Once", "upon a time", "x" * 600]

    async def program(async_llm: AsyncLLM) -> Any:
        one = await async_llm.generate("Once", **settings)
        return one, await async_llm.generate(prompts, **settings)

    one, several = run(llm, program)
    assert one.text == several[0].text == llm.generate("Once", **settings).text
    for completion, prompt in zip(several, prompts, strict=True):
        alone = llm.generate(prompt, **settings)
        assert (completion.ids, completion.seed, completion.prompt_tokens) == (
            alone.ids,
            alone.seed,
            alone.prompt_tokens,
        )
        assert completion.timings.prefill_s > 0 and completion.timings.decode_s >= 0


def test_pieces_join_to_the_text() -> None:
    async def program(async_llm: AsyncLLM) -> Any:
        stream = async_llm.stream("say:", temperature=0.0)
        assert stream.completion is None
        return [piece async for piece in stream], stream.completion

    pieces, completion = run(fake_llm(), program)
    assert "".join(pieces) == completion.text == "hello" and completion.finish_reason == "eos"


def test_more_requests_than_the_engine_accepts_wait() -> None:
    async def program(async_llm: AsyncLLM) -> Any:
        return await async_llm.generate(["say:"] * 20, temperature=0.0)

    assert [done.text for done in run(fake_llm(), program, max_requests=3)] == ["hello"] * 20


def test_logprobs_are_those_of_the_llm() -> None:
    llm = LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER, "random")

    async def program(async_llm: AsyncLLM) -> Any:
        return await async_llm.logprobs("hello"), await async_llm.logprobs(["hello", "", "lo"], context="a")

    one, several = run(llm, program)
    assert one == llm.logprobs("hello") and several == llm.logprobs(["hello", "", "lo"], context="a")


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "garbage collected"])
def test_stopped_stream_frees_the_engine(is_closed: bool) -> None:
    async def program(async_llm: AsyncLLM) -> Any:
        stream = async_llm.stream("say:", temperature=0.0, max_tokens=100_000)
        async for _ in stream:
            break
        if is_closed:
            await stream.aclose()
        completion = stream.completion
        del stream
        task = asyncio.ensure_future(async_llm.generate("say:", temperature=0.0, max_tokens=100_000))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while async_llm._engine.num_requests:
            await asyncio.sleep(0.01)
        return completion

    assert run(fake_llm("lo" * 200_000), program) is None


@pytest.mark.parametrize(
    ("prompt", "settings", "error"),
    [
        ("", {}, UsageError),
        ([1, 999], {}, TokenizerError),
        ("a", {"temperature": -1}, UsageError),
        (["a", "b"], {"ban": tuple(range(TOKENIZER.vocab_size))}, UsageError),
    ],
)
def test_errors_are_those_of_the_llm(prompt: Any, settings: Any, error: type[Exception]) -> None:
    async def program(async_llm: AsyncLLM) -> Any:
        with pytest.raises(error):
            await async_llm.generate(prompt, **settings)
        return await async_llm.generate("say:", temperature=0.0)

    assert run(fake_llm(), program).text == "hello"


def test_closed_engine_rejects_requests() -> None:
    async def main() -> None:
        async with AsyncLLM(fake_llm()) as async_llm:
            pass
        with pytest.raises(FledgeError, match="shutting down"):
            await async_llm.generate("say:")

    asyncio.run(main())
